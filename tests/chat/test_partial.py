"""Calls as they are written: the pieces are the beginning of what the whole call says, whatever it says."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe_mlx.chat.answer import BadCall
from flash_moe_mlx.chat.calls import Call
from flash_moe_mlx.chat.partial import CallBegun, CallText
from flash_moe_mlx.chat.reader import AnswerReader, Piece

from ..support.chat_models import DEEPSEEK, KIMI, MINIMAX, QWEN3_CODER, QWEN3_NEXT, TOOL, Family, encoded

JSON_FORMS = {
    "qwen": (QWEN3_NEXT, '<tool_call>\n{{"name": "write_file", "arguments": {}}}\n</tool_call>'),
    "kimi": (KIMI, "<|tool_calls_section_begin|><|tool_call_begin|>functions.write_file:0"
             "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"),
    "deepseek": (DEEPSEEK, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{}"
                 "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "deepseek fenced": (DEEPSEEK, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>write_file\n"
                        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
}  # fmt: skip
XML_FORMS = {
    "qwen": (QWEN3_CODER, "<tool_call>\n<function=write_file>\n{}</function>\n</tool_call>",
             "<parameter={}>\n{}\n</parameter>\n"),
    "minimax": (MINIMAX, '<minimax:tool_call>\n<invoke name="write_file">\n{}</invoke>\n</minimax:tool_call>',
                '<parameter name="{}">{}</parameter>\n'),
}  # fmt: skip
NAMES = [*TOOL["function"]["parameters"]["properties"], "unknown"]
# Fragments that end, escape or begin something in one of the forms, and words of no meaning.
FRAGMENTS = [
    '"', "\\", '\\"', "\\\\", "\\n", "\\u00e9", "\\ud83d", "\\ude00", "\\u", "\\x", "\n", "\t", "{", "}", "[", "]",
    ",", ":", "</parameter>", "\n</parameter>", "</parameter", "<parameter=path>", '<parameter name="path">',
    "</function>", "</invoke>", "<function=write_file>", "<tool_call>", "</tool_call>", "<|tool_call_end|>", "</", "<",
    ">", "null", "true", "3", "-1.5e3", '"path"', '"count"', '{"a": 1}', "[1, 2]", "a", "word ", "é", "😀", " ",
]  # fmt: skip
WORDS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


def feed(tokenizer: Any, said: str, reason: str, *, partial: bool) -> list[Piece]:
    reader = AnswerReader(tokenizer, (), [TOOL], partial=partial)
    tokens = encoded(tokenizer, said) + ([tokenizer.eos_token_id] if reason == "stop" else [])
    last = len(tokens) - 1
    return [piece for i, token in enumerate(tokens) for piece in reader.feed(token, reason if i == last else None)]


def check(family: Family, said: str, reason: str = "stop") -> list[str]:
    """Compare both ways to read an answer; returns the pieces of its first call's arguments."""
    tokenizer = family.tokenizer
    whole = feed(tokenizer, said, reason, partial=False)
    pieces = feed(tokenizer, said, reason, partial=True)
    calls = [piece for piece in whole if isinstance(piece, Call)]
    texts: list[str] = []
    begun: Call | None = None
    first: list[str] = []
    for piece in pieces:
        if isinstance(piece, CallBegun):
            assert begun is None
            begun, texts = piece.call, []
        elif isinstance(piece, CallText):
            assert begun is not None and piece.text
            texts.append(piece.text)
        elif isinstance(piece, Call):
            if begun is not None:
                named = (begun.name, begun.id) == (piece.name, piece.id)
                continued = named and json.dumps(piece.arguments, ensure_ascii=False).startswith("".join(texts))
                # The words of a cut call are read again, and may hold another one, as they do without pieces.
                assert continued or reason == "length"
                first = first or (texts if continued else [])
            begun = None
        elif isinstance(piece, BadCall):
            begun = None
    rest = [piece for piece in pieces if not isinstance(piece, CallBegun | CallText)]
    assert [piece for piece in rest if isinstance(piece, Call)] == calls
    if begun is not None:
        assert reason == "length" and not calls  # what was said of it has been given
    elif reason == "stop":
        assert rest == whole
    return first


@pytest.mark.parametrize("name", JSON_FORMS)
def test_json_arguments_come_piece_by_piece(name: str):
    family, form = JSON_FORMS[name]
    content = "one line\nand 'another' with \"quotes\" \\ and é 😀 " * 5
    arguments = {"path": "a.txt", "count": -3, "content": content, "options": {"deep": [1.5, None]}, "deep": True}
    for ascii_only in (False, True):
        pieces = check(family, form.format(json.dumps(arguments, ensure_ascii=ascii_only)))
        assert len(pieces) > 50 and json.loads("".join(pieces) + "}") == arguments


@pytest.mark.parametrize("name", XML_FORMS)
def test_parameters_come_piece_by_piece(name: str):
    family, form, parameter = XML_FORMS[name]
    content = 'one line\nand <b>markup</b> with "quotes" \\ and é 😀 ' * 5
    values = {"path": "a.txt", "count": "-3", "content": content, "options": '{"deep": [1.5]}', "deep": "null"}
    pieces = check(family, form.format("".join(parameter.format(*item) for item in values.items())))
    expected = {**values, "count": -3, "options": {"deep": [1.5]}, "deep": None}
    given = "".join(pieces)
    assert len(pieces) > 50 and json.dumps(expected, ensure_ascii=False) == given + ', "deep": null}'


def test_a_call_of_no_tool_and_one_only_thought_of_come_whole():
    form = JSON_FORMS["qwen"][1].format('{"path": "a"}')
    assert check(QWEN3_NEXT, form.replace("write_file", "other")) == []
    assert not [piece for piece in feed(QWEN3_NEXT.tokenizer, f"<think>\n{form}", "stop", partial=True)
                if isinstance(piece, CallBegun)]  # fmt: skip


def test_the_first_of_two_values_counts_in_both():
    for said in ('{"path": "a", "path": "b", "count": 1, "count": 2}',):
        assert "".join(check(QWEN3_NEXT, JSON_FORMS["qwen"][1].format(said))) == '{"path": "a", "count": 1'
    family, form, parameter = XML_FORMS["qwen"]
    said = form.format(parameter.format("path", "a") + parameter.format("path", "b"))
    assert "".join(check(family, said)) == '{"path": "a"'


@given(
    name=st.sampled_from(list(JSON_FORMS)),
    members=st.lists(
        st.tuples(st.sampled_from(NAMES), st.one_of(WORDS.map('"{}"'.format), WORDS, st.none())), max_size=4
    ),
    cut=st.none() | st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_any_json(name: str, members: list[tuple[str, Any]], cut: int | None):
    family, form = JSON_FORMS[name]
    body = "{" + ", ".join(f'"{key}": {"null" if value is None else value}' for key, value in members) + "}"
    said = form.format(body)
    check(family, said if cut is None else said[:cut], "stop" if cut is None else "length")


@given(
    name=st.sampled_from(list(XML_FORMS)),
    members=st.lists(st.tuples(st.sampled_from(NAMES), WORDS), max_size=4),
    cut=st.none() | st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_any_parameters(name: str, members: list[tuple[str, str]], cut: int | None):
    family, form, parameter = XML_FORMS[name]
    said = form.format("".join(parameter.format(*member) for member in members))
    check(family, said if cut is None else said[:cut], "stop" if cut is None else "length")
