"""Thinking in the content of answers that come back, and answers that only look so."""

from collections.abc import Iterator
from typing import Any

import pytest

from flash_moe_mlx.chat import inline_thinking
from flash_moe_mlx.chat.answer import Part
from flash_moe_mlx.chat.inline_thinking import MAX_REMEMBERED, SpokenMarkers, split_thinking
from flash_moe_mlx.chat.marked import encode, mark
from flash_moe_mlx.chat.reader import AnswerReader
from flash_moe_mlx.chat.shaping import shape_messages
from flash_moe_mlx.chat.template import render_templates

from ..support.chat_models import (
    DEEPSEEK,
    FAMILIES,
    GEMMA,
    GLM,
    KIMI,
    MINIMAX,
    QWEN3_5,
    QWEN3_NEXT,
    TOOL,
    Family,
    encoded,
    make_tokenizer,
)

SPLITTERS = [QWEN3_5, QWEN3_NEXT, GLM, DEEPSEEK, MINIMAX, GEMMA]
splitters = pytest.mark.parametrize("family", SPLITTERS, ids=lambda family: family.name)
USER = {"role": "user", "content": "hi"}
BEGUN = {QWEN3_5: "<think>\n", MINIMAX: "<think>\n", DEEPSEEK: "</think>"}
"""Where the thinking is at the end of a prompt that asks for an answer."""


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    inline_thinking._remembered.clear()
    yield
    inline_thinking._remembered.clear()


LITERAL = [
    "{start}{end}", "{start}\n{end}\n", "{start}hm{end}Yes.", "{start}\nhm\n{end}\n\nYes.", "{end}", "{end}\n\nYes.",
    "hm\n{end}\n\nYes.", "a{end}b{end}c", "  {start} and {end} are tags.", "{start}{start}{end}{end}x", "{start}x",
    "{start}\n\n{end}\n\n{start}\n{end}\n\ny",
]  # fmt: skip
"""Answers that hold the markers as text; those with an end look like thinking that came in the content."""


def markers(family: Family) -> dict[str, str]:
    return {"start": "<|channel>thought", "end": "<channel|>"} if family is GEMMA else {
        "start": "<think>", "end": "</think>"}  # fmt: skip


def shown(family: Family, *messages: dict[str, Any]) -> str:
    """The conversation as the model sees it, with each marker that is a token in brackets."""
    tokenizer = family.tokenizer
    shaped = mark(tokenizer, shape_messages(tokenizer, messages))
    (text,) = render_templates(tokenizer, [shaped], generate=[False], tools=[TOOL])
    assert isinstance(text, str), text
    tokens = encode(tokenizer, text)
    marks = {tokenizer.get_vocab()[marker] for marker in (*family.markers, family.eos)}
    return "".join(f"⟦{tokenizer.decode([t])}⟧" if t in marks else "".join(tokenizer.decode([t])) for t in tokens)


def say(family: Family, text: str) -> str:
    """The content that a client gets of an answer whose words are all text."""
    tokenizer = family.tokenizer
    tokens = encode(tokenizer, mark(tokenizer, text))
    prompt = encoded(tokenizer, BEGUN.get(family, ""))
    if family in (QWEN3_5, MINIMAX):
        prompt += encoded(tokenizer, "\n</think>\n\n")
    reader = AnswerReader(tokenizer, prompt, [TOOL])
    pieces = [piece for token in tokens for piece in reader.feed(token)]
    pieces += reader.feed(tokenizer.eos_token_id, "stop")
    assert all(isinstance(piece, Part) and piece.kind == "text" for piece in pieces)
    return "".join(piece.text for piece in pieces if isinstance(piece, Part))


@splitters
@pytest.mark.parametrize("literal", LITERAL)
def test_an_answer_of_ours_comes_back_as_it_was(family: Family, literal: str):
    text = literal.format(**markers(family))
    content = say(family, text)
    assert content.strip() == text.strip()
    came, explicit = (
        {"role": "assistant", "content": content.strip(), **field} for field in ({}, {"reasoning_content": ""})
    )
    assert shown(family, USER, came, USER) == shown(family, USER, explicit, USER)
    assert text.strip() in shown(family, USER, came, USER)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("literal", LITERAL)
def test_questions_results_and_arguments_are_what_was_said(family: Family, literal: str):
    text = literal.format(**markers(family)).strip()
    call = {"id": "functions.write_file:0", "type": "function",
            "function": {"name": "write_file", "arguments": {"path": text, "options": {text: [text]}}}}  # fmt: skip
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": text}]  # fmt: skip
    said, plain = shown(family, *messages), text.replace("\n", "\\n").replace('"', '\\"')
    assert said.count(text) + (plain != text) * said.count(plain) >= 4


