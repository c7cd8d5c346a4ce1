"""Caches of one sequence, as mlx_lm's, that the CPU's decode step advances in place; and what mlx_lm's don't all tell.

MLX arrays don't change, so copies of a cache share their buffers. A state of 2 MB a layer is too much to write anew
for each token, though: these caches know whether anybody else may hold their arrays, and copy them then, once.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_caches
from mlx_lm.models.cache import QuantizedKVCache


class _OwnArrays:
    """Arrays that may be written in place unless somebody has seen them since they were copied."""

    _exposed = True
    state: Any

    def pending(self) -> Any:
        """What may not have been evaluated yet."""
        return self.state if self._exposed else ()

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles share the arrays
        self._exposed = True
        return self.__dict__.copy()


class ArraysCache(_OwnArrays, mlx_caches.ArraysCache):
    """mlx_lm's ArraysCache of one sequence's convolution window and recurrent state.

    It has its name, too: mlx_lm saves caches under their classes' names.
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
        """The arrays as float32, to be written in place; None while there are none. Seen by others, they are copied."""
        if self._arrays[0] is None or self.left_padding is not None or self.lengths is not None:
            return None
        if self._exposed:  # arrays that are not have been copied, as float32
            self._arrays = [_copy(array) for array in self._arrays]
            self._exposed = False
        return self._arrays

    def empty(self) -> bool:
        return self._arrays[0] is None


class KVCache(_OwnArrays, mlx_caches.KVCache):
    """mlx_lm's KVCache, under its name."""

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
        """Keys and values with room for one token more, to be written in place; None while there are none.

        Shape (1, Hkv, room, D) each, float32. Seen by others, or full, they are copied first.
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
    """As float32 in memory of its own; ``used`` rows of axis 2, and zeros up to ``room`` of them, if given."""
    # Another dtype is that of a model which was cast while the conversation went on.
    source = np.asarray(array if array.dtype == mx.float32 else array.astype(mx.float32))
    if used is None or room is None:
        return mx.array(source)
    target = mx.zeros((*array.shape[:2], room, array.shape[3]), mx.float32)
    mx.eval(target)
    np.asarray(memoryview(target))[:, :, :used] = source[:, :, :used]
    return target


def pending_states(caches: Sequence[Any]) -> list[Any]:
    """Arrays of caches that may not have been evaluated yet."""
    return [cache.pending() if isinstance(cache, _OwnArrays) else cache.state for cache in caches]


def context_length(caches: Sequence[Any]) -> int:
    """Tokens that a model's caches hold, padding included; caches of recurrent state don't count."""
    # A quantised cache says 0 when asked for its size.
    return max((c.offset if isinstance(c, QuantizedKVCache) else c.size() for c in caches), default=0)


def unpadded_rows(caches: Sequence[Any], tokens: int) -> mx.array | None:
    """Which of the next (B, ``tokens``) positions, flattened, hold tokens and no padding; None where all do.

    Only caches of recurrent state tell: a batch's KV caches don't know where its right padding begins.
    """
    mask = next((c.make_mask(tokens) for c in caches if isinstance(c, mlx_caches.ArraysCache)), None)
    if mask is None:
        return None
    rows = np.flatnonzero(np.array(mask))
    return None if len(rows) == mask.size else mx.array(rows)
