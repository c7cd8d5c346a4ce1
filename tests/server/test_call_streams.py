"""Calls that stream piece by piece, in each API's events, by the official clients: the pieces are the whole call."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from ..support.chat_models import GLM, GPT_OSS, QWEN3_CODER, QWEN3_NEXT
from ..support.scripted import Script, scripted
from ..support.serving import client

pytestmark = pytest.mark.xdist_group("clients")  # they share one model

PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}, "count": {"type": "integer"}}}
FUNCTION: Any = {"type": "function", "name": "write_file", "description": "Write.", "parameters": PARAMETERS}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "write_file", "parameters": PARAMETERS}}
MESSAGES_TOOL: Any = {"name": "write_file", "input_schema": PARAMETERS}
ASK: Any = [{"role": "user", "content": "Write a file."}]
PATH = 'a "b" \\ and é 😀'
ARGUMENTS = {"path": PATH, "count": 3}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
ESCAPED = json.dumps(ARGUMENTS)
JSON_CALL = f'I write.\n<tool_call>\n{{"name": "write_file", "arguments": {ESCAPED}}}\n</tool_call>'
FAMILIES = {
    "json": (QWEN3_NEXT, JSON_CALL),
    "xml": (QWEN3_CODER, "I write.\n<tool_call>\n<function=write_file>\n<parameter=path>\n" + PATH + "\n</parameter>\n"
            "<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>"),
    "glm": (GLM, f"I write.\n<tool_call>write_file\n<arg_key>path</arg_key>\n<arg_value>{PATH}</arg_value>\n"
            "<arg_key>count</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"),
    "gpt-oss": (GPT_OSS, "<|channel|>commentary to=functions.write_file <|constrain|>json<|message|>"
                f"{ESCAPED}<|call|>"),
}  # fmt: skip
HALF = JSON_CALL[: JSON_CALL.index(" and ")]


@pytest.fixture(scope="module")
def serve() -> Iterator[tuple[Any, Script]]:
    with pytest.MonkeyPatch.context() as patch, scripted(patch) as serving:
        yield serving


@pytest.mark.parametrize("form", ["json", "xml"])
def test_chat_completions(serve: Any, form: str):
    """Two calls in one answer."""
    start, script = serve
    family, said = FAMILIES[form]
    script.play(family.tokenizer, said + said.removeprefix("I write.\n"))
    with start(family.tokenizer) as address:
        chunks = client(address).chat.completions.create(model="demo", messages=ASK, tools=[CHAT_TOOL], stream=True)
        choices = [chunk.choices[0] for chunk in chunks]
        pieces = [piece for choice in choices for piece in choice.delta.tool_calls or []]
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
        for index in (0, 1):
            begun, *deltas = [piece for piece in pieces if piece.index == index]
            assert begun.id and (begun.function.name, begun.function.arguments) == ("write_file", "")
            assert {(delta.id, delta.function.name) for delta in deltas} == {(None, None)}
            assert len(deltas) > 3 and "".join(delta.function.arguments for delta in deltas) == TEXT


@pytest.mark.parametrize("form", ["json", "glm", "gpt-oss"])
def test_every_api(serve: Any, form: str):
    start, script = serve
    family, said = FAMILIES[form]
    script.play(family.tokenizer, said, said, said)
    with start(family.tokenizer) as address:
        chunks = client(address).chat.completions.create(model="demo", messages=ASK, tools=[CHAT_TOOL], stream=True)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert len(calls) > 5 and "".join(call.function.arguments for call in calls) == TEXT

        with client(address).responses.stream(model="demo", input="Write.", tools=[FUNCTION]) as stream:
            events = list(stream)
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert len(deltas) > 3 and "".join(deltas) == done.arguments == TEXT
        (item,) = [item for item in events[-1].response.output if item.type == "function_call"]
        assert (item.arguments, item.status, item.name) == (TEXT, "completed", "write_file")

        api = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=120)
        with api.messages.stream(model="demo", max_tokens=500, messages=ASK, tools=[MESSAGES_TOOL]) as messages:
            told = list(messages)
            final = messages.get_final_message()
        deltas = [event.partial_json for event in told if event.type == "input_json"]
        assert len(deltas) > 3 and "".join(deltas) == TEXT
        assert final.content[-1].input == ARGUMENTS and final.stop_reason == "tool_use"


def test_a_call_that_is_cut_or_none_is_said_to_be_unfinished(serve: Any):
    start, script = serve
    size = len(QWEN3_NEXT.tokenizer.encode(HALF, add_special_tokens=False))
    with start(QWEN3_NEXT.tokenizer) as address:
        script.play(QWEN3_NEXT.tokenizer, HALF, end=False)
        options: Any = {"input": "Write.", "tools": [FUNCTION], "max_output_tokens": size}
        with client(address).responses.stream(model="demo", **options) as stream:
            response = list(stream)[-1].response
        (item,) = [item for item in response.output if item.type == "function_call"]
        assert (response.status, item.status) == ("incomplete", "incomplete")
        assert TEXT.startswith(item.arguments) and len(item.arguments) > 5

        script.play(QWEN3_NEXT.tokenizer, JSON_CALL.replace('"count"', "count"))
        chunks = client(address).chat.completions.create(model="demo", messages=ASK, tools=[CHAT_TOOL], stream=True)
        choices = [chunk.choices[0] for chunk in chunks]
        content = "".join(choice.delta.content or "" for choice in choices)
        assert "[This is no call that can be run: " in content and choices[-1].finish_reason == "tool_calls"
        script.play(QWEN3_NEXT.tokenizer, JSON_CALL.replace('"count"', "count"))
        whole = client(address).chat.completions.create(model="demo", messages=ASK, tools=[CHAT_TOOL])
        assert whole.choices[0].message.content == content and not whole.choices[0].message.tool_calls
