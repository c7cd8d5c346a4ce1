"""What mlx_lm's caches don't all tell in one way."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, QuantizedKVCache


def context_length(caches: Sequence[Any]) -> int:
    """Tokens that a model's caches hold, padding included; caches of recurrent state don't count."""
    # A quantised cache says 0 when asked for its size.
    return max((c.offset if isinstance(c, QuantizedKVCache) else c.size() for c in caches), default=0)


def unpadded_rows(caches: Sequence[Any], tokens: int) -> mx.array | None:
    """Which of the next (B, ``tokens``) positions, flattened, hold tokens and no padding; None where all do.

    Only caches of recurrent state tell: a batch's KV caches don't know where its right padding begins.
    """
    mask = next((c.make_mask(tokens) for c in caches if isinstance(c, ArraysCache)), None)
    if mask is None:
        return None
    rows = np.flatnonzero(np.array(mask))
    return None if len(rows) == mask.size else mx.array(rows)
