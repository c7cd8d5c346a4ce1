"""The pages: what they may load, and the chat page's own script, run by node."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import httpx
import pytest

from flash_moe_mlx.server.pages import PAGES, content_policy

from ..support.serving import SUM, TIGHT, WEATHER_TOOL, demo, post

pytestmark = pytest.mark.xdist_group("server_status")

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with demo(**TIGHT) as running:
        yield running


def source(name: str) -> str:
    return files("flash_moe_mlx").joinpath("server", name).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", PAGES)
def test_the_page_may_load_nothing_but_what_it_holds(address: str, path: str):
    answer = httpx.get(f"{address}{path}")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(rule.strip().partition(" ")[::2] for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["trusted-types"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    inline = re.findall(r"<(script|style)>(.*?)</\1>", answer.text, re.DOTALL)
    for kind in ("script", "style"):
        hashes = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for k, body in inline if k == kind]
        assert policy[f"{kind}-src"].split() == [f"'sha256-{digest}'" for digest in hashes] != []


@pytest.mark.parametrize("name", PAGES.values())
def test_the_page_names_no_other_place(name: str):
    text = source(name)
    for tag, attributes in Elements(text).found:
        assert not {"src", "srcset", "style", "action", "data"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], "the policy refuses it"
        assert attributes.get("href", "") in ("", "./", "chat", "#text")
        assert tag not in ("link", "base", "iframe", "img", "object")
    assert not re.search(r"@import|url\(|innerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    asked = re.findall(r"fetch\((.*?),", text)
    assert asked and set(asked) <= {'"stats"', '"v1/chat/completions"'}
    strings = re.findall(r"https?://[^\s\"']*", text)  # SVG's namespace, and patterns of addresses
    assert all(found.startswith(("http://www.w3.org/2000/svg", "https?:")) or "\\" in found for found in strings)


def test_another_script_is_another_policy():
    page = "<style>b</style><script>a</script>"
    assert content_policy(page) != content_policy(page.replace(">a<", ">A<"))


def test_the_chat_page_can_be_used_without_a_pointer():
    found = Elements(source("chat.html")).found
    ids = {attributes["id"] for _, attributes in found if "id" in attributes}
    labels = re.findall(r"<label>(.*?)</label>", source("chat.html"), re.DOTALL)
    labelled = {identity for label in labels for identity in re.findall(r'id="([^"]+)"', label)}
    for tag, attributes in found:
        assert (attributes.get("tabindex") or "0") == "0"
        if tag in ("input", "textarea", "select"):
            assert "aria-label" in attributes or attributes["id"] in labelled
        for name in ("aria-controls", "aria-describedby", "aria-labelledby"):
            assert attributes.get(name) is None or attributes[name] in ids
    assert found[0] == ("html", {"lang": "en"})


def run(script: str) -> Any:
    """Run the chat page's functions under node; returns the script's value."""
    own = re.findall(r"<script>(.*?)</script>", source("chat.html"), re.DOTALL)[0]
    told = f"{own}\nconsole.log(JSON.stringify((() => {{ {script} }})()))"
    done = subprocess.run(["node", "-"], input=told, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def written(node: Any) -> str:
    """Write a tree as markup, as a browser would show the elements made of it."""
    if isinstance(node, str):
        return html.escape(node, quote=False)
    tag, attributes, children = node
    shown = "".join(f' {name}="{html.escape(value)}"' for name, value in attributes.items())
    return f"<{tag}{shown}>" + "".join(map(written, children)) + f"</{tag}>"


LINK = '<a href="{}" target="_blank" rel="noopener noreferrer">{}</a>'
MARKDOWN = {
    "one\ntwo\n\nthree": "<p>one<br></br>two</p><p>three</p>",
    "a **b** *c* ***d*** ~~e~~ __f__ _g_": "<p>a <strong>b</strong> <em>c</em> <strong><em>d</em></strong> "
    "<del>e</del> <strong>f</strong> <em>g</em></p>",
    "snake_case_x 2 * 3 * 4 **open \\*x\\*": "<p>snake_case_x 2 * 3 * 4 **open *x*</p>",
    "*a **b** c* `**d**` ``e`f``": "<p><em>a <strong>b</strong> c</em> <code>**d**</code> <code>e`f</code></p>",
    "# A *b* #\n### C\n#d": "<h1>A <em>b</em></h1><h3>C</h3><p>#d</p>",
    "- a\n- b\n  - c\n\nd": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>",
    "2. a\n\n   b\n3. c": '<ol start="2"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>',
    "> a\nb\n> - c": "<blockquote><p>a<br></br>b</p><ul><li>c</li></ul></blockquote>",
    "a\n\n---\n* * *": "<p>a</p><hr></hr><hr></hr>",
    "```py\nx < 1\n\n  y\n```\nz": '<pre tabindex="0"><code>x &lt; 1\n\n  y</code></pre><p>z</p>',
    "- a\n  ```\n  b\n  ```": '<ul><li>a<pre tabindex="0"><code>b</code></pre></li></ul>',
    "~~~\nnot closed\n```": '<pre tabindex="0"><code>not closed\n```</code></pre>',
    "a | b\n- | -\n`x\\|y` |": '<div class="wide" tabindex="0"><table><thead><tr><th scope="col">a</th>'
    '<th scope="col">b</th></tr></thead><tbody><tr><td><code>x|y</code></td><td></td></tr></tbody></table></div>',
    "[a](https://b.c/d_(e)) <https://f.g>": f"<p>{LINK.format('https://b.c/d_(e)', 'a')} "
    f"{LINK.format('https://f.g/', 'https://f.g')}</p>",
    "See https://a.b/c_d). Or xhttps://e": f"<p>See {LINK.format('https://a.b/c_d', 'https://a.b/c_d')}). "
    "Or xhttps://e</p>",
    # What could run, load or lead elsewhere is text, or a link that waits for a click.
    "<script>a</script><img src=x onerror=b>": "<p>&lt;script&gt;a&lt;/script&gt;&lt;img src=x onerror=b&gt;</p>",
    "[a](javascript:b) [c](data:text/html,d) [e](/f) [g](JaVaScRiPt&#58;h)": "<p>[a](javascript:b) "
    "[c](data:text/html,d) [e](/f) [g](JaVaScRiPt&amp;#58;h)</p>",
    "[a]( java\tscript:b) [c](vbscript:d) <javascript:e>": "<p>[a]( java    script:b) [c](vbscript:d) "
    "&lt;javascript:e&gt;</p>",
    "![a](https://b.c/d.png)": f"<p>{LINK.format('https://b.c/d.png', 'a')}</p>",
    '[a](https://b.c/"onclick="d)': f"<p>{LINK.format('https://b.c/%22onclick=%22d', 'a')}</p>",
    "[a [b](https://c.d) e](https://f.g)": f"<p>{LINK.format('https://f.g/', 'a [b](https://c.d) e')}</p>",
    "": "",
}
TAGS = "p br hr strong em del code pre h1 h2 h3 h4 h5 h6 ul ol li blockquote div table thead tbody tr th td a".split()


@needs_node
def test_markdown():
    trees = run(f"return {json.dumps(list(MARKDOWN))}.map(text => markdown(text));")
    shown = {text: "".join(map(written, tree)) for text, tree in zip(MARKDOWN, trees, strict=True)}
    assert shown == MARKDOWN


@needs_node
def test_markdown_of_anything_is_known_elements_and_takes_no_time():
    """Every beginning of a text is read, as it streams; and marks repeated 5,000 times end soon."""
    everything = "\n\n".join(MARKDOWN)
    marks = [
        "*",
        "_",
        "`",
        "[",
        "![",
        "[a](",
        "<",
        "~~",
        "**a ",
        "*a _b ",
        "- ",
        "> ",
        ">",
        "|",
        "a|\n",
        "\\",
        "\n\n- \n",
        " ",
    ]
    trees = run(
        f"const text = {json.dumps(everything)}, found = [...text].map((_, i) => markdown(text.slice(0, i)));"
        f"return [...found, ...{json.dumps(marks)}.map(mark => markdown(mark.repeat(5000)))];"
    )

    def check(node: Any) -> None:
        if not isinstance(node, str):
            assert node[0] in TAGS
            assert set(node[1]) <= {"href", "target", "rel", "class", "tabindex", "start", "scope"}
            assert node[1].get("href", "https://").startswith(("https://", "http://", "mailto:"))
            for child in node[2]:
                check(child)

    for tree in trees:
        for node in tree:
            check(node)


def streamed(address: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a stream's text, and the answer that the page makes of it, byte by byte."""
    text = post(address, body=body).text
    answer = run(
        f"const reader = new EventReader(), answer = {{ content: '', reasoning: '', calls: [] }};"
        f"for (const byte of {json.dumps(text)}) for (const data of reader.feed(byte))"
        " if (data !== '[DONE]') absorb(answer, JSON.parse(data)); return answer;"
    )
    return text, answer


