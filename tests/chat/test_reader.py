"""Reading answers: each kind of difficulty, with every family's own markers."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe_mlx.chat.answer import BadCall, Part
from flash_moe_mlx.chat.calls import Call
from flash_moe_mlx.chat.reader import AnswerReader

from ..support.chat_models import (
    DEEPSEEK,
    FAMILIES,
    GEMMA,
    GLM,
    GPT_OSS,
    KIMI,
    MINIMAX,
    MISTRAL,
    QWEN3_5,
    QWEN3_CODER,
    QWEN3_NEXT,
    TOOL,
    Family,
    encoded,
    joined,
    make_tokenizer,
    read,
)  # fmt: skip

START = "<|start|>assistant"


def thinking(text: str) -> Part:
    return Part("thinking", text)


def text(text: str) -> Part:
    return Part("text", text)


def call(call_id: str | None = None, /, **arguments: Any) -> Call:
    return Call("write_file", arguments, call_id)


def xml(**arguments: str) -> str:
    return "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items()).join(
        ("<function=write_file>\n", "</function>\n")
    )


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}</tool_call>"


def kimi(body: str, number: int = 0) -> str:
    return f"<|tool_call_begin|>functions.write_file:{number}<|tool_call_argument_begin|>{body}<|tool_call_end|>"


def deepseek(body: str) -> str:
    return f"<｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{body}<｜tool▁call▁end｜>"


def invoke(**arguments: str) -> str:
    parameters = (f'<parameter name="{k}">{v}</parameter>\n' for k, v in arguments.items())
    return f'<invoke name="write_file">\n{"".join(parameters)}</invoke>\n'


def minimax(body: str) -> str:
    return f"<minimax:tool_call>\n{body}</minimax:tool_call>"


PATH = '{"path": "a.txt"}'
PATH_CALL = '{"name": "write_file", "arguments": {"path": "a.txt"}}\n'
CASES: list[tuple[str, Family, str, str, list[Any]]] = [
    # A call that is made in the thinking is a call; a marker that is only spoken of there is thinking.
    ("call in thinking", QWEN3_5, "<think>\n", "I look.\n" + tagged(xml(path="a")), [thinking("I look."), call(path="a")]),
    ("call in thinking", QWEN3_NEXT, "", "<think>\nhm" + tagged(PATH_CALL), [thinking("hm"), call(path="a.txt")]),
    ("call in thinking", GLM, "", "\n<think>hm\n" + tagged("write_file\n"), [thinking("hm"), call()]),
    ("call in thinking", MINIMAX, "<think>\n", "x\n" + minimax(invoke(path="a")), [thinking("x"), call(path="a")]),
    ("call in thinking", DEEPSEEK, "<think>", f"x<｜tool▁calls▁begin｜>{deepseek(PATH)}<｜tool▁calls▁end｜>", [thinking("x"), call(path="a.txt")]),
    ("call in thinking", GEMMA, "", "<|channel>thought\nx<|tool_call>call:write_file{count:1}<tool_call|>", [thinking("x"), call(count=1)]),
    ("call in thinking, then an answer", QWEN3_5, "<think>\n", tagged(xml(path="a")) + "\nhm</think>\n\nDone", [call(path="a"), thinking("hm"), text("Done")]),
    ("spoken of in thinking", QWEN3_5, "<think>\n", "A <tool_call> is due.\n</think>\n\nNo", [thinking("A <tool_call> is due."), text("No")]),
    ("spoken of in thinking", KIMI, "", "Use `<|tool_calls_section_begin|>`.", [text("Use `<|tool_calls_section_begin|>`.")]),
    # The thinking is opened before the answer only.
    ("think tag in the answer", QWEN3_5, "<think>\n", "a</think>\n\nWrite `<think>` and `</think>`.", [thinking("a"), text("Write `<think>` and `</think>`.")]),
    ("think tag in the answer", QWEN3_5, "<think>\n\n</think>\n\n", "<think> is a tag", [text("<think> is a tag")]),
    ("think tag in the answer", QWEN3_NEXT, "", "The tag <think> begins it", [text("The tag <think> begins it")]),
    ("think tag in the answer", GEMMA, "", "Say <|channel>thought to think", [text("Say <|channel>thought to think")]),
    ("think tag in the answer", QWEN3_NEXT, "", "\n<think>\nhm\n</think>\n\nyes", [thinking("hm"), text("yes")]),
    # A call without its opening marker, and several functions in one block.
    ("no opening", QWEN3_5, "<think>\n\n</think>\n\n", xml(path="a") + "</tool_call>", [call(path="a")]),
    ("no opening", QWEN3_CODER, "", "I write.\n" + xml(path="a"), [text("I write."), call(path="a")]),
    ("no opening", QWEN3_CODER, "", xml(path="a") + xml(path="b") + "</tool_call>", [call(path="a"), call(path="b")]),
    ("no opening", MINIMAX, "<think>\n", "</think>\n\n" + invoke(path="a") + "</minimax:tool_call>", [call(path="a")]),
    ("no opening", KIMI, "", kimi(PATH), [call("functions.write_file:0", path="a.txt")]),
    ("no opening", DEEPSEEK, "</think>", "ok" + deepseek(PATH) + "<｜tool▁calls▁end｜>", [text("ok"), call(path="a.txt")]),
    ("no opening, no tool", QWEN3_CODER, "", "Write <function=name>, or <function=f> or", [text("Write <function=name>, or <function=f> or")]),
    ("several", QWEN3_5, "<think>\n\n</think>\n\n", tagged(xml(path="a") + xml(path="b")), [call(path="a"), call(path="b")]),
    ("several", QWEN3_NEXT, "", tagged(PATH_CALL + PATH_CALL), [call(path="a.txt"), call(path="a.txt")]),
    ("several", QWEN3_NEXT, "", tagged(f"[{PATH_CALL}, {PATH_CALL}]"), [call(path="a.txt"), call(path="a.txt")]),
    ("several", QWEN3_NEXT, "", "I\n\n" + tagged(PATH_CALL) + "\n" + tagged(PATH_CALL), [text("I"), call(path="a.txt"), call(path="a.txt")]),
    ("several", MINIMAX, "</think>", minimax(invoke(path="a") + invoke(count="5")), [call(path="a"), call(count=5)]),
    ("several", MISTRAL, "", f"[TOOL_CALLS]write_file[ARGS]{PATH}[TOOL_CALLS]write_file[CALL_ID]abcdefghi[ARGS]{PATH}", [call(path="a.txt"), call("abcdefghi", path="a.txt")]),
    ("several", GEMMA, "", "<|tool_call>call:write_file{count:1}<tool_call|><|tool_call>call:write_file{}<tool_call|>", [call(count=1), call()]),
    # An end marker inside a string is part of it.
    ("end in a string", QWEN3_5, "</think>", tagged(xml(path="a </tool_call> b", content="<tool_call>")), [call(path="a </tool_call> b", content="<tool_call>")]),
    ("end in a string", QWEN3_NEXT, "", tagged(PATH_CALL.replace("a.txt", "</tool_call> \\\" }")), [call(path='</tool_call> " }')]),
    ("end in a string", GLM, "", tagged("write_file\n<arg_key>path</arg_key>\n<arg_value>a </tool_call> </arg_value> b</arg_value>\n"), [call(path="a </tool_call> </arg_value> b")]),
    ("end in a string", KIMI, "", f"<|tool_calls_section_begin|>{kimi(PATH.replace('a.', '<|tool_call_end|><|tool_calls_section_end|>.'))}<|tool_calls_section_end|>", [call("functions.write_file:0", path="<|tool_call_end|><|tool_calls_section_end|>.txt")]),
    ("end in a string", DEEPSEEK, "</think>", "<｜tool▁calls▁begin｜>" + deepseek(PATH.replace("a.", "<｜tool▁call▁end｜>.")) + "<｜tool▁calls▁end｜>", [call(path="<｜tool▁call▁end｜>.txt")]),
    ("end in a string", MISTRAL, "", '[TOOL_CALLS][{"name": "write_file", "arguments": {"path": "[TOOL_CALLS]]"}}]', [call(path="[TOOL_CALLS]]")]),
    ("end in a string", MINIMAX, "</think>", minimax(invoke(path="a</minimax:tool_call>")), [call(path="a</minimax:tool_call>")]),
    ("end in a string", GEMMA, "", '<|tool_call>call:write_file{path:<|"|>a<tool_call|>, {<|"|>,lines:[<|"|>x<|"|>,{k:true}]}<tool_call|>', [call(path="a<tool_call|>, {", lines=["x", {"k": True}])]),
    ("end in a string", GPT_OSS, START, '<|channel|>commentary to=functions.write_file <|constrain|>json<|message|>{"path": "<|call|><|end|>"}<|call|>', [call(path="<|call|><|end|>")]),
    # Channels.
    ("channels", GPT_OSS, START, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi", [thinking("hm"), text("Hi")]),
    ("channels", GPT_OSS, START, f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.write_file<|channel|>commentary json<|message|>{PATH}<|call|>", [thinking("hm"), call(path="a.txt")]),
    ("channels", GPT_OSS, START, "<|channel|>commentary<|message|>I write.<|end|><|start|>assistant<|channel|>commentary to=functions.write_file<|message|>{}<|call|>", [text("I write."), call()]),
    ("channels", GPT_OSS, START + "<|channel|>final<|message|>", "Hi", [text("Hi")]),
    ("channels", GPT_OSS, START, "Hi <|channel|>final<|message|>you", [text("Hi you")]),
    ("channels", GPT_OSS, START, " to=functions.write_file<|channel|>commentary <|constrain|>json<|message|>{}", [call()]),
    # The answer's end stands for a call's end where nothing is missing but that.
    ("no end", QWEN3_NEXT, "", "<tool_call>\n" + PATH_CALL, [call(path="a.txt")]),
    ("no end", QWEN3_5, "</think>", "<tool_call>\n" + xml(path="a"), [call(path="a")]),
    ("no end", GLM, "", "<tool_call>write_file\n<arg_key>path</arg_key><arg_value>a</arg_value>", [call(path="a")]),
    ("no end", KIMI, "", "<|tool_calls_section_begin|>" + kimi(PATH), [call("functions.write_file:0", path="a.txt")]),
    # Older forms.
    ("fenced", DEEPSEEK, "</think>", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>write_file\n```json\n" + PATH + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [call(path="a.txt")]),
    ("json", GLM, "", tagged(PATH_CALL), [call(path="a.txt")]),
    ("json", QWEN3_5, "</think>", tagged(PATH_CALL), [call(path="a.txt")]),
    ("json in a text", QWEN3_NEXT, "", tagged('{"name": "write_file", "arguments": "{\\"count\\": 3}"}'), [call(count=3)]),
    ("parameters", QWEN3_NEXT, "", tagged('{"type": "function", "function": {"name": "write_file", "parameters": {"count": "3"}}}'), [call(count=3)]),
    ("functions. before a name", QWEN3_NEXT, "", tagged('{"name": "functions.write_file"}'), [call()]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "prompt", "said", "expected"),
    [case[1:] for case in CASES],
    ids=[f"{case[0]}-{case[1].name}-{i}" for i, case in enumerate(CASES)],
)
def test_answers(family: Family, prompt: str, said: str, expected: list[Any]):
    assert read(family.tokenizer, said, prompt) == expected
    assert joined(take_apart(family, said, prompt, len(said))) == expected


def take_apart(family: Family, said: str, prompt: str, seed: int) -> list[Any]:
    """Feed an answer whose plain text comes in pieces of several characters, as real vocabularies have them."""
    tokenizer = family.tokenizer
    reader = AnswerReader(tokenizer, encoded(tokenizer, prompt), [TOOL])
    pieces: list[Any] = []
    for run in re.split("([\ud800-\udbff])", reader._symbols.of(said)):
        width = len(run) if re.match("[\ud800-\udbff]", run) else 1 + seed % 7
        for i in range(0, len(run), width):
            reader._words.take(run[i : i + width])
            pieces += reader._words.pieces()
    reader._words.finish(cut=False)
    return pieces + reader._words.pieces()


BAD = [
    (QWEN3_NEXT, tagged('{"name": "write file!", "arguments": {}}'), "name"),
    (QWEN3_NEXT, tagged('{"name": "functions/write_file", "arguments": {}}'), "name"),
    (QWEN3_NEXT, tagged('{"name": "", "arguments": {}}'), "name"),
    (QWEN3_NEXT, tagged('{"name": "write_file", "arguments": "a.txt"}'), "JSON"),
    (QWEN3_NEXT, tagged('{"name": "write_file", "arguments": ["a.txt"]}'), "object"),
    (QWEN3_NEXT, tagged('{"name": "write_file", "arguments": {"a": NaN}}'), "JSON"),
    (QWEN3_NEXT, tagged("{not json}"), "JSON"),
    (QWEN3_NEXT, tagged("[]"), "name"),
    (QWEN3_NEXT, tagged("3"), "name"),
    (QWEN3_NEXT, tagged("[" * 1500), "JSON"),
    (QWEN3_NEXT, '<tool_call>{"name": "write_file", "argu', "end"),
    (QWEN3_5, tagged("<function=write file>\n</function>\n"), "name"),
    (QWEN3_5, tagged("<function=write_file>\nfree text\n</function>\n"), "parameters"),
    (GLM, tagged("a/b\n"), "name"),
    (KIMI, f"<|tool_calls_section_begin|>{kimi('[]')}<|tool_calls_section_end|>", "object"),
    (MISTRAL, '[TOOL_CALLS][{"name": "a b"}]', "name"),
    (MINIMAX, minimax('<invoke name="a b">\n</invoke>\n'), "name"),
    (GEMMA, "<|tool_call>call:f{a:1 b:2}<tool_call|>", "JSON|commas|keys|end"),
    (GPT_OSS, "<|channel|>commentary to=functions.write_file<|message|>{oops}<|call|>", "JSON"),
]


@pytest.mark.parametrize(("family", "said", "reason"), BAD, ids=[f"{f.name}-{i}" for i, (f, _, _) in enumerate(BAD)])
def test_what_is_no_call_is_told_as_it_stands(family: Family, said: str, reason: str):
    prompt = START if family is GPT_OSS else "</think>" if "</think>" in family.markers else ""
    pieces = read(family.tokenizer, said, prompt)
    bad = next((piece for piece in pieces if isinstance(piece, BadCall)), None)
    if bad is None:
        assert family is GEMMA and isinstance(pieces[0], Call)
        return
    assert re.search(reason, bad.reason)
    assert not any(isinstance(piece, Call) for piece in pieces)
    if family is not GPT_OSS:
        assert "".join(piece.text for piece in pieces) == said


def test_a_good_call_after_a_bad_one():
    said = tagged(PATH_CALL.replace('txt"', "txt")) + "\n" + tagged(PATH_CALL)
    bad, good = read(QWEN3_NEXT.tokenizer, said)
    assert isinstance(bad, BadCall) and good == call(path="a.txt")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_without_tools_a_call_is_text(family: Family):
    if family is GPT_OSS:
        return
    opening = next(m for m in family.markers if m in ("<tool_call>", "<|tool_calls_section_begin|>", "[TOOL_CALLS]",
                   "<｜tool▁calls▁begin｜>", "<minimax:tool_call>", "<|tool_call>"))  # fmt: skip
    assert read(family.tokenizer, f"x {opening} y", tools=()) == [text(f"x {opening} y")]


CUT = [
    (GLM, "<tool_call>write_file\n<arg_key>path</arg_key>\n<arg_value>a.txt</arg_value>\n<arg_key>content</arg_key>\n<arg_value>first half of the fi"),
    (GLM, "<tool_call>write_fi"), (GLM, "<tool_call>write_file\n<arg_key>path</arg_key>\n<arg_value>a.txt</arg_value>\n"),
    (QWEN3_CODER, "<tool_call>\n<function=write_file>\n<parameter=path>\na.txt\n</parameter>\n"),
    (QWEN3_CODER, "<function=write_file>\n<parameter=path>\na.txt"), (QWEN3_NEXT, "<tool_call>\n" + PATH_CALL[:-3]),
    (KIMI, "<|tool_calls_section_begin|>" + kimi(PATH)[:-20]), (MISTRAL, '[TOOL_CALLS][{"name": "write_file"'),
    (MISTRAL, '[TOOL_CALLS]write_file[ARGS]{"path": "a'), (MINIMAX, minimax(invoke(path="a"))[:-30]),
    (GEMMA, '<|tool_call>call:write_file{path:<|"|>a<|"|>'),
    (GPT_OSS, "<|channel|>commentary to=functions.write_file<|message|>{\"path\": \"a"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "said"), CUT, ids=[f"{f.name}-{i}" for i, (f, _) in enumerate(CUT)])
def test_a_call_that_was_cut_is_text(family: Family, said: str):
    prompt = START if family is GPT_OSS else ""
    pieces = read(family.tokenizer, said, prompt, reason="length")
    assert all(isinstance(piece, Part) for piece in pieces)
    if family is not GPT_OSS:
        assert "".join(piece.text for piece in pieces) == said


def test_a_marker_counts_as_its_own_token_only():
    """The letters of a marker are text, in thinking, answers and arguments."""
    tokenizer = QWEN3_5.tokenizer

    def letters(text: str) -> list[int]:
        return [token for letter in text for token in encoded(tokenizer, letter)]

    said = [*letters("a </think> b"), *encoded(tokenizer, "</think>"), *letters("<tool_call> <think>"),
            *encoded(tokenizer, "<tool_call>"), *letters("\n" + xml(path="</tool_call>")),
            *encoded(tokenizer, "</tool_call>")]  # fmt: skip
    assert read(tokenizer, said, "<think>\n") == [
        thinking("a </think> b"), text("<tool_call> <think>"), call(path="</tool_call>"),
    ]  # fmt: skip


def test_a_marker_that_the_vocabulary_lacks_is_its_text():
    tokenizer = make_tokenizer(QWEN3_CODER.template, ("<|im_start|>",), "<|im_end|>")
    assert read(tokenizer, "ok\n" + tagged(xml(path="</tool_call>")) + "\nDone <tool") == [
        text("ok"), call(path="</tool_call>"), text("Done <tool"),
    ]  # fmt: skip


def test_text_is_not_held_longer_than_it_may_be_a_marker():
    reader = AnswerReader(QWEN3_CODER.tokenizer, (), [TOOL])
    shown = ["".join(p.text for p in reader.feed(t)) for t in encoded(QWEN3_CODER.tokenizer, "a <b <fu <fx")]
    assert shown == ["a", "", "", " <b", "", "", "", "", " <fu", "", "", " <fx"]


def test_openings_without_end_take_bounded_time():
    pieces = read(QWEN3_NEXT.tokenizer, '<tool_call>{"a' * 3000)
    assert "".join(piece.text for piece in pieces) == '<tool_call>{"a' * 3000


@settings(deadline=None)
@given(st.data())
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_nothing_that_a_model_says_raises(family: Family, data: st.DataObject):
    words = [*family.markers, *'{}[]":,\n', "write_file", '{"name": "write_file"', '"arguments": {', "<function=write_file>", "call:f{",
             "<parameter=path>\n", "\n</parameter>", "</function>", '<invoke name="write_file">', "</invoke>", "to=functions.f",
             "functions.write_file:0", "```json\n", "x", " ", "é"]  # fmt: skip
    said = "".join(data.draw(st.lists(st.sampled_from(words), max_size=25)))
    for reason in ("stop", "length"):
        pieces = read(family.tokenizer, said, START if family is GPT_OSS else "", reason=reason)
        if family is not GPT_OSS and not any(isinstance(piece, Call) for piece in pieces):
            kept = "".join(piece.text for piece in pieces)
            for marker in ("<think>", "</think>", "<|channel>", "<channel|>", "thought"):
                kept, said = kept.replace(marker, ""), said.replace(marker, "")
            assert re.sub(r"\s", "", kept) == re.sub(r"\s", "", said)


def test_half_a_surrogate_pair_is_no_marker():
    body = '{"name": "write_file", "arguments": {"path": "\\ud800\\ud83d\\ud83d\\ude00 \\\\ud83d"}}'
    assert read(QWEN3_NEXT.tokenizer, tagged(body)) == [call(path="\ufffd\ufffd😀 \\ud83d")]
