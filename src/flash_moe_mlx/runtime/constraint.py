"""Constraint: keeps one answer to a grammar by excluding the tokens that would leave it.

The tokens that may come next are computed by llguidance on a thread of its own, without Python's lock, while the model
computes the logits they are applied to.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from .grammar import Grammar, said_by
from .thinking import thinking_at_end

_MASK_THREADS = 2

_MAX_LINE_BREAKS = 2
"""Line breaks that models write between their thinking and their answer; the reader drops them."""


class Constraint:
    """A logits processor that keeps an answer to a grammar. One object serves one generation.

    Where the prompt opens the model's thinking, or the model opens it itself, tokens are free up to its end. With
    ``opening`` the grammar is that of a tool call: it holds from the opening marker until the call is complete, and
    the text around calls is free.

    :meth:`advance` may be called with each token as soon as it is known, so that the next mask is computed while the
    model runs; without it, the call does both.
    """

    def __init__(
        self,
        tokenizer: Any,
        grammar: Grammar,
        prompt: Sequence[int],
        vocabulary_size: int,
        *,
        opening: int | None = None,
        opened: bool = False,
    ):
        """Compile the grammar and start computing the first mask.

        Args:
            tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
            grammar: The grammar.
            prompt: The prompt's tokens.
            vocabulary_size: Number of the model's logits.
            opening: Token that opens what the grammar describes, if that is a part of the answer only.
            opened: Whether the prompt ends with that token.

        Raises:
            RequestError: If the grammar can't be used.
        """
        self._grammar = grammar
        self._matcher = grammar.compile(tokenizer, vocabulary_size)
        self._opening = opening
        self._think_start = _only(tokenizer.think_start_tokens) if tokenizer.has_thinking else None
        self._think_end = list(tokenizer.think_end_tokens or ()) if tokenizer.has_thinking else []
        breaks = [_only(tokenizer.encode(text, add_special_tokens=False)) for text in ("\n", "\n\n")]
        self._line_breaks = tuple(token for token in breaks if token is not None)
        self._recent: list[int] = []
        self._mask: Future[np.ndarray] | None = None
        self._advanced = True  # the first call has no token of the answer yet
        self._breaks_left = 0
        self._extra: tuple[int, ...] = ()  # tokens that may come now besides the grammar's
        if opening is not None:
            self._state: Literal["thinking", "free", "bound"] = "bound" if opened else "free"
        else:
            thinking = thinking_at_end(tokenizer, prompt)
            self._state = "thinking" if thinking == "open" else "bound"
            if thinking == "none" and self._think_start is not None:
                self._extra = (self._think_start,)
        self._look_ahead()

    def advance(self, token: int) -> None:
        """Take the token that was generated, and start computing what may follow it.

        Raises:
            RequestError: If the grammar does not allow the token, or has become too complex.
        """
        self._advanced = True
        if self._state == "thinking":
            self._recent = [*self._recent, token][-len(self._think_end) :]
            if self._recent == self._think_end:
                self._state = "bound"
                self._extra, self._breaks_left = self._line_breaks, _MAX_LINE_BREAKS
        elif self._state == "free":
            if token == self._opening:
                self._state = "bound"
        else:
            self._take(token)
        self._look_ahead()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return logits with those of excluded tokens at -inf. Shape (1, vocabulary).

        Args:
            tokens: Tokens so far; only the last is looked at, and only if :meth:`advance` was not called with it.
            logits: Logits. Shape (1, vocabulary).
        """
        if not self._advanced:
            self.advance(int(tokens[-1].item()))
        self._advanced = False
        if self._mask is None:
            return logits
        allowed, size = self._mask.result(), logits.shape[-1]
        self._grammar.check(self._matcher)
        if self._extra:
            allowed[list(self._extra)] = 1
        if len(allowed) != size:
            allowed = np.pad(allowed[:size], (0, max(0, size - len(allowed))))
        return mx.where(mx.array(allowed.view(np.bool_)), logits, -mx.inf)

    def _take(self, token: int) -> None:
        """Advance the matcher by a token, or leave the grammar by one of the others that are allowed."""
        extra, self._extra = self._extra, ()
        if token in extra and self._matcher.validate_tokens([token]) == 0:
            if token == self._think_start:
                self._state, self._recent = "thinking", []
            elif self._breaks_left > 1:
                self._extra, self._breaks_left = extra, self._breaks_left - 1
            return
        if not self._matcher.consume_token(token):
            raise RequestError(
                f"[{self._grammar.where}] must allow token {token}, which the sampler took, got: "
                f"{said_by(self._matcher)}. Simplify it, or use a sampler that never takes a token of probability 0."
            )
        if self._opening is not None and self._matcher.is_stopped():
            self._matcher.reset()
            self._state = "free"

    def _look_ahead(self) -> None:
        self._mask = _mask_threads().submit(_allowed, self._matcher) if self._state == "bound" else None


def _allowed(matcher: Any) -> np.ndarray:
    """Return 1 for each token that may come next, else 0. Shape (at least vocabulary,), uint8."""
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")


@cache
def _mask_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MASK_THREADS, thread_name_prefix="flash-moe-mask")


def _only(tokens: Sequence[int] | None) -> int | None:
    """Return the token of a marker that is one token."""
    return tokens[0] if tokens is not None and len(tokens) == 1 else None
