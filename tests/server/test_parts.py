"""Parts of a generated answer for clients: stop strings, calls, log-probabilities."""

import json
from typing import Any

import pytest

from flash_moe_mlx.server.parts import (
    AnswerParser,
    Progress,
    TextPart,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from flash_moe_mlx.server.schema import GenerationRequest, Sampling

from ..support.chat_models import QWEN3_5, QWEN3_CODER, QWEN3_NEXT, encoded
from ..support.serving import WEATHER_TOOL

ADD_TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
JSON_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n17\n</parameter>\n</function>\n</tool_call>"
THINK = "<think>\n"


def request(**changes: Any) -> GenerationRequest:
    settings = {
        "messages": [{}], "prompt": "", "sampling": Sampling(), "max_tokens": None, "stop": (), "top_logprobs": None,
        "stream": False, "include_usage": False, "tools": [WEATHER_TOOL, ADD_TOOL], **changes,
    }  # fmt: skip
    return GenerationRequest(**settings)


def parse(text: str, prompt: str = "", family: Any = QWEN3_NEXT, **options: Any) -> tuple[Any, list[Any]]:
    """Feed an answer token by token."""
    tokenizer = family.tokenizer
    parser = AnswerParser(tokenizer, encoded(tokenizer, prompt), request(**options))
    parts = []
    for token in [*encoded(tokenizer, text), tokenizer.eos_token_id]:
        last = token == tokenizer.eos_token_id
        pieces = parser.read(token, "stop" if last else None)
        parts += parser.feed(pieces, None if last else TokenLogprob(parser.text, -1.0), last=last)
        if parser.stopped:
            break
    return parser, parts


def said(parts: list[Any], channel: str = "content") -> str:
    return "".join(part.text for part in parts if isinstance(part, TextPart) and part.channel == channel)


def calls(parts: list[Any]) -> list[tuple[str, Any]]:
    return [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ToolCall)]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "wo t"), "one t"),
        ("aab", ("ab",), "a"),
        ("aaab", ("aab",), "a"),
        ("one tw", ("two",), "one tw"),
        ("one two", (), "one two"),
        ("  ends with space \n", ("x",), "  ends with space \n"),
        ("one <think> two", ("k> t",), "one <thin"),
        ("ein Fuß", tuple(f"no {i}" for i in range(500)), "ein Fuß"),
    ],
)
@pytest.mark.parametrize("tools", [None, [WEATHER_TOOL]], ids=["no tools", "tools"])
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str, tools: Any):
    parser, parts = parse(text, stop=stop, tools=tools)
    assert said(parts) == expected
    assert parser.stopped == (expected != text)


@pytest.mark.parametrize(
    ("family", "call", "expected"),
    [(QWEN3_NEXT, JSON_CALL, ("get_weather", {"city": "Łódź"})), (QWEN3_CODER, XML_CALL, ("add", {"a": 17}))],
    ids=["json", "xml"],
)
def test_tool_calls(family: Any, call: str, expected: Any):
    parser, parts = parse(f"I look.\n\n{call}\n{call}\n", family=family)
    assert said(parts).rstrip("\n") == "I look."
    assert calls(parts) == [expected, expected]
    assert parser.calls == 2 and not parser.stopped
    assert len({part.id for part in parts if isinstance(part, ToolCall)}) == 2


def test_one_call_only():
    parser, parts = parse(JSON_CALL + JSON_CALL, parallel_tool_calls=False)
    assert len(calls(parts)) == 1 and parser.stopped


def test_a_required_call_has_begun_in_the_prompt():
    _, parts = parse(JSON_CALL.removeprefix("<tool_call>"), "<tool_call>", call_required=True)
    assert calls(parts) == [("get_weather", {"city": "Łódź"})]
    prompt = "<think>\n\n</think>\n\n<tool_call>"
    _, parts = parse(XML_CALL.removeprefix("<tool_call>"), prompt, QWEN3_5, call_required=True)
    assert calls(parts) == [("add", {"a": 17})]


