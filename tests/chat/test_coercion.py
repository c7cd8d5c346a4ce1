"""Arguments that a model wrote as text, in the types of the tool's schema."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe_mlx.chat.coercion import allowed_types, coerce_text, coerce_value

NULLABLE = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
DEFS = {"Size": {"enum": ["s", "m", 3, None]}, "Point": {"type": "object", "properties": {"x": {"type": "integer"}}},
        "Loop": {"$ref": "#/$defs/Loop"}, "a/b": {"type": "boolean"}}  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (NULLABLE, "5", 5), (NULLABLE, "null", None), (NULLABLE, "five", "five"), (NULLABLE, " 5\n", 5),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "true", True), ({"type": "boolean"}, "False", False),
        ({"type": ["string", "null"]}, "123", "123"), ({"type": ["string", "null"]}, "null", None),
        ({"type": "string"}, "null", "null"), ({"type": "string"}, "true", "true"), ({"type": "string"}, "{}", "{}"),
        ({"type": "string"}, " a ", " a "), ({"type": "string", "format": "date"}, "2020", "2020"),
        ({"type": "integer"}, "5.0", 5), ({"type": "integer"}, "5.5", "5.5"), ({"type": "integer"}, "inf", "inf"),
        ({"type": "integer"}, "9" * 400, "9" * 400), ({"type": "integer"}, "", ""), ({"type": "integer"}, "null", None),
        ({"type": "number"}, "5", 5), ({"type": "number"}, "1e3", 1000.0), ({"type": "number"}, "nan", "nan"),
        ({"type": "number"}, "1e999", "1e999"), ({"type": "number"}, "-0.5", -0.5),
        ({"type": "array"}, "[1, null]", [1, None]), ({"type": "array"}, "['a', True]", ["a", True]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}), ({"type": "object"}, "[1]", "[1]"), ({"items": {}}, "[1]", [1]),
        ({"type": "object"}, "{" * 5000, "{" * 5000), ({"type": "array"}, "(" * 5000, "(" * 5000),
        ({"oneOf": [{"type": "array"}, {"type": "object"}]}, "{}", {}), ({"properties": {}}, "{}", {}),
        ({"allOf": [{"type": "integer"}, {"minimum": 0}]}, "5", 5), ({"allOf": [{"$ref": "#/$defs/Point"}]}, "{}", {}),
        ({"$ref": "#/$defs/Size"}, "s", "s"), ({"$ref": "#/$defs/Size"}, "3", 3), ({"$ref": "#/$defs/Size"}, "null", None),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}), ({"$ref": "#/$defs/a~1b"}, "true", True),
        ({"$ref": "#/$defs/Loop"}, "5", "5"), ({"$ref": "#/none"}, "5", "5"), ({"$ref": "#"}, "5", "5"),
        ({"const": 3}, "3", 3), ({"enum": ["1", "2"]}, "1", "1"), ({"enum": [1, 2]}, "1", 1), ({"enum": [True]}, "true", True),
        (True, "5", "5"), (False, "x", "x"), ({}, "5", "5"), ({}, "[1]", [1]), (True, '{"a": 1}', {"a": 1}), (None, "x", "x"),
        ({"anyOf": [True, {"type": "integer"}]}, "5", "5"), ({"type": "str"}, "5", "5"), ({"type": "float"}, "5", 5),
        *(({"type": ["number", "string"]}, text, text) for text in ("007", "1e3", "+5", "5.00", "True", "")),
        ({"type": ["number", "string"]}, "5", 5), ({"type": "array"}, "(1, 'a')", [1, "a"]),
        ({"anyOf": [{"type": "string"}, {"type": "boolean"}]}, "true", True),
        ({"type": "dict"}, "{}", {}), ({"type": 3}, "5", "5"), ({"type": []}, "x", "x"), ({"anyOf": 3, "enum": 3}, "x", "x"),
    ],
)  # fmt: skip
def test_texts(schema: Any, text: str, expected: Any):
    value = coerce_text(text, "a", {"properties": {"a": schema}, "$defs": DEFS})
    assert value == expected and type(value) is type(expected)


def test_what_the_schema_does_not_name():
    assert coerce_text("5", "b", {"properties": {}}) == "5"
    assert coerce_text("5", "b", {"properties": {}, "additionalProperties": {"type": "integer"}}) == 5
    assert coerce_text("5", "b", {"allOf": [{"properties": {"b": {"type": "integer"}}}]}) == 5
    assert coerce_text("5", "x", {"$ref": "#/$defs/Point", "$defs": DEFS}) == 5


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [({"type": "integer"}, "5", 5), ({"type": "string"}, "5", "5"), (NULLABLE, "5", 5), ({}, "5", "5"), (True, "5", "5"),
     ({"type": "string"}, 5, 5), ({"type": ["string", "integer"]}, "5", "5"), ({"type": "object"}, '{"a": 1}', {"a": 1})],
)  # fmt: skip
def test_values(schema: Any, value: Any, expected: Any):
    assert coerce_value(value, "a", {"properties": {"a": schema}}) == expected


ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["string", "integer"]),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                       st.sampled_from(["type", "anyOf", "enum", "$ref", "properties", "items", "const", "allOf", "a"]),
                       inner, max_size=4))  # fmt: skip


@settings(deadline=None)
@given(ANY, st.text(max_size=8) | st.sampled_from(["null", "5", "true", "[1]", "{}", "NaN", "-", "1_0"]))
def test_no_schema_and_no_text_raises(schema: Any, text: str):
    root = {"properties": {"a": schema}, "$defs": {"a": schema}}
    coerce_text(text, "a", root)
    if isinstance(schema, dict):
        coerce_text(text, "a", schema)
    assert isinstance(allowed_types(schema, root), set)
