"""Tool calls: whatever a model says between the markers is a call that can be sent, or none."""

import json
import random
from contextlib import suppress
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe_mlx.chat.calls import Call, NotACallError, checked_call, read_calls

PARSERS = ["json_tools", "qwen3_coder", "glm47", "kimi_k2", "minimax_m2", "mistral", "gemma4", "pythonic"]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}
ODD = [
    "[]", "[[]]", "[" * 1100, "[" * 100_000, '{"a":' * 1100, "3", "null", '"f"', "", " ", "{}", '{"name": 3}',
    '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": NaN}', '{"name": "f", "arguments": {"a": 1e999}}',
    '{"name": "f", "arguments": {"a": -Infinity}}', '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
    '{"name": "f", "arguments": {"a": ' + "[" * 400 + "]" * 400 + "}}", '{"name": "f/g", "arguments": {}}',
    '{"name": "", "arguments": {}}', '{"name": "f", "arguments": "a.txt"}', '{"name": "' + "f" * 65 + '"}',
    "<function=f><parameter=a>inf</parameter></function>", "<function=f><parameter=a>1e400</parameter></function>",
    "<function=f", "<function=></function>", "f<arg_key>a</arg_key><arg_value>" + "(" * 5000 + "</arg_value>",
    "functions.f:0<|tool_call_argument_begin|>" + "-" * 10_000, "f[ARGS]{", "[TOOL_CALLS]", "call:f{a:}",
    "[f(a=" + "(" * 5000 + ")]", '<invoke name="f"><parameter name="a">' + "{" * 5000 + "</parameter></invoke>",
]  # fmt: skip


def calls_of(name: str, text: str) -> list[Call]:
    """Calls by one of mlx_lm's parsers; only an error of ours is let through."""
    with suppress(NotACallError):
        return read_calls(import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call, text, [TOOL])
    return []


def check(call: Call) -> None:
    """A call that any client can read and that comes back as it went out."""
    told = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    assert json.loads(told.encode().decode()) == call.arguments
    assert checked_call(call.name, told, call.id) == call


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_that_a_model_says_raises(name: str):
    for text in ODD:
        for call in calls_of(name, text):
            check(call)


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_that_is_mixed_at_random_raises(name: str):
    r = random.Random(0)
    pieces = [*ODD[:8], '{"name": "f", "arguments": {"a": 1}}', *'{}[]":,\\', "\\ud83d", "\ud83d", "é", "<function=f>",
              "<parameter=a>", "</parameter>", "</function>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
              "functions.f:0", "<|tool_call_argument_begin|>", "[ARGS]", "call:f", '<|"|>', "1", "e", "9" * 400,
              '<invoke name="f">', "</invoke>", '<parameter name="a">', "f(", ")", "=", "'"]  # fmt: skip
    for _ in range(500):
        for call in calls_of(name, "".join(r.choices(pieces, k=r.randrange(1, 8)))):
            check(call)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: (
    st.lists(inner) | st.dictionaries(st.text(), inner)
)), st.text() | st.just("f"))  # fmt: skip
def test_what_is_a_call_can_be_sent_and_comes_back(arguments: Any, name: str):
    try:
        call = checked_call(name, arguments)
    except NotACallError:
        return
    check(call)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("f", None, {}), ("f", "", {}), ("f", "null", {}), ("f", '{"a": 1}', {"a": 1}), ("a.b-c_1", {}, {}),
        ("f", {"a": "x\ud83dy"}, {"a": "x\ufffdy"}), ("f", '{"a": "\\ud83d"}', {"a": "\ufffd"}),
        ("f", {"a": "😀"}, {"a": "😀"}), ("f", {"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}), ("f", {1: 2}, {"1": 2}),
        ("f", '{"a": "two\nlines"}', {"a": "two\nlines"}),
    ],
)  # fmt: skip
def test_calls(name: str, arguments: Any, expected: Any):
    assert checked_call(name, arguments) == Call(name, expected)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("write file!", {}, "name"), ("functions/f", {}, "name"), ("", {}, "name"), (None, {}, "name"), (3, {}, "name"),
        ("é", {}, "name"), ("f" * 65, {}, "name"), ("f", "a.txt", "JSON"), ("f", ["a"], "object"), ("f", 3, "object"),
        ("f", '{"a": ', "JSON"), ("f", {"a": float("nan")}, "JSON"), ("f", {"a": object()}, "JSON"),
        ("f", {"a": 1 << 2000}, "1,024"),
    ],
)  # fmt: skip
def test_what_is_no_call(name: Any, arguments: Any, said: str):
    with pytest.raises(NotACallError, match=said):
        checked_call(name, arguments)
