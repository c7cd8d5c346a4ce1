"""The gated delta rule of linear-attention layers, and the causal convolution in front of it: many tokens."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from .backend import use_cpu_kernels, use_kernels
from .gpu import kernel_source
from .gpu.geometry import SIMD_WIDTH
from .gpu.kernel_source import Constants, Kernel
from .numerics import L2_EPS

LANES = 16
"""Lanes that share a row of the state: the same for steps and prompts, since the order of sums follows from it."""

STEP_SPREAD = (2, 4)
PROMPT_SPREAD = (2, 8)
"""Rows of the state that a lane holds, and SIMD groups a threadgroup. Two rows hide each other's waits; in a prompt
more SIMD groups share what is prepared of each token, where a step wants more threadgroups, to read the state."""

STAGED_VALUES = 2048
"""Values of q (and of k) prepared at a time: 16 KiB of threadgroup memory in all."""

MAX_STEPS = 16
"""Tokens prepared at a time, as far as STAGED_VALUES allows."""


def conv1d_silu(
    x: mx.array,
    conv_state: mx.array,
    weight: mx.array,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute a causal depthwise convolution of a few taps, with SiLU, continuing from a state.

    Computes ``y[t] = silu(sum_j weight[:, j] * z[t + j])`` where z is the state followed by x.

    Args:
        x: Inputs. Shape (B, T, C).
        conv_state: The last taps - 1 inputs before x, zeros at the start. Shape (B, taps - 1, C).
        weight: Taps, oldest first. Shape (C, taps) or, as MLX stores it, (C, taps, 1).
        mask: False where a token is padding: it counts as zero. Shape (B, T), or None.
        lengths: Tokens of each row that count, where rows are padded on the right. Shape (B,), or None.

    Returns:
        (y, new state): (B, T, C) in the dtype of x, (B, taps - 1, C) in the dtype of conv_state. Sums are float32.
    """
    if use_cpu_kernels():
        from .cpu import delta

        return delta.conv1d_silu(x, conv_state, weight, mask, lengths)
    return conv1d_silu_reference(x, conv_state, weight, mask, lengths)


