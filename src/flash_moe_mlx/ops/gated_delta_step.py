"""One token of a gated delta layer, between its joined projections and its output projection."""

from dataclasses import astuple, dataclass
from functools import cache

import mlx.core as mx

from .backend import use_kernels
from .gated_delta import LANES, conv1d_silu_reference, gated_delta_reference, has_kernel
from .gpu import kernel_source
from .gpu.geometry import SIMD_WIDTH
from .gpu.kernel_source import Kernel
from .norm import Norm

SIMD_GROUPS = 16
"""SIMD groups of the one threadgroup that owns a head: its norm needs all of the head's outputs."""


MAX_HEAD = 128 * 128
"""Largest state of a head, in values: 32 of them in the registers of each of the threadgroup's 512 threads."""


def has_step_kernel(k_dim: int, v_dim: int) -> bool:
    """Return whether the kernel knows heads of this size."""
    return has_kernel(k_dim) and k_dim * v_dim <= MAX_HEAD


@dataclass(frozen=True)
class Columns:
    """Layout of the columns in a row of joined projections.

    Attributes:
        q, k: First query and key of the first key head.
        qk_pitch: Columns from one key head's queries, or keys, to the next one's.
        v, z: First value, and first gate of the output, of the first key head's value heads.
        v_pitch: Columns from one key head's values, or gates, to the next one's.
        b, a: Logit of beta, and input of the decay, of the first value head.
        b_pitch: Columns from one key head's logits to the next one's.
    """

    q: int
    k: int
    qk_pitch: int
    v: int
    z: int
    v_pitch: int
    b: int
    a: int
    b_pitch: int


def key_heads(channels: int, v_heads: int, v_dim: int, k_dim: int) -> int:
    """Return Hk of a layer whose convolution has this many channels."""
    return (channels - v_heads * v_dim) // (2 * k_dim)


def split_columns(
    projected: mx.array, columns: Columns, k_heads: int, v_heads: int, k_dim: int, v_dim: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Split joined projections (B, P) into qkv (B, 1, C), z (B, 1, Hv, Dv), b and a (B, 1, Hv)."""
    share = v_heads // k_heads

    def take(start: int, pitch: int, count: int) -> mx.array:
        places = start + mx.arange(k_heads)[:, None] * pitch + mx.arange(count)
        return projected[:, places.reshape(-1)][:, None]

    q, k = (take(start, columns.qk_pitch, k_dim) for start in (columns.q, columns.k))
    v, z = (take(start, columns.v_pitch, share * v_dim) for start in (columns.v, columns.z))
    b, a = (take(start, columns.b_pitch, share) for start in (columns.b, columns.a))
    return mx.concatenate([q, k, v], axis=-1), z.reshape(-1, 1, v_heads, v_dim), b, a


def gated_delta_conv_step_reference(
    projected: mx.array,
    columns: Columns,
    conv_state: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    norm: Norm,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute ``gated_delta_conv_step`` in plain MLX operations."""
    batch, v_heads, v_dim, k_dim = state.shape
    k_heads = key_heads(conv_weight.shape[0], v_heads, v_dim, k_dim)
    qkv, z, b, a = split_columns(projected, columns, k_heads, v_heads, k_dim, v_dim)
    mixed, new_conv_state = conv1d_silu_reference(qkv, conv_state, conv_weight)
    q, k, v = mx.split(mixed, [k_heads * k_dim, 2 * k_heads * k_dim], axis=-1)
    y, new_state = gated_delta_reference(
        q.reshape(batch, 1, k_heads, k_dim).astype(mx.float32),
        k.reshape(batch, 1, k_heads, k_dim),
        v.reshape(batch, 1, v_heads, v_dim),
        a,
        b,
        A_log,
        dt_bias,
        state,
    )
    gate = z.astype(mx.float32)
    y = norm.reference(y) * gate * mx.sigmoid(gate)
    return y.astype(projected.dtype).reshape(batch, -1), new_conv_state, new_state


@cache
def step_kernel(
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype],
    pitch: int,
    taps: int,
    heads: tuple[int, int, int, int],
    columns: Columns,
    eps: float,
) -> Kernel:
    """Return the kernel for one layer's dtypes (x, A_log, dt_bias) and heads (Hk, Hv, Dk, Dv)."""
    k_heads, v_heads, k_dim, v_dim = heads
    lanes = LANES
    while k_dim % (4 * lanes):
        lanes //= 2
    names = ("Q_AT", "K_AT", "QK_STEP", "V_AT", "Z_AT", "V_STEP", "B_AT", "A_AT", "B_STEP")
    constants = (
        *zip(("X", "RATE", "SHIFT"), dtypes, strict=True),
        ("PITCH", pitch),
        ("TAPS", taps),
        ("HK", k_heads),
        ("HV", v_heads),
        ("DK", k_dim),
        ("DV", v_dim),
        *zip(names, astuple(columns), strict=True),
        ("EPS", eps),
        ("LANES", lanes),
        ("ROWS", -(-v_dim // (SIMD_GROUPS * (SIMD_WIDTH // lanes)))),
        ("SIMD_GROUPS", SIMD_GROUPS),
    )
    return Kernel("gated_delta_conv_step", constants, (SIMD_WIDTH, SIMD_GROUPS, 1))


def gated_delta_conv_step_kernel(
    projected: mx.array,
    columns: Columns,
    conv_state: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    norm: Norm,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute ``gated_delta_conv_step`` on the GPU, in one launch. Kernel: kernels/gated_delta_conv_step.metal."""
    batch, v_heads, v_dim, k_dim = state.shape
    heads = (key_heads(conv_weight.shape[0], v_heads, v_dim, k_dim), v_heads, k_dim, v_dim)
    y, new_conv_state, new_state = kernel_source.launch(
        step_kernel(
            (projected.dtype, A_log.dtype, dt_bias.dtype),
            projected.shape[1],
            conv_weight.shape[1],
            heads,
            columns,
            norm.eps,
        ),
        [
            projected,
            conv_state.astype(projected.dtype),
            conv_weight,
            A_log,
            dt_bias,
            state,
            norm.weight,
        ],
        [((batch, v_heads * v_dim), projected.dtype), (conv_state.shape, projected.dtype), (state.shape, mx.float32)],
        (SIMD_WIDTH * batch * v_heads, SIMD_GROUPS, 1),
    )
    return y, new_conv_state.astype(conv_state.dtype), new_state


def gated_delta_conv_step(
    projected: mx.array,
    columns: Columns,
    conv_state: mx.array,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    norm: Norm,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute one decode step of a gated delta layer: split, ``conv1d_silu``, ``gated_delta``, ``rms_norm_gated``.

    Args:
        projected: Joined projections of one token per sequence. Shape (B, P), float32, bfloat16 or float16.
        columns: Positions of queries, keys, values, gates and logits.
        conv_state: Shape (B, taps - 1, 2 Hk Dk + Hv Dv).
        conv_weight: Shape (2 Hk Dk + Hv Dv, taps) or with a last axis of 1.
        A_log: Shape (Hv,).
        dt_bias: Shape (Hv,).
        state: Shape (B, Hv, Dv, Dk), float32.
        norm: Norm of a head's output. Shape (Dv,).

    Returns:
        (y, new conv_state, new state): (B, Hv Dv) in the dtype of projected, and both states as they came.
    """
    run = (
        gated_delta_conv_step_kernel
        if use_kernels() and has_step_kernel(state.shape[3], state.shape[2])
        else (gated_delta_conv_step_reference)
    )
    return run(projected, columns, conv_state, conv_weight, A_log, dt_bias, state, norm)
