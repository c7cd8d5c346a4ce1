"""Chat templates: rendered as transformers does, and within bounded time and memory whatever they hold."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from flash_moe_mlx import RequestError, chat_prompt
from flash_moe_mlx.chat import template as module
from flash_moe_mlx.chat.template import TemplateFailure, render_templates

USER = [{"role": "user", "content": "hi"}]
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": [1, None, "é"]}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
TALK = [
    {"role": "system", "content": "Be brief. \ud83d"}, *USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "tool_call_id": "1", "content": None}, *USER,
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(files("flash_moe_mlx") / "demo")


@pytest.fixture
def with_template(tokenizer: Any) -> Iterator[Any]:
    kept = tokenizer._tokenizer.chat_template

    def give(template: str) -> Any:
        tokenizer._tokenizer.chat_template = template
        return tokenizer

    yield give
    tokenizer._tokenizer.chat_template = kept


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m | tojson }}\n{% endfor %}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }} {{ tools | tojson(indent=2) }} {{ documents }}",
        "{% generation %}{{ messages[2].thinking }}{{ messages[2].reasoning_content }}{% endgeneration %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}"
        "{{ ns.n }} {{ dict(a=1) }} {{ enable_thinking }} {{ other is defined }} {{ add_generation_prompt }}",
        "{{ messages[3].content is defined }} {{ strftime_now('%Y') }} {{ 'a' * 3 }} {{ 2 ** 10 }} {{ 3 * [1] }}",
    ],
)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_text_is_that_of_transformers(with_template: Any, tokenizer: Any, template: str | None, tools: Any):
    tokenizer = with_template(template or tokenizer._tokenizer.chat_template)
    expected = tokenizer.apply_chat_template(
        TALK, tokenize=False, tools=tools, add_generation_prompt=True, enable_thinking=False
    )
    assert render_templates(tokenizer, [TALK], generate=[True], tools=tools, enable_thinking=False) == [expected]


RAISING = {
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a division": "{{ 1 / 0 }}",
    "a type": "{{ 'a' + 1 }}",
    "a comparison": "{{ [1, 'a'] | sort }}",
    "an item": "{{ messages[7].content.text }}",
    "its own words": "{{ raise_exception('Say it in verse') }}",
    "a syntax": "{% for",
    "a filter": "{{ 'a' | no_such_filter }}",
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a wide text": "{{ 'a'.ljust(10 ** 10) }}",
    "a long text": "{{ 'abcdefgh' * 2097152 }}!{{ 'b' * 9 }}",
    "Python's insides": "{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__['x'].y }}",
    "a changed message": "{{ messages.append(1) }}",
    "a namespace": "{{ namespace(__class__=1) }}",
}


@pytest.mark.parametrize("template", RAISING.values(), ids=RAISING)
def test_whatever_a_template_raises_is_a_request_error(with_template: Any, template: str):
    tokenizer = with_template(template)
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"\[messages\]"):
        chat_prompt(tokenizer, USER)
    assert time.monotonic() - started < module.RENDER_SECONDS / 2
    (text,) = render_templates(with_template("{{ messages[0].content }}"), [USER], generate=[True])
    assert text == "hi", "the next template suffers from it"


ENDLESS = {
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one step that nothing interrupts": "{{ lipsum(n=10000000) }}",
    "growing text": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_end_is_ended(with_template: Any, template: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "RENDER_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(RequestError):
        chat_prompt(with_template(template), USER)
    assert time.monotonic() - started < 30  # the process that renders starts anew
    monkeypatch.undo()
    assert render_templates(with_template("a"), [USER], generate=[True]) == ["a"]


def test_memory_is_bounded(with_template: Any):
    child = module._process._started()
    with pytest.raises(RequestError):
        chat_prompt(with_template(ENDLESS["growing text"]), USER)
    if child.poll() is not None or not os.path.exists(f"/proc/{child.pid}/status"):
        pytest.skip("the process has ended, or this system doesn't tell its peak")
    with open(f"/proc/{child.pid}/status") as status:
        peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    assert peak < 512 << 20


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": {(1, 2): 3}}], [{"role": "user", "content": object()}]]
)
def test_messages_that_are_no_json(tokenizer: Any, messages: Any):
    (text,) = render_templates(tokenizer, [messages], generate=[True])
    assert isinstance(text, str | TemplateFailure)


def test_messages_that_are_nested_too_deeply(tokenizer: Any):
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": deep}}}
    with pytest.raises(RequestError, match="deeply"):
        chat_prompt(tokenizer, [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_an_interrupt_leaves_it_usable(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    """The process's reply to an abandoned request must not answer a later one."""
    exchange = module._Process._exchange

    def interrupted(self: Any, *arguments: Any) -> Any:
        exchange(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Process, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat_prompt(tokenizer, USER)
    monkeypatch.undo()
    assert chat_prompt(tokenizer, USER) == chat_prompt(tokenizer, USER)


def test_a_process_that_was_killed_is_started_again(tokenizer: Any):
    expected = chat_prompt(tokenizer, USER)
    child: subprocess.Popen[bytes] = module._process._started()
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(RequestError, match="memory"):
        chat_prompt(tokenizer, USER)
    assert chat_prompt(tokenizer, USER) == expected
