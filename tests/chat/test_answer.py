"""The bound on thinking, and where it begins."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flash_moe_mlx.chat.answer import ThinkingBudget, begins_thinking
from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.runtime.thinking import thinking_at_end

START, END, A, B = 0, 1, 2, 3


def tokenizer(**changes: object) -> SimpleNamespace:
    """A thinking model's markers, and token ids: one each for <think> and </think>."""
    values = {
        "has_thinking": True, "think_start": "<think>", "think_end": "</think>",
        "think_start_tokens": (START,), "think_end_tokens": (END,),
        "has_tool_calling": True, "tool_call_start": "<tool_call>", "tool_call_end": "</tool_call>",
    } | changes  # fmt: skip
    result = SimpleNamespace(**values)
    for name in ("rfind_think_start", "rfind_think_end"):
        marker = values["think_start_tokens" if name.endswith("start") else "think_end_tokens"]
        setattr(result, name, lambda tokens, m=marker: TokenizerWrapper._find(tokens, m, reverse=True))
    return result


def test_a_prompt_may_open_the_thinking():
    assert begins_thinking(tokenizer(), [A, START])
    assert not begins_thinking(tokenizer(), [A, START, END])
    assert not begins_thinking(tokenizer(), [START, *[A] * 20])  # said by somebody else
    assert not begins_thinking(tokenizer(), [])
    assert not begins_thinking(tokenizer(has_thinking=False), [START])
    assert not begins_thinking(tokenizer(eos_token_ids={B}), [START, B, A])  # said by somebody else, just before
    assert thinking_at_end(tokenizer(), [A, START, END]) == "closed"
    assert thinking_at_end(tokenizer(), [A]) == "none"


def answer_of(budget: ThinkingBudget, prompt: list[int], wanted: list[int]) -> list[int]:
    """Return the answer of a model that wants to say ``wanted``, under a budget."""
    tokens = list(prompt)
    for token in wanted:
        logits = mx.where(mx.arange(8) == token, 5.0, 0.0)[None]
        tokens.append(int(mx.argmax(budget(mx.array(tokens), logits)).item()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("prompt", "wanted", "max_tokens", "said"),
    [
        ([A, START], [A] * 5, 2, [A, A, END, A, A]),
        ([A, START], [A] * 3, 0, [END, A, A]),
        ([A, START], [A, END, A, A, A], 2, [A, END, A, A, A]),
        ([A], [START, A, A, A, B], 2, [START, A, A, END, B]),
        ([A], [A, B, A, B], 0, [A, B, A, B]),
        ([A], [START, A, A, START, A, A], 1, [START, A, END, START, END, A]),
    ],
)
def test_thinking_budget(prompt: list[int], wanted: list[int], max_tokens: int, said: list[int]):
    assert answer_of(ThinkingBudget(tokenizer(), prompt, max_tokens), prompt, wanted) == said


def test_thinking_budget_with_an_end_of_several_tokens():
    markers = tokenizer(think_start_tokens=(4, 5), think_end_tokens=(6, 7))
    assert answer_of(ThinkingBudget(markers, [4, 5], 1), [4, 5], [A] * 5) == [A, 6, 7, A, A]


def test_thinking_budget_of_a_model_that_does_not_think():
    markers = tokenizer(has_thinking=False, think_start_tokens=None, think_end_tokens=None)
    assert answer_of(ThinkingBudget(markers, [A], 0), [A], [A, B]) == [A, B]
    with pytest.raises(RequestError, match="thinking_budget"):
        ThinkingBudget(markers, [], -1)
