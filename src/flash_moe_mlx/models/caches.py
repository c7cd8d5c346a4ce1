"""Single-sequence caches compatible with mlx_lm's that CPU decode updates in place, plus queries for all caches.

MLX arrays are immutable, so copies of a cache share their buffers. Rewriting a state of 2 MB per layer for each token
would be too slow, so these caches track whether anyone else may hold their arrays, and copy them once in that case.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_caches
from mlx_lm.models.cache import QuantizedKVCache


class _OwnArrays:
    """Arrays that may be written in place unless they were exposed since they were last copied."""

    _exposed = True
    state: Any

    def pending(self) -> Any:
        """Return the arrays that may not have been evaluated yet."""
        return self.state if self._exposed else ()

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles share the arrays
        self._exposed = True
        return self.__dict__.copy()


class ArraysCache(_OwnArrays, mlx_caches.ArraysCache):
    """mlx_lm's ArraysCache for one sequence's convolution window and recurrent state.

    Keeps mlx_lm's class name on purpose: mlx_lm serialises caches by class name.
    """

    @property
    def cache(self) -> list[mx.array | None]:
        self._exposed = True
        return self._arrays

    @cache.setter
    def cache(self, arrays: list[mx.array | None]) -> None:
        self._exposed = True
        self._arrays = arrays

    def own(self) -> list[mx.array] | None:
        """Return the arrays as float32, writable in place, copying exposed ones first; None if there are none yet."""
        if self._arrays[0] is None or self.left_padding is not None or self.lengths is not None:
            return None
        if self._exposed:  # arrays that were not exposed have already been copied to float32
            self._arrays = [_copy(array) for array in self._arrays]
            self._exposed = False
        return self._arrays

    def empty(self) -> bool:
        return self._arrays[0] is None


class KVCache(_OwnArrays, mlx_caches.KVCache):
    """mlx_lm's KVCache; keeps its class name on purpose, because mlx_lm serialises caches by class name."""

    @property
    def keys(self) -> mx.array | None:
        self._exposed = True
        return self._keys

    @keys.setter
    def keys(self, array: mx.array | None) -> None:
        self._exposed = True
        self._keys = array

    @property
    def values(self) -> mx.array | None:
        self._exposed = True
        return self._values

    @values.setter
    def values(self, array: mx.array | None) -> None:
        self._exposed = True
        self._values = array

    def own(self) -> tuple[mx.array, mx.array] | None:
        """Return keys and values with room for one more token, writable in place; None if there are none yet.

        Each has shape (1, Hkv, room, D), float32. Exposed or full arrays are copied first.
        """
        if self._keys is None or self._values is None:
            return None
        if self._exposed or self.offset >= self._keys.shape[2]:
            room = (self.offset // self.step + 1) * self.step
            self._keys = _copy(self._keys, self.offset, room)
            self._values = _copy(self._values, self.offset, room)
            self._exposed = False
        return self._keys, self._values

    def empty(self) -> bool:
        return self._keys is None


def _copy(array: mx.array, used: int | None = None, room: int | None = None) -> mx.array:
    """Copy an array to float32 memory: ``used`` rows of axis 2, then zeros up to ``room`` rows, if given."""
    # The dtype differs if the model was cast during the conversation.
    source = np.asarray(array if array.dtype == mx.float32 else array.astype(mx.float32))
    if used is None or room is None:
        return mx.array(source)
    target = mx.zeros((*array.shape[:2], room, array.shape[3]), mx.float32)
    mx.eval(target)
    np.asarray(memoryview(target))[:, :, :used] = source[:, :, :used]
    return target


def pending_states(caches: Sequence[Any]) -> list[Any]:
    """Return the caches' arrays that may not have been evaluated yet."""
    return [cache.pending() if isinstance(cache, _OwnArrays) else cache.state for cache in caches]


def context_length(caches: Sequence[Any]) -> int:
    """Return the number of tokens that a model's caches hold, padding included; recurrent states don't count."""
    # A quantised cache reports a size of 0.
    return max((c.offset if isinstance(c, QuantizedKVCache) else c.size() for c in caches), default=0)


def unpadded_rows(caches: Sequence[Any], tokens: int) -> mx.array | None:
    """Return which of the next (B, ``tokens``) positions, flattened, hold tokens, not padding; None if all do.

    Only caches of recurrent state know: a batch's KV caches don't know where its right padding begins.
    """
    mask = next((c.make_mask(tokens) for c in caches if isinstance(c, mlx_caches.ArraysCache)), None)
    if mask is None:
        return None
    rows = np.flatnonzero(np.array(mask))
    return None if len(rows) == mask.size else mx.array(rows)
