"""Calls as they are written: the pieces are the beginning of what the whole call says, whatever it says."""

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe_mlx.chat.calls import Call
from flash_moe_mlx.chat.partial import CallBegun, CallText
from flash_moe_mlx.chat.reader import AnswerReader, Piece

from ..support.chat_models import (
    DEEPSEEK,
    GEMMA,
    GLM,
    GPT_OSS,
    KIMI,
    MINIMAX,
    MISTRAL,
    QWEN3_CODER,
    QWEN3_NEXT,
    TOOL,
    Family,
    encoded,
)

JSON_FORMS = {
    "qwen": (QWEN3_NEXT, '<tool_call>\n{{"name": "write_file", "arguments": {}}}\n</tool_call>'),
    "qwen list": (QWEN3_NEXT, '<tool_call>\n[{{"name": "write_file", "arguments": {}}}]\n</tool_call>'),
    "kimi": (KIMI, "<|tool_calls_section_begin|><|tool_call_begin|>functions.write_file:0"
             "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"),
    "kimi bare": (KIMI, "<|tool_call_begin|>functions.write_file:0<|tool_call_argument_begin|>{}<|tool_call_end|>"),
    "deepseek": (DEEPSEEK, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{}"
                 "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "deepseek fenced": (DEEPSEEK, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>write_file\n"
                        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "mistral": (MISTRAL, "[TOOL_CALLS]write_file[ARGS]{}"),
    "mistral id": (MISTRAL, "[TOOL_CALLS]write_file[CALL_ID]abcdefghi[ARGS]{}"),
    "mistral list": (MISTRAL, '[TOOL_CALLS] [{{"name": "write_file", "arguments": {}}}]'),
    "gpt-oss": (GPT_OSS, "<|channel|>commentary to=functions.write_file <|constrain|>json<|message|>{}<|call|>"),
}  # fmt: skip
WRITTEN_FORMS = {
    "qwen": (QWEN3_CODER, "<tool_call>\n<function=write_file>\n{}</function>\n</tool_call>",
             "<parameter={}>\n{}\n</parameter>\n"),
    "qwen bare": (QWEN3_CODER, "<function=write_file>\n{}</function>", "<parameter={}>\n{}\n</parameter>\n"),
    "minimax": (MINIMAX, '<minimax:tool_call>\n<invoke name="write_file">\n{}</invoke>\n</minimax:tool_call>',
                '<parameter name="{}">{}</parameter>\n'),
    "minimax bare": (MINIMAX, '<invoke name="write_file">\n{}</invoke>', '<parameter name="{}">{}</parameter>\n'),
    "glm": (GLM, "<tool_call>write_file\n{}</tool_call>", "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"),
    "glm 4.7": (GLM, "<tool_call>write_file{}</tool_call>", "<arg_key>{}</arg_key><arg_value>{}</arg_value>"),
}  # fmt: skip
GEMMA_FORM = "<|tool_call>call:write_file{}<tool_call|>"
FORMS = [*((kind, name) for kind, forms in (("json", JSON_FORMS), ("written", WRITTEN_FORMS)) for name in forms),
         ("gemma", "gemma")]  # fmt: skip
NAMES = [*TOOL["function"]["parameters"]["properties"], "unknown"]
# Fragments that end, escape or begin something in one of the forms, and words of no meaning.
FRAGMENTS = [
    '"', "\\", '\\"', "\\\\", "\\n", "\\u00e9", "\\ud83d", "\\ude00", "\\u", "\\x", "\n", "\t", "{", "}", "[", "]",
    ",", ":", "</parameter>", "\n</parameter>", "</parameter", "<parameter=path>", '<parameter name="path">',
    "</function>", "</invoke>", "<function=write_file>", "<tool_call>", "</tool_call>", "<|tool_call_end|>", "</", "<",
    ">", "null", "true", "3", "-1.5e3", '"path"', '"count"', '{"a": 1}', "[1, 2]", "a", "word ", "é", "😀", " ",
    "</arg_value>", "<arg_key>", "<arg_key>path</arg_key><arg_value>", '<|"|>', "<tool_call|>", "[TOOL_CALLS]",
    "[ARGS]", "<|call|>", "<|end|>", "<|message|>", '{"a": {"b": "c", "b": []}, "d": ["\\n", {}]}',
    "<|tool_call_begin|>",
]  # fmt: skip
WORDS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", '"', "é"]), values, max_size=3)
    ),
    max_leaves=6,
)


def feed(family: Family, said: str, reason: str, seed: int | None, *, partial: bool) -> list[Piece]:
    """Read an answer that comes byte by byte, or in runs of random widths as larger vocabularies have them."""
    tokenizer = family.tokenizer
    prompt = encoded(tokenizer, "<|start|>assistant") if family is GPT_OSS else ()
    reader = AnswerReader(tokenizer, prompt, [TOOL], partial=partial)
    if seed is None:
        tokens = encoded(tokenizer, said) + ([tokenizer.eos_token_id] if reason == "stop" else [])
        last = len(tokens) - 1
        return [piece for i, token in enumerate(tokens) for piece in reader.feed(token, reason if i == last else None)]
    pieces: list[Piece] = []
    widths = random.Random(seed)
    for run in re.split("([\ud800-\udbff])", reader._symbols.of(said)):
        while run:
            width = widths.choice((1, 2, 3, 5, 8, 30))
            reader._words.take(run[:width])
            pieces += reader._words.pieces()
            run = run[width:]
    reader._words.finish(cut=reason == "length")
    return pieces + reader._words.pieces()


