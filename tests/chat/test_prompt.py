"""Prompts of chats that are no text, or longer than the context."""

from importlib.resources import files
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from flash_moe_mlx import RequestError, chat_prompt
from flash_moe_mlx.runtime.prompt_text import PromptTooLongError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(files("flash_moe_mlx") / "demo")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("text", ["\ud800", "a\udcff", "\ude00\ud83d"], ids=repr)
def test_half_a_surrogate_pair(tokenizer: Any, text: str):
    for messages in (user(text), [{"role": "system", "content": text}, *user("Hi")]):
        with pytest.raises(RequestError, match=r"^\[messages\] must be Unicode text"):
            chat_prompt(tokenizer, messages)


def test_the_context_bounds_it(tokenizer: Any):
    tokens, points = chat_prompt(tokenizer, user("Hi"))
    assert chat_prompt(tokenizer, user("Hi"), max_context=len(tokens)) == (tokens, points)
    for text, limit in (("Hi", len(tokens) - 1), ("x" * 1_000_000, 512), ("a b " * 20_000, 9000)):
        with pytest.raises(PromptTooLongError, match=f"max_context = {limit}"):
            chat_prompt(tokenizer, user(text), max_context=limit)
