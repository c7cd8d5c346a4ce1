"""Constraint: keeps one answer to a grammar by excluding the tokens that would leave it.

The tokens that may come next are computed by llguidance on a thread of its own, without Python's lock, while the model
computes the logits they are applied to. For a small vocabulary that takes 10 microseconds, less than the thread's turn.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from .grammar import Grammar, said_by
from .thinking import thinking_at_end

_MASK_THREADS = 2

_SMALL_VOCABULARY = 1 << 14
"""Size up to which a mask is computed where it is needed."""

_MAX_LINE_BREAKS = 2
"""Line breaks that models write between their thinking and their answer; the reader drops them."""


class Constraint:
    """A logits processor that keeps an answer to a grammar, its tool calls to another, or both.

    Where the prompt opens the model's thinking, or the model opens it itself, tokens are free up to its end. The
    grammar of calls holds from the token that opens a call until the call is complete; without a grammar for the
    answer, the text around calls is free. One object serves one generation.

    :meth:`advance` may be called with each token as soon as it is known, so that the next mask is computed while the
    model runs; without it, the call does both.
    """

    def __init__(
        self,
        tokenizer: Any,
        grammar: Grammar | None,
        prompt: Sequence[int],
        vocabulary_size: int,
        *,
        calls: Grammar | None = None,
        opening: int | None = None,
        opened: bool = False,
    ):
        """Compile the grammars and start computing the first mask.

        Args:
            tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
            grammar: Grammar of the answer's text; None leaves it free.
            prompt: The prompt's tokens.
            vocabulary_size: Number of the model's logits.
            calls: Grammar of what follows ``opening``; None leaves that, and everything after it, free.
            opening: Token that opens a tool call, if the model may make one.
            opened: Whether the prompt ends with that token.

        Raises:
            RequestError: If a grammar can't be used.
        """
        self._answer = None if grammar is None else _Bound(grammar, grammar.compile(tokenizer, vocabulary_size))
        self._calls = None if calls is None else _Bound(calls, calls.compile(tokenizer, vocabulary_size))
        self._openings = () if opening is None else (opening,)
        self._think_start = _only(tokenizer.think_start_tokens) if tokenizer.has_thinking else None
        self._think_end = list(tokenizer.think_end_tokens or ()) if tokenizer.has_thinking else []
        breaks = [_only(tokenizer.encode(text, add_special_tokens=False)) for text in ("\n", "\n\n")]
        self._line_breaks = tuple(token for token in breaks if token is not None)
        self._breaks_left = 0
        self._recent: list[int] = []
        self._mask: Callable[[], np.ndarray] | None = None
        self._at_once = vocabulary_size <= _SMALL_VOCABULARY
        self._advanced = True  # the first call has no token of the answer yet
        self._extra: tuple[int, ...] = ()  # tokens that may come now besides the grammar's
        self._bound = self._calls if opened else self._answer  # None while tokens are free
        self._thinking = False
        if self._answer is not None and not opened:
            thinking = thinking_at_end(tokenizer, prompt)
            self._thinking, self._extra = thinking == "open", self._openings
            if thinking == "none" and self._think_start is not None:
                self._extra = (self._think_start, *self._openings)
        self._look_ahead()

    def advance(self, token: int) -> None:
        """Take the token that was generated, and start computing what may follow it.

        Raises:
            RequestError: If the grammar does not allow the token, or has become too complex.
        """
        self._advanced = True
        if self._thinking:
            self._recent = [*self._recent, token][-len(self._think_end) :]
            if self._recent == self._think_end:
                self._thinking = False
                self._extra, self._breaks_left = (*self._line_breaks, *self._openings), _MAX_LINE_BREAKS
        elif self._bound is not None:
            self._take(self._bound, token)
        elif token in self._openings:
            self._bound = self._calls
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
        if self._mask is None or self._bound is None:
            return logits
        allowed, size = self._mask(), logits.shape[-1]
        self._bound.grammar.check(self._bound.matcher)
        if self._extra:
            allowed[list(self._extra)] = 1
        allowed = allowed[:size]  # masks are of whole words
        if len(allowed) < size:
            allowed = np.pad(allowed, (0, size - len(allowed)))
        return mx.where(mx.array(allowed.view(np.bool_)), logits, -mx.inf)

    def _take(self, bound: "_Bound", token: int) -> None:
        """Advance the matcher by a token, or leave the grammar by one of the others that are allowed."""
        extra, self._extra = self._extra, ()
        if token in extra and bound.matcher.validate_tokens([token]) == 0:
            if token == self._think_start:
                self._thinking, self._recent = True, []
            elif token in self._openings:
                self._bound = self._calls
            elif self._breaks_left > 1:
                self._extra, self._breaks_left = extra, self._breaks_left - 1
            return
        if not bound.matcher.consume_token(token):
            raise RequestError(
                f"[{bound.grammar.where}] must allow token {token}, which the sampler took, got: "
                f"{said_by(bound.matcher)}. Simplify it, or use a sampler that never takes a token of probability 0."
            )
        if bound is self._calls and bound.matcher.is_stopped():
            bound.matcher.reset()
            self._bound = None  # words and other calls may follow

    def _look_ahead(self) -> None:
        self._mask = None
        if self._bound is not None and not self._thinking:
            matcher = self._bound.matcher
            self._mask = (
                partial(_allowed, matcher) if self._at_once else _mask_threads().submit(_allowed, matcher).result
            )


@dataclass(frozen=True)
class _Bound:
    """A grammar, and llguidance's matcher of it."""

    grammar: Grammar
    matcher: Any


def _allowed(matcher: Any) -> np.ndarray:
    """Return 1 for each token that may come next, else 0. Shape (at least vocabulary,), uint8."""
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")


@cache
def _mask_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MASK_THREADS, thread_name_prefix="flash-moe-mask")


def _only(tokens: Sequence[int] | None) -> int | None:
    """Return the token of a marker that is one token."""
    return tokens[0] if tokens is not None and len(tokens) == 1 else None
