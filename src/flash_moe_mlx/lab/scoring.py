"""Scores of known tokens from a model's logits, row by row, so that nothing of a vocabulary's size is kept."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..config import DEFAULT_PREFILL_STEP_SIZE
from ..models.caches import pending_states
from ..models.position_blocks import block_positions

BLOCK_BYTES = 32 << 20
"""Size of the logits held at a time. On a CPU, blocks of half the size take a third longer per position."""


def block_bytes(vocabulary_size: int, positions: int) -> int:
    """Return the size of the blocks in which to take the logits of a pass."""
    return min(BLOCK_BYTES, 4 * vocabulary_size * positions)


def scratch_bytes(vocabulary_size: int, positions: int) -> int:
    """Return the memory that scoring needs besides the model's: a block, its copy, and a few rows in float64."""
    block = block_positions(block_bytes(vocabulary_size, positions), vocabulary_size)
    return 4 * vocabulary_size * (2 * block + 12)


def rows_of_logits(
    model: Any, tokens: Sequence[int], *, keep: int | None = None, step: int | None = None, cache: Any = None
) -> Iterator[np.ndarray]:
    """Yield the logits after each of the last tokens, from an empty context.

    Args:
        model: A model that `load` returned.
        tokens: The tokens to feed, from the start of the context.
        keep: Number of last tokens whose logits to yield; None takes all.
        step: Maximum number of tokens per forward pass; None feeds all of them in one.
        cache: Caches to continue instead of an empty context.

    Yields:
        Logits of the token that follows. Shape (vocabulary,), float32.
    """
    cache = make_prompt_cache(model) if cache is None else cache
    size = block_bytes(model.vocabulary_size, len(tokens))
    skipped = 0 if keep is None else len(tokens) - keep
    step = step or len(tokens)
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        own = min(len(part), start + len(part) - skipped)
        if own <= 0:
            model(mx.array([part]), cache=cache, logits_to_keep=0)
            mx.eval(pending_states(cache))
            continue
        for block in model.position_logits(mx.array([part]), cache, keep=own, block_bytes=size):
            yield from np.array(block[0].astype(mx.float32))


def log_probabilities(row: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of one position's logits. Shape (vocabulary,), float64."""
    shifted = row.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def divergence(reference: np.ndarray, model: np.ndarray) -> float:
    """Return the KL divergence of two positions' log-probabilities, in nats; 0 if they are equal."""
    return float(np.dot(np.exp(reference), reference - model))


class ContinuationScorer:
    """Log-likelihoods of continuations of contexts.

    A context is read by itself, and its caches are kept for the next continuation: answers to choose from share one.
    The bits of a score don't depend on what was scored before.
    """

    def __init__(self, model: Any, step: int = DEFAULT_PREFILL_STEP_SIZE):
        self._model = model
        self._step = step
        self._context: tuple[int, ...] | None = None
        self._cache: Any = None

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether each of its tokens is the likeliest.

        Args:
            context: Tokens before it; at least one.
            continuation: Tokens to predict.

        Raises:
            RequestError: If both together exceed the model's max_context.
        """
        before = tuple(context[:-1])
        if before != self._context:
            self._read(before)
        total, greedy = 0.0, True
        cache = copy.deepcopy(self._cache)
        fed = [context[-1], *continuation[:-1]]
        rows = rows_of_logits(self._model, fed, step=self._step, cache=cache)
        for row, token in zip(rows, continuation, strict=True):
            total += float(log_probabilities(row)[token])
            greedy = greedy and int(row.argmax()) == token
        return total, greedy

    def _read(self, tokens: tuple[int, ...]) -> None:
        self._context = self._cache = None  # its memory is free before the next one's is taken
        cache = make_prompt_cache(self._model)
        for start in range(0, len(tokens), self._step):
            self._model(mx.array([tokens[start : start + self._step]]), cache=cache, logits_to_keep=0)
            mx.eval(pending_states(cache))
        self._context, self._cache = tokens, cache
