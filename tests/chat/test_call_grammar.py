"""Calls bound to schemas: what the grammar allows is what the reader reads, in both of Qwen's forms."""

from typing import Any

import pytest

from flash_moe_mlx.chat.call_grammar import BoundCalls, _closed, bound_calls
from flash_moe_mlx.chat.calls import Call
from flash_moe_mlx.chat.dialect import dialect_of
from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.runtime.grammar import Grammar

from ..support.chat_models import KIMI, QWEN3_5, QWEN3_NEXT, Family, encoded, read

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "kind": {"enum": ["red", "a b", 3, None]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "deep": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["path", "kind"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "integer"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
JSON_CALL = '\n{"name": "%s", "arguments": %s}\n</tool_call>'


def tool(name: str = "write", parameters: Any = PARAMETERS, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def bound(family: Family, *tools: Any, required: bool = True) -> BoundCalls | None:
    tokenizer = family.tokenizer
    dialect = dialect_of(tokenizer).with_tools(tools)
    return bound_calls(dialect, tools, lambda g: g.compile(tokenizer, len(tokenizer)), required=required)


def allowed(family: Family, calls: BoundCalls | None, said: str) -> bool:
    """Whether the grammar allows a text, and nothing but the answer's end or another call after it."""
    assert calls is not None
    tokenizer = family.tokenizer
    matcher, tokens = calls.grammar.compile(tokenizer, len(tokenizer)), encoded(tokenizer, said)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_stopped()


def marked_up(*parameters: tuple[str, str], name: str = "write") -> str:
    written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"\n<function={name}>\n{written}</function>\n</tool_call>"


GOOD_OBJECTS = [
    ('{"path": "a", "kind": "red"}', {"path": "a", "kind": "red"}),
    ('{"path": "a\\n}", "kind": null, "count": 20, "place": {"x": -5}}',
     {"path": "a\n}", "kind": None, "count": 20, "place": {"x": -5}}),
]  # fmt: skip
GOOD_MARKED_UP = [
    ((("path", "two\nlines <b>"), ("kind", "a b")), {"path": "two\nlines <b>", "kind": "a b"}),
    ((("path", ""), ("kind", "3"), ("count", "7"), ("deep", "null"), ("place", '{"x": 5}')),
     {"path": "", "kind": 3, "count": 7, "deep": None, "place": {"x": 5}}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), GOOD_OBJECTS, ids=["short", "long"])
def test_objects_that_obey_are_allowed_and_read(arguments: str, expected: dict[str, Any]):
    said = JSON_CALL % ("write", arguments)
    assert allowed(QWEN3_NEXT, bound(QWEN3_NEXT, tool()), said)
    assert read(QWEN3_NEXT.tokenizer, f"<tool_call>{said}", tools=[tool()]) == [Call("write", expected)]


@pytest.mark.parametrize(("parameters", "expected"), GOOD_MARKED_UP, ids=["short", "long"])
def test_marked_up_calls_that_obey_are_allowed_and_read(parameters: Any, expected: dict[str, Any]):
    said = marked_up(*parameters)
    assert allowed(QWEN3_5, bound(QWEN3_5, tool()), said)
    assert read(QWEN3_5.tokenizer, f"<tool_call>{said}", tools=[tool()]) == [Call("write", expected)]


@pytest.mark.parametrize(
    "said",
    [
        JSON_CALL % ("write", '{"path": "a"}'),
        JSON_CALL % ("write", '{"path": "a", "kind": "blue"}'),
        JSON_CALL % ("write", '{"path": "a", "kind": "red", "count": 21}'),
        JSON_CALL % ("write", '{"path": "a", "kind": "red", "more": 1}'),
        JSON_CALL % ("erase", '{"path": "a", "kind": "red"}'),
        "I would rather not.",
    ],
    ids=["missing", "enum", "bound", "more", "name", "words"],
)
def test_objects_that_do_not_obey_are_not_allowed(said: str):
    assert not allowed(QWEN3_NEXT, bound(QWEN3_NEXT, tool()), said)


@pytest.mark.parametrize(
    "said",
    [
        marked_up(("path", "a")),
        marked_up(("path", "a"), ("kind", "blue")),
        marked_up(("path", "a"), ("kind", "red"), ("count", "21")),
        marked_up(("path", "a"), ("kind", "red"), ("more", "1")),
        marked_up(("path", "a"), ("kind", "red"), name="erase"),
        JSON_CALL % ("write", '{"path": "a", "kind": "red"}'),
    ],
    ids=["missing", "enum", "bound", "more", "name", "other-form"],
)
def test_marked_up_calls_that_do_not_obey_are_not_allowed(said: str):
    assert not allowed(QWEN3_5, bound(QWEN3_5, tool()), said)


@pytest.mark.parametrize("family", [QWEN3_5, QWEN3_NEXT], ids=lambda family: family.name)
def test_of_several_tools_any_may_be_called(family: Family):
    flag = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    calls = bound(family, tool(), tool("switch", flag))
    said = marked_up(("on", "true"), name="switch") if family is QWEN3_5 else JSON_CALL % ("switch", '{"on": true}')
    assert allowed(family, calls, said)


@pytest.mark.parametrize("family", [QWEN3_5, QWEN3_NEXT], ids=lambda family: family.name)
def test_tools_that_are_not_strict_are_not_bound_unless_a_call_is_required(family: Family):
    free = tool("free")
    assert bound(family, free, required=False) is None
    calls = bound(family, tool(strict=True), free, required=False)
    said = marked_up(("any", "thing"), name="free") if family is QWEN3_5 else JSON_CALL % ("free", '{"any": "thing"}')
    assert allowed(family, calls, said)
    assert not allowed(family, calls, said.replace("free", "write"))


@pytest.mark.parametrize("family", [QWEN3_5, QWEN3_NEXT], ids=lambda family: family.name)
def test_a_schema_that_can_not_be_used_frees_its_own_tool_or_is_refused_if_strict(family: Family):
    odd = {"type": "object", "properties": {"n": {"type": "array", "items": {"not": {}}}}, "required": ["n"]}
    calls = bound(family, tool("odd", odd), tool())
    said = marked_up(("n", "whatever"), name="odd") if family is QWEN3_5 else JSON_CALL % ("odd", '{"n": 5}')
    assert allowed(family, calls, said)
    assert not allowed(family, calls, said.replace("odd", "write"))
    with pytest.raises(RequestError, match="Unimplemented keys"):
        bound(family, tool("odd", odd, strict=True), tool())


def test_many_tools_of_which_one_can_not_be_used_are_each_compiled_alone():
    """With the others each time, 128 tools took 8 seconds."""
    tokenizer, sizes = QWEN3_NEXT.tokenizer, []
    tools = [tool("odd", {"type": "object", "properties": {"n": {"not": {}}}}), *(tool(f"f{i}") for i in range(30))]

    def compiled(grammar: Grammar) -> Any:
        sizes.append(len(grammar.text))
        return grammar.compile(tokenizer, len(tokenizer))

    calls = bound_calls(dialect_of(tokenizer).with_tools(tools), tools, compiled, required=True)
    assert allowed(QWEN3_NEXT, calls, JSON_CALL % ("odd", '{"n": 5}'))
    assert not allowed(QWEN3_NEXT, calls, JSON_CALL % ("f7", '{"n": 5}'))
    assert sum(sizes) < 5 * sizes[0]


def test_what_marked_up_calls_can_not_bind_is_refused():
    bounded = {"type": "object", "properties": {"s": {"type": "string", "maxLength": 3}}}
    with pytest.raises(RequestError, match="strings of parameter s must be free"):
        bound(QWEN3_5, tool(parameters=bounded, strict=True), required=False)
    with pytest.raises(RequestError, match="must be an object with properties"):
        bound(QWEN3_5, tool(parameters={"$ref": "#/$defs/x"}, strict=True), required=False)
    assert bound(QWEN3_5, tool(parameters=bounded)) is not None


def test_other_forms_of_calls_are_refused_if_strict_and_else_not_bound():
    assert bound(KIMI, tool()) is None
    with pytest.raises(RequestError, match="in the form of kimi"):
        bound(KIMI, tool(strict=True))


def test_a_schema_that_lists_its_properties_takes_no_others():
    listed = {"properties": {"a": {"type": "string"}}}
    assert _closed(listed)["additionalProperties"] is False
    for schema in ({}, {"properties": {}}, {**listed, "additionalProperties": True}, {**listed, "anyOf": [{}]}):
        assert _closed(schema) == schema
