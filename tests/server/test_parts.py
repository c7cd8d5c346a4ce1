"""What a generated text is split into, however the tokens cut it."""

import itertools
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tool_parsers import json_tools, qwen3_coder

from flash_moe_mlx.server.parts import AnswerParser, TextPart, TokenLogprob, ToolCall
from flash_moe_mlx.server.schema import GenerationRequest, Sampling

from ..support.serving import WEATHER_TOOL

ADD_TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
JSON_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n17\n</parameter>\n</function>\n</tool_call>"


def tokenizer(parser: Any = json_tools, thinking: bool = False) -> Any:
    return SimpleNamespace(
        has_thinking=thinking,
        think_start="<think>",
        think_end="</think>",
        has_tool_calling=True,
        tool_call_start="<tool_call>",
        tool_call_end="</tool_call>",
        tool_parser=parser.parse_tool_call,
        rfind_think_start=lambda tokens: max((i for i, t in enumerate(tokens) if t == 1), default=-1),
        rfind_think_end=lambda tokens: max((i for i, t in enumerate(tokens) if t == 2), default=-1),
    )


def request(**changes: Any) -> GenerationRequest:
    settings = {
        "messages": [{}], "prompt": "", "sampling": Sampling(), "max_tokens": None, "stop": (), "top_logprobs": None,
        "stream": False, "include_usage": False, "tools": [WEATHER_TOOL, ADD_TOOL], **changes,
    }  # fmt: skip
    return GenerationRequest(**settings)


def parse(text: str, how: str | int = "letters", prompt: Any = (), **options: Any) -> tuple[Any, list[Any]]:
    """Feed a text in pieces: one letter each, whole, or cut at random."""
    parser = AnswerParser(options.pop("tokenizer", tokenizer()), prompt, request(**options))
    if how == "letters":
        pieces = list(text)
    else:
        r = random.Random(how)
        cuts = (
            sorted({0, len(text), *(r.randrange(len(text) + 1) for _ in range(4))})
            if how != "whole"
            else [0, len(text)]
        )
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    parts = []
    for i, piece in enumerate(pieces):
        parts += parser.feed(piece, TokenLogprob(piece, -1.0), last=i == len(pieces) - 1)
        if parser.stopped:
            break
    return parser, parts


def said(parts: list[Any], channel: str = "content") -> str:
    return "".join(part.text for part in parts if isinstance(part, TextPart) and part.channel == channel)


def calls(parts: list[Any]) -> list[tuple[str, Any]]:
    return [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ToolCall)]


HOW = ["letters", "whole", 1, 2, 3]


@pytest.mark.parametrize("how", HOW)
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
    ],
)
@pytest.mark.parametrize("tools", [None, [WEATHER_TOOL]], ids=["no tools", "tools"])
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str, how: Any, tools: Any):
    parser, parts = parse(text, how, stop=stop, tools=tools)
    assert said(parts) == expected
    assert parser.stopped == (expected != text)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("syntax", "call", "expected"),
    [(json_tools, JSON_CALL, ("get_weather", {"city": "Łódź"})), (qwen3_coder, XML_CALL, ("add", {"a": 17}))],
    ids=["json", "xml"],
)
def test_tool_calls(syntax: Any, call: str, expected: Any, how: Any):
    parser, parts = parse(f"I look.\n\n{call}\n{call}\n", how, tokenizer=tokenizer(syntax))
    assert said(parts) == "I look."
    assert calls(parts) == [expected, expected]
    assert parser.calls == 2 and not parser.stopped
    assert len({part.id for part in parts if isinstance(part, ToolCall)}) == 2


def test_one_call_only():
    parser, parts = parse(JSON_CALL + JSON_CALL, parallel_tool_calls=False)
    assert len(calls(parts)) == 1 and parser.stopped


def test_a_required_call_has_begun_in_the_prompt():
    _, parts = parse(
        JSON_CALL.removeprefix("<tool_call>"), call_required=True, prompt=[1], tokenizer=tokenizer(thinking=True)
    )
    assert calls(parts) == [("get_weather", {"city": "Łódź"})]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("text", ['<tool_call>{"name": </tool_call>', "<tool_call>[]</tool_call>", "x <tool_call>{"])
def test_what_is_no_call_is_text(text: str, how: Any):
    parser, parts = parse(text, how)
    assert said(parts) == text.removesuffix("</tool_call>")
    assert parser.calls == 0


def test_without_tools_a_call_is_text():
    assert said(parse(JSON_CALL, tools=None)[1]) == JSON_CALL
    assert said(parse(JSON_CALL, messages=None, tools=None)[1]) == JSON_CALL


@pytest.mark.parametrize("how", HOW)
def test_thinking(how: Any):
    text = f"stop here is fine</think>\n\nYes. {JSON_CALL}"
    _, parts = parse(text, how, prompt=[1], tokenizer=tokenizer(thinking=True), stop=("here",))
    assert said(parts, "reasoning") == "stop here is fine"
    assert said(parts) == "Yes."
    assert len(calls(parts)) == 1


def logprobs(parts: list[Any]) -> list[str]:
    return [p.text for part in parts if isinstance(part, TextPart) for p in part.logprobs]


@pytest.mark.parametrize("tools", [None, [WEATHER_TOOL]], ids=["no tools", "tools"])
def test_logprobs_are_those_of_the_content(tools: Any):
    assert logprobs(parse("ab  STOP", stop=("STOP",), tools=tools)[1]) == list("ab  ")
    assert logprobs(parse("ab  STO", stop=("STOP",), tools=tools)[1]) == list("ab  STO")
    parts = parse(f"a <to {JSON_CALL}", tools=[WEATHER_TOOL])[1]
    assert "".join(logprobs(parts)) == said(parts) == "a <to"
    _, parts = parse("hm</think>OK", prompt=[1], tokenizer=tokenizer(thinking=True), tools=tools)
    assert logprobs(parts) == ["O", "K"]


def test_logprobs_of_tokens_that_stop_cuts_and_that_have_no_text_yet():
    parser = AnswerParser(tokenizer(), (), request(tools=None, stop=("END",)))
    parts = []
    for text, name in (("", "half a letter"), ("é", "its end"), ("xE", "x and E"), ("", "space"), ("ND", "ND")):
        parts += parser.feed(text, TokenLogprob(name, -1.0))
    assert said(parts) == "éx"
    assert logprobs(parts) == ["half a letter", "its end", "x and E"]
    assert parser.stopped
