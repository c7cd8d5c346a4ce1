"""Structured output by the official client: schemas, grammars, required and strict tools; and what is refused."""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from benchmarks.schemas import check_formats, schemas

from ..support.serving import STORY, WEATHER, WEATHER_TOOL, client, demo

pytestmark = pytest.mark.xdist_group("server")

FOX = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}, "age": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["animal", "age"],
    "additionalProperties": False,
}


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


@pytest.fixture(scope="module")
def api() -> Iterator[openai.OpenAI]:
    with demo(max_context=2048) as address:
        yield client(address)


def ask(api: openai.OpenAI, **how: Any) -> Any:
    how = {"messages": STORY, "temperature": 1, "seed": 3, **how}
    return api.chat.completions.create(model="demo", **how).choices[0]


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_obeys_its_schema(api: openai.OpenAI, seed: int):
    choice = ask(api, response_format=schema_format(FOX), seed=seed)
    check_formats(json.loads(choice.message.content), FOX)
    assert choice.finish_reason == "stop"


def test_a_streamed_answer_obeys_its_schema(api: openai.OpenAI):
    name, schema = schemas(9, seed=40)[0]
    chunks = list(
        api.chat.completions.create(
            model="demo", messages=STORY, temperature=1, seed=1, stream=True, response_format=schema_format(schema)
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    check_formats(json.loads(text), schema)
    assert chunks[-1].choices[0].finish_reason == "stop", name


def test_a_json_object(api: openai.OpenAI):
    choice = ask(api, response_format={"type": "json_object"}, max_tokens=400)
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.startswith("{")


def test_a_cut_answer_says_length(api: openai.OpenAI):
    assert ask(api, response_format=schema_format(FOX), max_tokens=3).finish_reason == "length"


def test_grammars_of_chats_and_completions(api: openai.OpenAI):
    yes_no = {"grammar": {"syntax": "regex", "definition": "(yes|no)"}}
    assert ask(api, extra_body=yes_no).message.content in ("yes", "no")
    lark = {"grammar": {"syntax": "lark", "definition": 'start: "a" ("b" | "c") "d"'}}
    completion = api.completions.create(model="demo", prompt="Once", temperature=1, seed=2, extra_body=lark)
    assert re.fullmatch("a(b|c)d", completion.choices[0].text)


def test_a_required_call_obeys_its_schema(api: openai.OpenAI):
    plan = tool("plan_trip", FOX)
    for seed in range(3):
        choice = ask(api, messages=WEATHER, tools=[plan], tool_choice="required", parallel_tool_calls=False, seed=seed)
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and call.function.name == "plan_trip"
        check_formats(json.loads(call.function.arguments), FOX)


def test_a_named_call_is_of_that_tool(api: openai.OpenAI):
    named = {"type": "function", "function": {"name": "plan_trip"}}
    how: dict[str, Any] = {"tools": [WEATHER_TOOL, tool("plan_trip", FOX)], "tool_choice": named}
    choice = ask(api, messages=WEATHER, parallel_tool_calls=False, **how)
    assert [call.function.name for call in choice.message.tool_calls] == ["plan_trip"]


def test_a_strict_tool_that_may_be_called_obeys_its_schema(api: openai.OpenAI):
    city = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},  # the model would say Lisbon
        "required": ["city"],
        "additionalProperties": False,
    }
    choice = ask(
        api, messages=WEATHER, temperature=0, tools=[tool("get_weather", city, description="Weather.", strict=True)]
    )
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_an_answer_with_a_schema_may_be_a_call(api: openai.OpenAI):
    choice = ask(api, messages=WEATHER, temperature=0, tools=[WEATHER_TOOL], response_format=schema_format(FOX))
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    choice = ask(api, temperature=0, response_format=schema_format(FOX), tools=[WEATHER_TOOL], tool_choice="none")
    check_formats(json.loads(choice.message.content), FOX)


def test_a_required_tool_that_is_not_strict_may_have_a_schema_that_llguidance_does_not_know(api: openai.OpenAI):
    odd = tool("odd", {"type": "object", "properties": {"n": {"not": {}}}})
    how: dict[str, Any] = {"messages": WEATHER, "tool_choice": "required", "parallel_tool_calls": False}
    choice = ask(api, tools=[odd], max_tokens=60, **how)
    assert choice.finish_reason in ("tool_calls", "length")
    odd["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys"):
        ask(api, tools=[odd], **how)


@pytest.mark.parametrize(
    ("how", "said", "param"),
    [
        ({"response_format": schema_format({"type": "foo"})}, "Invalid type: foo", "response_format"),
        ({"response_format": schema_format(3)}, "must be a JSON schema", "response_format"),
        ({"response_format": schema_format({"enum": ["x" * 70_000]})}, "at most 65536 bytes", "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "must have a schema", "response_format"),
        ({"response_format": {"type": "xml"}}, "must be text, json_object or json_schema", "response_format"),
        ({"response_format": {"type": ["text"]}}, "must be text, json_object or json_schema", "response_format"),
        ({"extra_body": {"response_format": "json"}}, "must be an object", "response_format"),
        ({"extra_body": {"grammar": {"syntax": "gbnf"}}}, "must be lark or regex", "grammar"),
        ({"extra_body": {"grammar": {"syntax": ["lark"]}}}, "must be lark or regex", "grammar"),
        ({"extra_body": {"grammar": {"syntax": "regex"}}}, "must be text", "grammar"),
        ({"extra_body": {"grammar": {"syntax": "regex", "definition": "(a"}}}, "unclosed group", "grammar"),
        ({"extra_body": {"grammar": {"syntax": "regex", "definition": "a"}},
          "response_format": {"type": "json_object"}}, "without response_format", "grammar"),
    ],
)  # fmt: skip
def test_what_can_not_be_used_is_refused(api: openai.OpenAI, how: dict[str, Any], said: str, param: str):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        ask(api, **how)
    assert caught.value.param == param