@needs_node
def test_the_page_reads_the_streams_of_the_server_and_sends_what_it_takes(address: str):
    body = run(f"return requestBody({json.dumps(SUM)}, {{ system: '', temperature: '0', max: '40' }}, 'demo');")
    whole = post(address, body={"messages": SUM}).json()["choices"][0]["message"]["content"]
    _, answer = streamed(address, body)
    assert answer["content"] == whole and answer["reason"] == "stop" and answer["usage"]["completion_tokens"] > 5
    assert "progress" not in answer
    told = [
        {"role": "user", "content": "What is the weather in Lisbon?"},
        {"role": "assistant", "content": "", "reasoning": "", "calls": [
            {"id": "call_1", "name": "get_weather", "arguments": '{"city": "Lisbon"}', "result": "sunny"},
            {"id": "call_2", "name": "get_weather", "arguments": '{"city": "Li'},  # stopped within
        ]},
        {"role": "assistant", "content": "", "reasoning": "hm", "calls": [], "stopped": True},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    settings = {"system": "Be brief.", "tools": json.dumps([WEATHER_TOOL]), "thinking": "off", "max": "8"}
    body = run(f"return requestBody({json.dumps(told)}, {json.dumps(settings)}, 'demo');")
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool", "user"]
    assert len(body["messages"][2]["tool_calls"]) == 1 and body["enable_thinking"] is False
    assert post(address, body={**body, "stream": False, "stream_options": None}).status_code == 200


@needs_node
def test_the_page_puts_pieces_of_calls_together():
    pieces = [
        {"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"x"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}},
    ]
    chunks = [{"choices": [{"delta": {"tool_calls": [piece]}}]} for piece in pieces]
    answer = run(
        f"const answer = {{ content: '', reasoning: '', calls: [] }};"
        f"{json.dumps(chunks)}.forEach(chunk => absorb(answer, chunk)); return answer;"
    )
    assert answer["calls"] == [
        {"id": "a", "name": "f", "arguments": '{"x": 1}'},
        {"id": "b", "name": "g", "arguments": "{}"},
    ]


@needs_node
def test_the_page_says_how_long_a_prompt_takes():
    shown = [(0, 0, None), (500, 400, 31600), (500, 4000, 316000), (20000, 4000, 4000)]
    known = {"total": 40000, "cache": 0}
    progress = [{**known, "processed": p, "time_ms": t, "remaining_ms": r} for p, t, r in shown]
    assert run(f"return {json.dumps(progress)}.map(reading);") == [
        "Reading the prompt: 0 % of 40000 tokens",
        "Reading the prompt: 1 % of 40000 tokens",
        "Reading the prompt: 1 % of 40000 tokens, about 5 min left",
        "Reading the prompt: 50 % of 40000 tokens, about 4 s left",
    ]