@pytest.mark.parametrize("text", ['<tool_call>{"name": </tool_call>', "<tool_call>[]</tool_call>", "x <tool_call>{"])
def test_what_is_no_call_is_text_with_a_note(text: str):
    parser, parts = parse(text)
    assert said(parts).startswith(text + "\n[This is no call that can be run: ")
    assert parser.calls == 0


def test_without_tools_a_call_is_text():
    assert said(parse(JSON_CALL, tools=None)[1]) == JSON_CALL
    assert said(parse(JSON_CALL, messages=None, tools=None)[1]) == JSON_CALL


def test_thinking():
    _, parts = parse(f"stop here is fine</think>\n\nYes. {JSON_CALL}", THINK, QWEN3_5, stop=("here",))
    assert said(parts, "reasoning") == "stop here is fine"
    assert said(parts) == "Yes."
    assert len(calls(parts)) == 1


def logprobs(parts: list[Any]) -> list[str]:
    return [p.text for part in parts if isinstance(part, TextPart) for p in part.logprobs]


@pytest.mark.parametrize("tools", [None, [WEATHER_TOOL]], ids=["no tools", "tools"])
def test_logprobs_are_those_of_the_content(tools: Any):
    assert logprobs(parse("ab  STOP", stop=("STOP",), tools=tools)[1]) == list("ab  ")
    assert logprobs(parse("ab  STO", stop=("STOP",), tools=tools)[1]) == list("ab  STO")
    assert logprobs(parse("a </think> b", tools=tools)[1]) == ["a", " ", "</think>", " ", "b"]
    parts = parse(f"a <to {JSON_CALL}", tools=[WEATHER_TOOL])[1]
    assert "".join(logprobs(parts)) == said(parts) == "a <to"
    _, parts = parse("hm</think>OK", THINK, QWEN3_5, tools=tools)
    assert logprobs(parts) == ["O", "K"]


@pytest.mark.parametrize("messages", [None, [{}]], ids=["completion", "chat"])
def test_logprobs_of_half_letters(messages: Any):
    _, parts = parse("aé😀b", tools=None, messages=messages)
    assert logprobs(parts) == ["a", "", "é", "", "", "", "😀", "b"]
    assert said(parts) == "aé😀b"


def test_logprobs_of_tokens_that_stop_cuts():
    parser, parts = parse("éxEND", tools=None, stop=("END",))
    assert said(parts) == "éx" and logprobs(parts) == ["", "é", "x"]
    assert parser.stopped


def test_the_rest_of_a_prompt_takes_as_long_as_what_was_computed():
    """What the prefix cache had took no time."""
    assert Progress(total=1000, processed=600, cached=600, seconds=0.1).remaining_seconds is None
    assert Progress(total=1000, processed=700, cached=600, seconds=2.0).remaining_seconds == 6.0
    assert Progress(total=1000, processed=1000, cached=600, seconds=8.0).remaining_seconds == 0.0


def test_a_stream_ends_a_cut_call_unfinished_before_another_one():
    """The words of a cut call are read again; another call in them is not the one that was begun."""
    cut = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo <function=get_weather></function> and"
    tokenizer = QWEN3_CODER.tokenizer
    parser = AnswerParser(tokenizer, (), request(stream=True))
    tokens, parts = encoded(tokenizer, cut), []
    for i, token in enumerate(tokens):
        last = i == len(tokens) - 1
        parts += parser.feed(parser.read(token, "length" if last else None), last=last)
    sent = "".join(part.arguments for part in parts if isinstance(part, ToolCallDelta))
    start, end, other = (part for part in parts if not isinstance(part, ToolCallDelta))
    assert isinstance(start, ToolCallStart) and isinstance(end, ToolCallEnd) and isinstance(other, ToolCall)
    assert (end.whole, end.call.arguments, end.call.id) == (False, sent, start.id)
    assert sent.startswith('{"city": "Oslo ') and (other.arguments, other.id != start.id) == ("{}", True)