@splitters
@pytest.mark.parametrize(
    ("content", "thinking", "answer"),
    [
        ("{start}\nhm\n{end}\n\nOther.", "hm", "Other."), ("{start}hm{end}Other.", "hm", "Other."),
        ("\n{start}\nhm\nhm\n{end}\nOther.", "hm\nhm", "Other."), ("{start}\n\n{end}\n\nOther.", "", "Other."),
        ("hm\n{end}\n\nOther.", "hm", "Other."), ("{start}hm{end}Write {end}.", "hm", "Write {end}."),
    ],
)  # fmt: skip
def test_thinking_of_other_servers(family: Family, content: str, thinking: str, answer: str):
    given, expected = content.format(**markers(family)), (thinking, answer.format(**markers(family)))
    assert split_thinking(family.tokenizer, given, has_calls=False) == expected
    (_, shaped) = shape_messages(family.tokenizer, [USER, {"role": "assistant", "content": given}])
    assert (shaped["reasoning_content"], shaped["content"]) == expected
    for name in ("reasoning_content", "reasoning", "thinking"):
        (_, kept) = shape_messages(family.tokenizer, [USER, {"role": "assistant", "content": given, name: ""}])
        assert kept["content"] == given


@splitters
@pytest.mark.parametrize(
    "content",
    ["{start}{end}", "{start}", "{end}", "{start} {end}\n", "Write {end} after it.", "`{start}`\nhm\n{end}\n\nx"],
)
def test_words_of_other_servers_that_are_no_thinking(family: Family, content: str):
    given = content.format(**markers(family))
    assert split_thinking(family.tokenizer, given, has_calls=False) is None
    assert given.strip() in shown(family, USER, {"role": "assistant", "content": given}, USER)


def test_thinking_before_calls_alone():
    assert split_thinking(QWEN3_NEXT.tokenizer, "<think>\nhm\n</think>\n\n", has_calls=True) == ("hm", "")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_remembered_at_any_borders_and_not_for_ever(size: int):
    tokenizer = GLM.tokenizer

    def speak(text: str) -> None:
        spoken = SpokenMarkers(tokenizer, "</think>")
        for i in range(0, len(text), size):
            spoken.take(text[i : i + size])

    def is_thinking(text: str) -> bool:
        return split_thinking(tokenizer, text, has_calls=False) is not None

    first = f" \n<think>of {size} é</th</think>First."
    assert is_thinking(first)
    speak(first)
    assert not is_thinking(first) and not is_thinking(first.strip()) and not is_thinking(first + " And more.")
    assert is_thinking(first.replace("of", "off"))
    for i in range(MAX_REMEMBERED):
        speak(f"<think>{i} {size}</think>x")
    assert is_thinking(first) and not is_thinking(f"<think>{i} {size}</think>x")


def test_words_that_a_template_looks_for_are_text_even_if_they_are_no_tokens():
    template = (
        """{%- for m in messages %}{{- m.content.split("[/THINK]")[-1] }}"""
        """{{- "!" if "<x>" in m.content else "" }}{%- endfor %}"""
    )
    tokenizer = make_tokenizer(template, ("<s>",), "</s>")
    (text,) = render_templates(
        tokenizer, [mark(tokenizer, [{"role": "user", "content": "a [/THINK] b <x>"}])], generate=[False]
    )
    assert tokenizer.decode(encode(tokenizer, str(text))) == "a [/THINK] b <x>"


@pytest.mark.parametrize("name", ["path", "role", "type", "id", "tool_call_id"])
def test_no_argument_is_a_mark_by_its_name(name: str):
    call = {"id": "functions.<|im_end|>:0", "type": "function",
            "function": {"name": "write_file", "arguments": {name: "<|im_end|>", "<|im_end|>": 1}}}  # fmt: skip
    for family in (KIMI, QWEN3_NEXT):
        said = shown(family, USER, {"role": "assistant", "content": "", "tool_calls": [call]})
        plain = shown(family, USER, {"role": "assistant", "content": ""})
        assert said.count("⟦<|im_end|>⟧") == plain.count("⟦<|im_end|>⟧")


def test_the_escape_of_a_break_is_text():
    for text in ("\\ufdd0", "<think>\\ufdd0 \\\\ufdd0"):
        assert text in shown(QWEN3_NEXT, {"role": "user", "content": text})