def conv1d_silu_reference(
    x: mx.array,
    conv_state: mx.array,
    weight: mx.array,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute ``conv1d_silu`` in plain MLX operations."""
    taps = weight.shape[1]
    weight = weight.reshape(weight.shape[0], taps).astype(mx.float32)
    if mask is not None:
        x = mx.where(mask[..., None], x, mx.zeros((), x.dtype))
    steps = x.shape[1]
    padded = mx.concatenate([conv_state.astype(x.dtype), x], axis=1)
    if lengths is None:
        new_state = padded[:, steps:]
    else:
        ends = mx.clip(lengths, 0, steps)
        positions = (ends[:, None] + mx.arange(taps - 1))[..., None]
        new_state = mx.take_along_axis(padded, positions, axis=1)
    padded = padded.astype(mx.float32)
    total = weight[:, 0] * padded[:, :steps]
    for tap in range(1, taps):
        total = total + weight[:, tap] * padded[:, tap : tap + steps]
    # A contiguous copy, so that a state kept in a cache does not keep the whole prompt alive.
    return (total * mx.sigmoid(total)).astype(x.dtype), mx.contiguous(new_state.astype(conv_state.dtype))


def gated_delta_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute ``gated_delta`` in plain MLX operations: one token after the other."""
    dtype = q.dtype
    batch, steps, k_heads, k_dim = q.shape
    v_heads, v_dim = v.shape[2:]
    q, k, v, a, b = (array.astype(mx.float32) for array in (q, k, v, a, b))
    q = q * mx.rsqrt((q * q).sum(axis=-1, keepdims=True) + L2_EPS) * k_dim**-0.5
    k = k * mx.rsqrt((k * k).sum(axis=-1, keepdims=True) + L2_EPS)
    q = mx.repeat(q, v_heads // k_heads, axis=2)[..., None]
    k = mx.repeat(k, v_heads // k_heads, axis=2)[..., None]
    # softplus as logaddexp: exp would overflow for large arguments.
    step_size = mx.logaddexp(a + dt_bias.astype(mx.float32), mx.zeros((), mx.float32))
    decay = mx.exp(-mx.exp(A_log.astype(mx.float32)) * step_size)[..., None, None]
    beta = mx.sigmoid(b)[..., None, None]
    if state is None:
        state = mx.zeros((batch, v_heads, v_dim, k_dim), mx.float32)
    if mask is not None:
        mask = mask[..., None, None, None]
    outputs = []
    for t in range(steps):
        faded = state * decay[:, t]
        delta = (v[:, t][..., None] - faded @ k[:, t]) * beta[:, t]
        updated = faded + delta * k[:, t].swapaxes(-1, -2)
        y = updated @ q[:, t]
        if mask is not None:
            updated = mx.where(mask[:, t], updated, state)
            y = mx.where(mask[:, t], y, mx.zeros((), mx.float32))
        state = updated
        outputs.append(y.squeeze(-1))
    return mx.stack(outputs, axis=1).astype(dtype), state


def has_kernel(k_dim: int) -> bool:
    """Return whether the kernels know heads of this size."""
    return k_dim % SIMD_WIDTH == 0 and k_dim <= 256


@dataclass(frozen=True, eq=False)
class DeltaKernel:
    """One of the two kernels for a layer's heads.

    Attributes:
        kernel: File and constants.
        threadgroups: Threadgroups that share a head's state.
    """

    kernel: Kernel
    threadgroups: int

    def grid(self, heads: int) -> tuple[int, int, int]:
        """Total number of threads: one threadgroup per head of each row of the batch and tile of its state."""
        return (SIMD_WIDTH * heads, self.kernel.threadgroup[1] * self.threadgroups, 1)


@cache
def delta_kernel(
    name: str,
    heads: tuple[int, int, int, int],
    extra: Constants,
    rows: int,
    simd_groups: int,
    lanes: int = LANES,
) -> DeltaKernel:
    """Return kernels/NAME.metal for one layer's heads.

    Args:
        name: "gated_delta" or "gated_delta_conv_step".
        heads: Hk, Hv, Dk, Dv.
        extra: The kernel's own constants.
        rows: Number of rows that a lane holds.
        simd_groups: SIMD groups per threadgroup.
        lanes: Lanes that share a row of the state, halved until pieces of four floats a lane fill a row.
    """
    k_heads, v_heads, k_dim, v_dim = heads
    while k_dim % (4 * lanes):
        lanes //= 2
    constants = (
        *extra,
        ("HK", k_heads),
        ("HV", v_heads),
        ("DK", k_dim),
        ("DV", v_dim),
        ("LANES", lanes),
        ("ROWS", rows),
        ("SIMD_GROUPS", simd_groups),
    )
    tile_rows = simd_groups * (SIMD_WIDTH // lanes) * rows
    return DeltaKernel(Kernel(name, constants, (SIMD_WIDTH, simd_groups, 1)), -(-v_dim // tile_rows))


def gated_delta_kernel(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None,
    mask: mx.array | None = None,
    **spread: int,
) -> tuple[mx.array, mx.array]:
    """Compute ``gated_delta`` on the GPU: all tokens in one launch. Kernel: kernels/gated_delta.metal.

    ``spread`` is handed to ``delta_kernel``: rows, simd_groups, lanes.
    """
    batch, steps, k_heads, k_dim = k.shape
    v_heads, v_dim = v.shape[2:]
    if state is None:
        state = mx.zeros((batch, v_heads, v_dim, k_dim), mx.float32)
    steps_at_a_time = 1 if steps == 1 else min(MAX_STEPS, STAGED_VALUES // k_dim)
    extra = (("X", q.dtype), ("HAS_MASK", mask is not None), ("STEPS", steps_at_a_time))
    rows, simd_groups = STEP_SPREAD if steps == 1 else PROMPT_SPREAD
    chosen = {"rows": rows, "simd_groups": simd_groups, **spread}
    made = delta_kernel("gated_delta", (k_heads, v_heads, k_dim, v_dim), extra, **chosen)
    y, new_state = kernel_source.launch(
        made.kernel,
        # Without a mask any array stands in: the kernel does not read it.
        [q, k, v, a, b, A_log.astype(mx.float32), dt_bias.astype(mx.float32), state, state if mask is None else mask],
        [((batch, steps, v_heads, v_dim), q.dtype), (state.shape, mx.float32)],
        made.grid(batch * v_heads),
    )
    return y, new_state


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Apply the gated delta rule to T tokens, continuing from a state.

    With ``q = q / |q| / sqrt(Dk)``, ``k = k / |k|``, ``g = exp(-exp(A_log) softplus(a + dt_bias))`` and
    ``beta = sigmoid(b)``, for each token and head::

        S <- g S;  S <- S + beta (v - S k) k^T;  y = S q

    Args:
        q: Queries, not normalised. Shape (B, T, Hk, Dk).
        k: Keys, not normalised. Shape (B, T, Hk, Dk).
        v: Values. Shape (B, T, Hv, Dv); value head h reads key head h // (Hv / Hk).
        a: Input of the decay. Shape (B, T, Hv).
        b: Logit of beta. Shape (B, T, Hv).
        A_log: Shape (Hv,).
        dt_bias: Shape (Hv,).
        state: Shape (B, Hv, Dv, Dk), float32, or None for zeros.
        mask: False where a token is padding: it leaves the state alone and its y is zero. Shape (B, T), or None.

    Returns:
        (y, new state): (B, T, Hv, Dv) in the dtype of q, (B, Hv, Dv, Dk) in float32. Everything is computed in float32.

    Reference: Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464.
    """
    if use_cpu_kernels():
        from .cpu import delta

        return delta.gated_delta(q, k, v, a, b, A_log, dt_bias, state, mask)
    if use_kernels() and has_kernel(k.shape[3]):
        return gated_delta_kernel(q, k, v, a, b, A_log, dt_bias, state, mask)
    return gated_delta_reference(q, k, v, a, b, A_log, dt_bias, state, mask)
