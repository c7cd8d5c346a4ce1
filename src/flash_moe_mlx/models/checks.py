"""Checks of a forward pass: token ids within the vocabulary, and finite numbers."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import NonFiniteError, RequestError
from ..ops.backend import backend
from ..ops.finite import is_finite, non_finite

PASSES_AHEAD = 2
"""Number of lazy passes that may be running before the first of them is checked."""

_INTEGERS = {mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64}


def vocabulary_size(model: nn.Module, arguments: Any) -> int:
    """Return the number of token ids that a model has embeddings for.

    Args:
        model: An mlx-lm model.
        arguments: The model's arguments, which state the size for most models.
    """
    nested = getattr(arguments, "text_config", None) or {}
    named = getattr(arguments, "vocab_size", None) or (
        nested.get("vocab_size") if isinstance(nested, dict) else getattr(nested, "vocab_size", None)
    )
    tables = (m for _, m in model.named_modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))
    rows = max((table.weight.shape[0] for table in tables), default=named or 1 << 31)
    return min(named or rows, rows)


def check_tokens(tokens: mx.array, vocabulary: int) -> None:
    """Check token ids before they index the embeddings: out of range, MLX would read memory outside the table.

    Cost: under 2 microseconds for one token in memory. Lazy ids are evaluated.

    Raises:
        RequestError: If they are not integers from 0 to ``vocabulary`` - 1 of shape (B, L).
    """
    if not isinstance(tokens, mx.array) or tokens.ndim != 2 or tokens.size == 0 or tokens.dtype not in _INTEGERS:
        got = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, mx.array) else type(tokens).__name__
        raise RequestError(f"[inputs] must be token ids, integers of shape (B, L), got {got}. Pass an mx.array of ids.")
    if tokens.size == 1:
        lowest = highest = int(tokens.item())
    else:
        ids = np.array(tokens)
        lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise RequestError(
            f"[inputs] token ids must be from 0 to {vocabulary - 1}, got {lowest if lowest < 0 else highest}. "
            "Use the model's own tokenizer, and a sampler that returns ids of its vocabulary."
        )


def checked_later(tokens: mx.array) -> bool:
    """Return whether ids are checked after the pass: in decode on a GPU, checking them first would cause a wait."""
    return isinstance(tokens, mx.array) and tokens.ndim == 2 and tokens.shape[1] == 1 and backend() != "cpu"


def clamped(tokens: mx.array, vocabulary: int) -> mx.array:
    """Return ids that are safe to look up, whatever ``tokens`` holds; lazy."""
    if tokens.dtype not in _INTEGERS:
        check_tokens(tokens, vocabulary)
    return mx.minimum(tokens.astype(mx.uint32), vocabulary - 1)


def check_sampled(token: mx.array, vocabulary: int) -> None:
    """Check the result of a sampler, once it is in memory.

    Raises:
        RequestError: If it is not one token id from 0 to ``vocabulary`` - 1.
    """
    good = isinstance(token, mx.array) and token.size == 1 and token.ndim <= 1 and token.dtype in _INTEGERS
    if not good or not 0 <= token.item() < vocabulary:
        raise RequestError(
            f"[sampler] must return a token id from 0 to {vocabulary - 1}, shape (1,), got {token!r}. "
            "Return integers, as mx.argmax does."
        )


def lazily_finite(logits: mx.array) -> mx.array | None:
    """Return whether logits are finite, lazily; None on a CPU, where the model has already checked."""
    return None if backend() == "cpu" else mx.isfinite(logits).all()


class DeferredChecks:
    """Deferred checks of lazy passes: token ids and logits are checked two passes later, without waiting."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[mx.array, mx.array | None, int]] = deque()

    def __deepcopy__(self, memo: dict[int, object]) -> "DeferredChecks":
        """Return fresh checks: a copied model has run nothing."""
        return DeferredChecks()

    def add(self, tokens: mx.array | None, logits: mx.array, vocabulary: int) -> None:
        """Note a pass, and check the one before the last.

        Args:
            tokens: Ids that were not checked before the pass. Shape (1, 1); None if they were.
            logits: The logits. Shape (1, 1, vocabulary), lazy.
            vocabulary: Number of token ids that have embeddings.

        Raises:
            NonFiniteError: If that pass's logits were not finite.
            RequestError: If its token id was outside the vocabulary.
        """
        good = mx.isfinite(logits).all()
        if tokens is not None:
            good = mx.logical_and(good, mx.logical_and(tokens >= 0, tokens < vocabulary).all())
        mx.async_eval(good)
        self._waiting.append((good, tokens, vocabulary))
        if len(self._waiting) > PASSES_AHEAD:
            good, tokens, vocabulary = self._waiting.popleft()
            if not good.item():
                self._waiting.clear()
                if tokens is not None:
                    check_tokens(tokens, vocabulary)
                raise non_finite(None, "the logits")


EMBEDDINGS = -1
"""Stands for a layer's index: the input of the first layer."""


class _Watched:
    """A decoder layer that notes whether its output is finite, and otherwise behaves as the layer itself."""

    def __init__(self, layer: Any, index: int, bad: list[int]):
        self._layer, self._index, self._bad = layer, index, bad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._index == 0 and arguments and not is_finite(arguments[0]):
            self._bad.append(EMBEDDINGS)
        output = self._layer(*arguments, **named)
        hidden = output[0] if isinstance(output, Sequence) else output
        if isinstance(hidden, mx.array) and not self._bad and not is_finite(hidden):
            self._bad.append(self._index)
        return output


@contextmanager
def watched(layers: list[Any]) -> Iterator[list[int]]:
    """Watch layers within the context; the yielded list receives the index of the first with a non-finite output."""
    bad: list[int] = []
    original = list(layers)
    layers[:] = [_Watched(layer, index, bad) for index, layer in enumerate(original)]
    try:
        yield bad
    finally:
        layers[:] = original


def locate(run: Callable[[], Any], layers: list[Any], token: int, found: NonFiniteError) -> NonFiniteError:
    """Run a pass again with every layer watched, to name the one where NaN or infinity began.

    Args:
        run: The pass, starting from empty caches.
        layers: The list of the model's layers.
        token: Index of the token that the pass runs.
        found: The error known already, returned if this pass is finite.
    """
    with watched(layers) as bad:
        try:
            mx.eval(run())
        except NonFiniteError as error:
            found = non_finite(error.layer, "what the router is given", token)
    if not bad:
        return found
    return non_finite(None, "the embedding", token) if bad[0] == EMBEDDINGS else non_finite(bad[0], "the output", token)
