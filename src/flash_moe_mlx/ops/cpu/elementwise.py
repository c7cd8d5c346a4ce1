"""Small functions for kernels: exponential, SiLU, reading stored numbers, permuting x for the dot products."""

import math

import numpy as np

from .jit import serial
from .memory_ir import load_bf16, load_e4m3, load_e8m0, load_f16, load_f32, load_u8
from .vector_ir import BF16, E4M3, E8M0, F16, LANES

CHANNELS = 1024
"""Channels of a token per task of convolving or combining: they stay in the first-level cache."""

_LOG2E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@serial
def exponential(x):  # type: ignore[no-untyped-def]
    """Return ``exp(x)`` of a float32: 0 below -87, at most exp(88), NaN for NaN. The polynomial is Cephes'."""
    top = np.float32(88.0)
    t = top if x > top else x
    n = np.floor(t * _LOG2E + np.float32(0.5))
    r = t - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    scale = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0.0) if t < np.float32(-87.0) else p * scale


@serial
def sigmoid(x):  # type: ignore[no-untyped-def]
    """Return the logistic function of a float32."""
    return np.float32(1.0) / (np.float32(1.0) + exponential(-x))


@serial
def swiglu(gate, up):  # type: ignore[no-untyped-def]
    """Compute ``gate = silu(gate) * up`` in place. Shapes (n,), float32."""
    for i in range(len(gate)):
        gate[i] = gate[i] * sigmoid(gate[i]) * up[i]


@serial
def add_scaled(total, x, weight):  # type: ignore[no-untyped-def]
    """Compute ``total += weight * x`` in place."""
    for i in range(len(total)):
        total[i] += weight * x[i]


@serial
def rms_scale(x, eps):  # type: ignore[no-untyped-def]
    """Return ``1 / sqrt(mean(x^2) + eps)``."""
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return np.float32(1.0) / math.sqrt(total / np.float32(len(x)) + eps)


@serial
def read_float(source, index, kind):  # type: ignore[no-untyped-def]
    """Read the number ``index`` of those stored as ``kind`` at address ``source``."""
    if kind == BF16:
        return load_bf16(source, index)
    if kind == F16:
        return load_f16(source, index)
    if kind == E8M0:
        return load_e8m0(source, index)
    if kind == E4M3:
        return load_e4m3(source, index)
    return load_f32(source, index)


@serial
def affine_tail(weights, bits, group_size, kind, first, count, x, scales):  # type: ignore[no-untyped-def]
    """Sum ``q * scale * x`` over weights ``first`` to ``count`` of a row, which whole steps leave over."""
    total = np.float32(0.0)
    last_byte = (count * bits - 1) // 8
    for i in range(first, count):
        byte, shift = i * bits // 8, i * bits % 8
        word = load_u8(weights, byte)
        if byte < last_byte:
            word |= load_u8(weights, byte + 1) << 8
        q = np.float32((word >> shift) & ((1 << bits) - 1))
        total += q * read_float(scales, i // group_size, kind) * load_f32(x, i)
    return total


@serial
def dense_tail(weights, kind, first, count, x):  # type: ignore[no-untyped-def]
    """Sum ``w * x`` over weights ``first`` to ``count`` of an unquantised row."""
    total = np.float32(0.0)
    for i in range(first, count):
        total += read_float(weights, i, kind) * load_f32(x, i)
    return total


@serial
def permute_for_dots(x, lane_weights, factors, group_size, ordered, sums):  # type: ignore[no-untyped-def]
    """Permute rows of x into the order in which the dot products read them, and sum each group.

    Args:
        x: Rows. Shape (T, inputs), float32.
        lane_weights: Number of consecutive weights that a lane takes per step; 0 keeps the order.
        factors: Factor on each of a lane's values. Shape (lane_weights,), float32.
        group_size: Number of values per sum.
        ordered: Result, shape (T, inputs): (step, field, lane) for whole steps, then the rest unchanged.
        sums: Result, shape (T, groups).
    """
    inputs = x.shape[1]
    step = LANES * lane_weights
    whole = inputs // step * step if step else 0
    for t in range(x.shape[0]):
        for start in range(0, whole, max(step, 1)):
            for field in range(lane_weights):
                for lane in range(LANES):
                    value = x[t, start + lane * lane_weights + field] * factors[field]
                    ordered[t, start + field * LANES + lane] = value
        for i in range(whole, inputs):
            ordered[t, i] = x[t, i]
        for group in range(sums.shape[1]):
            total = np.float32(0.0)
            for i in range(group * group_size, (group + 1) * group_size):
                total += x[t, i]
            sums[t, group] = total
