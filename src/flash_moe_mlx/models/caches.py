"""What mlx_lm's caches don't all tell in one way."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import QuantizedKVCache


def context_length(caches: Sequence[Any]) -> int:
    """Tokens that a model's caches hold, padding included; caches of recurrent state don't count."""
    # A quantised cache says 0 when asked for its size.
    return max((c.offset if isinstance(c, QuantizedKVCache) else c.size() for c in caches), default=0)
