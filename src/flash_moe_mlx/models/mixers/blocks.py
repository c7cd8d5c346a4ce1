"""Mixing a long prompt in blocks of tokens, and units that byte counts of mixers share."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

MIXER_BLOCK = 256
"""Tokens that a mixer takes at a time. A constant: it bounds the scratch of a long prompt (attention
scores, projections) without making bits depend on the memory limit."""

FLOAT32_BYTES = 4

KV_STEP = 256
"""Tokens by which mlx_lm's KVCache grows."""


def mix(mixer: nn.Module, norm: nn.Module, x: mx.array, cache: Any) -> mx.array:
    """Compute ``x + mixer(norm(x))`` over (B, L, H), MIXER_BLOCK tokens at a time."""
    length = x.shape[1]
    if length <= MIXER_BLOCK:
        return x + mixer(norm(x), cache)
    blocks = []
    for start in range(0, length, MIXER_BLOCK):
        block = x[:, start : start + MIXER_BLOCK]
        blocks.append(block + mixer(norm(block), cache))
        mx.eval(blocks[-1])
    return mx.concatenate(blocks, axis=1)
