"""Parts of an answer, and a bound on its thinking."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

from ..errors import RequestError
from ..runtime.thinking import thinking_at_end

Kind = Literal["thinking", "text"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer, as it is generated.

    Attributes:
        kind: Whether it is thinking or text.
        text: The piece.
        start: Where it begins in all that the model said.
        size: How much of that it is: a marker that is only spoken of counts one.
    """

    kind: Kind
    text: str
    start: int = field(default=0, compare=False)
    size: int = field(default=0, compare=False)


@dataclass(frozen=True)
class BadCall:
    """Text that looks like a tool call but can't be run.

    Attributes:
        text: The model's words.
        reason: Why it is no call.
    """

    text: str
    reason: str


def begins_thinking(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Return whether the end of the prompt opens the thinking, as the templates of thinking models do."""
    return thinking_at_end(tokenizer, prompt) == "open"


class ThinkingBudget:
    """A logits processor that ends the thinking after a number of tokens. One object serves one generation."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], max_tokens: int):
        """Begin an answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
            prompt: The prompt's tokens.
            max_tokens: Maximum number of tokens of thinking.

        Raises:
            RequestError: If ``max_tokens`` is negative.
        """
        if max_tokens < 0:
            raise RequestError(f"[thinking_budget] must be a number of tokens from 0, got {max_tokens}. Leave it out.")
        self._start = list(tokenizer.think_start_tokens or ())
        self._end = list(tokenizer.think_end_tokens or ())
        self._left = max_tokens
        self._thinking = begins_thinking(tokenizer, prompt)
        self._recent: list[int] | None = None  # None before the first token of the answer
        self._forced = 0

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return the logits, which force the end of the thinking once the budget is spent. Shape (1, vocabulary)."""
        if not self._end:
            return logits
        if self._recent is None:
            self._recent = []
        else:
            self._note(int(tokens[-1].item()))
        if not self._thinking or self._left > 0:
            return logits
        forced = self._end[min(self._forced, len(self._end) - 1)]
        self._forced += 1
        return mx.where(mx.arange(logits.shape[-1]) == forced, logits, -mx.inf)

    def _note(self, token: int) -> None:
        longest = max(len(self._start), len(self._end))
        self._recent = [*(self._recent or []), token][-longest:]
        if self._thinking and self._recent[-len(self._end) :] == self._end:
            self._thinking = False
        elif not self._thinking and self._recent[-len(self._start) :] == self._start:
            self._thinking, self._forced = True, 0
        elif self._thinking:
            self._left -= 1