def check(family: Family, said: str, reason: str = "stop", seed: int | None = None) -> list[str]:
    """Compare both ways to read an answer; returns the pieces of its first call's arguments."""
    whole = feed(family, said, reason, seed, partial=False)
    pieces = feed(family, said, reason, seed, partial=True)
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
        else:  # words of a call that was none
            begun = None
    rest = [piece for piece in pieces if not isinstance(piece, CallBegun | CallText)]
    assert [piece for piece in rest if isinstance(piece, Call)] == calls
    if begun is not None:
        assert reason == "length" and not calls  # what was said of it has been given
    elif reason == "stop":
        assert rest == whole
    return first


def gemma(value: Any) -> str:
    """Write a value as Gemma does."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{gemma(item)}" for key, item in value.items()) + "}"
    return "[" + ",".join(map(gemma, value)) + "]" if isinstance(value, list) else json.dumps(value)


def written(kind: str, name: str, members: list[tuple[str, Any]], dumps: Callable[[Any], str]) -> tuple[Family, str]:
    """Write a call in one of the forms; a name may come more than once."""
    if kind == "gemma":
        return GEMMA, GEMMA_FORM.format("{" + ",".join(f"{key}:{gemma(value)}" for key, value in members) + "}")
    if kind == "json":
        family, form = JSON_FORMS[name]
        return family, form.format("{" + ", ".join(f'"{key}": {dumps(value)}' for key, value in members) + "}")
    family, form, parameter = WRITTEN_FORMS[name]
    texts = ((key, value if isinstance(value, str) else dumps(value)) for key, value in members)
    return family, form.format("".join(parameter.format(*item) for item in texts))


def escaped(value: Any) -> str:
    return json.dumps(value)


def unescaped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(("kind", "name"), FORMS)
def test_arguments_come_piece_by_piece(kind: str, name: str):
    """Every type, with each form's markers in texts, however the words are cut."""
    ends = (
        " ".join(FRAGMENTS[18:29])
        + ' </arg_value> <tool_call|> <|"|> <|call|> <|end|> [TOOL_CALLS] <｜tool▁call▁end｜> '
    )
    content = f"one line\nand 'another' with \"quotes\" \\ and é 😀 {ends}" * 3
    options = {"deep": [1.5, None, {"text": "two\nlines, " * 30, "a": {}}], "none": []}
    arguments = {"count": -3, "path": "a.txt", "options": options, "content": content, "lines": ["a", 1], "deep": None}
    expected = unescaped(arguments)
    for seed in (None, *range(6)):
        said = written(kind, name, [*arguments.items()], escaped if seed and seed % 2 else unescaped)
        pieces = check(*said, seed=seed)
        given = "".join(pieces)
        # The reader gives the end with the whole call.
        assert expected.startswith(given) and len(expected) - len(given) < 20
        assert len(pieces) > (500 if seed is None else 50)


@pytest.mark.parametrize(("kind", "name"), FORMS)
def test_texts_within_values_come_piece_by_piece(kind: str, name: str):
    """Texts written in the place of JSON are the exception: whether they are any shows at their end."""
    pieces = check(*written(kind, name, [("lines", [{"new": "word " * 100}]), ("count", 1)], escaped))
    assert len(pieces) < 10 if kind == "written" else len(pieces) > 400


def test_a_call_of_no_tool_and_one_only_thought_of_come_whole():
    form = JSON_FORMS["qwen"][1].format('{"path": "a"}')
    assert check(QWEN3_NEXT, form.replace("write_file", "other")) == []
    assert not [piece for piece in feed(QWEN3_NEXT, f"<think>\n{form}", "stop", None, partial=True)
                if isinstance(piece, CallBegun)]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FORMS)
def test_the_first_of_two_values_counts_in_both(kind: str, name: str):
    twice = [("path", "a"), ("path", "b"), ("count", 1), ("count", 2), ("deep", None)]
    given = "".join(check(*written(kind, name, twice, escaped)))
    assert '{"path": "a", "count": 1, "deep": null}'.startswith(given) and len(given) > 22


def test_words_about_a_bare_call_begin_none():
    family = QWEN3_CODER
    said = "I would write <function=write_file> and so on, or <function=write_file>\n</function> without any."
    assert not any(isinstance(piece, CallBegun) for piece in feed(family, said, "stop", None, partial=True))


@pytest.mark.parametrize("kind", ["json", "written", "gemma"])
@given(data=st.data(), cut=st.none() | st.integers(1, 200), seed=st.none() | st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_anything(kind: str, data: st.DataObject, cut: int | None, seed: int | None):
    """Values of every kind, and what looks like one."""
    name = data.draw(st.sampled_from([own for form, own in FORMS if form == kind]))
    values: Any = NESTED | WORDS.map(_Raw)
    members = data.draw(st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=4))
    dumps = data.draw(st.sampled_from([escaped, unescaped]))
    family, said = written(kind, name, members, lambda value: str(value) if isinstance(value, _Raw) else dumps(value))
    check(family, said if cut is None else said[:cut], "stop" if cut is None else "length", seed)


class _Raw(str):
    """Words that stand in the place of a value as they are."""
