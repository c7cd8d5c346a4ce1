"""Text that no prompt can be is refused before it is tokenised, in time and memory that follow the context."""

from importlib.resources import files
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from flash_moe_mlx import RequestError
from flash_moe_mlx.runtime.prompt_text import (
    PromptTooLongError,
    check_conversation,
    check_length,
    check_text,
    longest_token,
)


class Counting:
    """A tokenizer that tells how many characters it was given."""

    def __init__(self, inner: Any):
        self._tokenizer, self.characters = inner, 0

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return self._tokenizer.encode(text)


@pytest.fixture(scope="module")
def inner() -> Any:
    return load_tokenizer(files("flash_moe_mlx") / "demo")._tokenizer


@pytest.fixture
def tokenizer(inner: Any) -> Counting:
    return Counting(inner)


@pytest.mark.parametrize("text", [None, 3, b"Hi", ["Hi"], "a\ud800", "\udfff", "\ude00\ud83d"], ids=repr)
def test_what_is_no_text(text: Any):
    with pytest.raises(RequestError, match=r"^\[prompt\] must be"):
        check_text(text)


@pytest.mark.parametrize("text", ["", "Hi", "é\U0001f600\u202e\x1b\x00\ufffe"], ids=repr)
def test_what_is_text(text: str):
    check_text(text)


@pytest.mark.parametrize("unit", ["x", "é", "a b ", "{", " ", "\U0001f600", "the fox "], ids=repr)
def test_far_too_long_is_refused_untokenised(tokenizer: Counting, unit: str):
    with pytest.raises(PromptTooLongError, match="4000000 characters"):
        check_length(tokenizer, unit * (4_000_000 // len(unit)) + "x" * (4_000_000 % len(unit)), 512)
    assert tokenizer.characters == 0


@pytest.mark.parametrize("unit", ["x", "\u4e00", "{\n"], ids=repr)
def test_suspiciously_long_is_counted_only_until_it_is_too_long(tokenizer: Counting, unit: str):
    text = unit * (600_000 // len(unit))
    with pytest.raises(PromptTooLongError):
        check_length(tokenizer, text, 50_000)
    assert 0 < tokenizer.characters < 100_000


@pytest.mark.parametrize("text", ["</tool_response>" * 512, "the fox " * 400, "x" * 512, ""], ids=lambda text: text[:9])
def test_what_fits_is_never_refused(tokenizer: Counting, text: str):
    tokens = len(tokenizer._tokenizer.encode(text))
    check_length(tokenizer, text, tokens)


def test_the_longest_token(tokenizer: Counting):
    assert longest_token(tokenizer) == len("</tool_response>")


HI = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [{}] * 300_000}}}


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([{"role": "user", "content": "a" * 100}] * 200, None),
        ([HI, {"role": "assistant", "content": "", "tool_calls": [CALL]}], None),
        ([HI, {"role": "assistant", "content": "a", "reasoning_content": "x y " * 1_000_000}, HI], None),
        ([HI], [{"type": "function", "function": {"name": "f", "description": "a" * 1_000_000}}]),
    ],
    ids=["contents", "calls", "thinking", "tools"],
)
def test_a_conversation_far_too_long_is_refused_before_the_template(tokenizer: Counting, messages: Any, tools: Any):
    with pytest.raises(PromptTooLongError, match="max_context = 512"):
        check_conversation(tokenizer, messages, tools, 512)
    assert tokenizer.characters == 0


def test_a_conversation_that_may_fit_is_not(tokenizer: Counting):
    space = {"role": "user", "content": " " * 1_000_000 + "a"}
    check_conversation(
        tokenizer, [HI, space, {"role": "assistant", "content": "", "reasoning_content": None}], None, 512
    )
    check_conversation(tokenizer, [{**HI, "reasoning_content": "x" * 200_000}], [{"a": "b" * 60_000}], 512)
