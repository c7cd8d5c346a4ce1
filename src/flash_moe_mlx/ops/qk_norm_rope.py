"""Queries and keys of one token out of the joined projections: normalised by head, then turned by their position."""

from dataclasses import dataclass
from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from .backend import use_kernels
from .gpu import kernel_source
from .gpu.kernel_source import Kernel
from .norm import Norm

SIMD_GROUPS = 2


@dataclass(frozen=True)
class Heads:
    """Layout of the heads in a row of joined projections.

    Attributes:
        queries: Query heads.
        keys: Key heads.
        size: Values per head.
        query_start: Column of the first query head.
        query_pitch: Columns from one query head to the next.
        key_start: Column of the first key head; the others follow without gaps.
    """

    queries: int
    keys: int
    size: int
    query_start: int
    query_pitch: int
    key_start: int


@lru_cache(maxsize=8)
def rotation(position: int, dims: int, base: float) -> mx.array:
    """Return cosines, then sines, of one position's rotary angles. Shape (1, dims), float32, computed in float64."""
    angles = position * float(base) ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    return mx.array(np.concatenate([np.cos(angles), np.sin(angles)])[None].astype(np.float32))


def qk_norm_rope_reference(
    projected: mx.array, heads: Heads, q_norm: Norm, k_norm: Norm, turns: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute ``qk_norm_rope`` in plain MLX operations."""
    tokens, half = projected.shape[0], turns.shape[1] // 2
    cosine, sine = turns[:, None, :half], turns[:, None, half:]

    def turned(first: int, count: int, pitch: int, norm: Norm) -> mx.array:
        rows = projected[:, first : first + count * pitch]
        missing = count * pitch - rows.shape[1]  # behind the last head there may be nothing
        rows = mx.pad(rows, [(0, 0), (0, missing)]).reshape(tokens, count, pitch)[..., : heads.size]
        x = norm.reference(rows)
        one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = mx.concatenate([one * cosine - two * sine, two * cosine + one * sine, rest], axis=-1)
        return turned.astype(projected.dtype)

    return (
        turned(heads.query_start, heads.queries, heads.query_pitch, q_norm),
        turned(heads.key_start, heads.keys, heads.size, k_norm),
    )


@cache
def rope_kernel(dtype: mx.Dtype, pitch: int, heads: Heads, rotary: int, eps: float) -> Kernel:
    """Return kernels/qk_norm_rope.metal for one layer's heads."""
    constants = (
        ("X", dtype),
        ("PITCH", pitch),
        ("HQ", heads.queries),
        ("HK", heads.keys),
        ("D", heads.size),
        ("Q_AT", heads.query_start),
        ("Q_STEP", heads.query_pitch),
        ("K_AT", heads.key_start),
        ("ROTARY", rotary),
        ("EPS", eps),
        ("SIMD_GROUPS", SIMD_GROUPS),
    )
    return Kernel("qk_norm_rope", constants, (32, SIMD_GROUPS, 1))


def qk_norm_rope_kernel(
    projected: mx.array, heads: Heads, q_norm: Norm, k_norm: Norm, turns: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute ``qk_norm_rope`` on the GPU, in one launch. Kernel: kernels/qk_norm_rope.metal."""
    tokens, pitch = projected.shape
    queries, keys = kernel_source.launch(
        rope_kernel(projected.dtype, pitch, heads, turns.shape[1], q_norm.eps),
        [projected, q_norm.weight, k_norm.weight, turns],
        [((tokens, count, heads.size), projected.dtype) for count in (heads.queries, heads.keys)],
        (32 * tokens, SIMD_GROUPS * -(-(heads.queries + heads.keys) // SIMD_GROUPS), 1),
    )
    return queries, keys


def qk_norm_rope(
    projected: mx.array, heads: Heads, q_norm: Norm, k_norm: Norm, turns: mx.array
) -> tuple[mx.array, mx.array]:
    """Normalise each query and key head of a token, and turn the first part of each by the token's position.

    Args:
        projected: Joined projections of a few tokens. Shape (T, P), float32, bfloat16 or float16.
        heads: Layout of the heads.
        q_norm: Norm of a query head.
        k_norm: Norm of a key head, with the same eps.
        turns: Cosines and sines of each token's position, as from ``rotation``. Shape (T, rotary dimensions), float32.

    Returns:
        Queries (T, Hq, D) and keys (T, Hk, D), dtype of projected. Everything is computed in float32, rounded once.

    Reference: Su et al. 2021, arXiv:2104.09864; halves are paired, as in GPT-NeoX.
    """
    run = qk_norm_rope_kernel if use_kernels() else qk_norm_rope_reference
    return run(projected, heads, q_norm, k_norm, turns)
