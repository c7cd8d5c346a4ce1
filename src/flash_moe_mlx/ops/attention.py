"""Scaled dot-product attention that never stores all scores of a long prompt at once."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.base import scaled_dot_product_attention

from .backend import use_cpu_kernels

MAX_SCORE_BYTES = 16 << 20
"""Maximum number of float32 attention scores alive at once; a query block has at least MIN_QUERY_BLOCK queries."""

MIN_QUERY_BLOCK = 16


def attention_reference(queries: mx.array, keys: Any, values: Any, *, scale: float, mask: Any, cache: Any) -> mx.array:
    """Run ``attention`` through MLX, in blocks of queries.

    MLX's fallback (on the CPU, and for prompts with heads of 256 on GPUs) stores all scores of a call. The block size
    depends on shapes alone.
    """
    batch, heads, length, _ = queries.shape
    context = (keys if isinstance(keys, mx.array) else keys[0]).shape[2]
    block = max(MAX_SCORE_BYTES // (4 * batch * heads * context), MIN_QUERY_BLOCK)
    if length <= block:
        return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)
    before = context - length
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        blocks.append(
            scaled_dot_product_attention(
                queries[:, :, start:end],
                tree_map(lambda array, end=before + end: array[:, :, :end], keys),
                tree_map(lambda array, end=before + end: array[:, :, :end], values),
                cache=cache,
                scale=scale,
                mask=mask[..., start:end, : before + end] if isinstance(mask, mx.array) else mask,
            )
        )
        mx.eval(blocks[-1])
    return mx.concatenate(blocks, axis=2)


def attention(queries: mx.array, keys: Any, values: Any, *, scale: float, mask: Any, cache: Any) -> mx.array:
    """Compute softmax attention of new tokens over their context.

    Args:
        queries: Queries. Shape (B, Hq, L, D).
        keys: Keys, shape (B, Hkv, S, D) with Hq a multiple of Hkv, or a quantised cache's (weights, scales, biases).
        values: Values, in the same form as the keys.
        scale: Scale applied to the scores.
        mask: "causal" (the last query sees all keys), a boolean array that broadcasts to (B, Hq, L, S), or None.
        cache: Cache that holds keys and values; states how they are quantised, if they are.

    Returns:
        The attention output. Shape (B, Hq, L, D).
    """
    if use_cpu_kernels() and not hasattr(cache, "bits"):
        from .cpu import attention as on_cpu

        if on_cpu.takes(queries, mask):
            return on_cpu.attention(queries, keys, values, scale=scale, mask=mask)
    return attention_reference(queries, keys, values, scale=scale, mask=mask, cache=cache)
