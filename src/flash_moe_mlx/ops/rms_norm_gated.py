"""RMS norm of a head, gated by SiLU: the end of a linear-attention layer."""

import mlx.core as mx
import mlx.nn as nn

from .backend import use_cpu_kernels


def rms_norm_gated_reference(x: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Compute ``rms_norm_gated`` in plain MLX operations."""
    y = mx.fast.rms_norm(x, weight, eps).astype(mx.float32)
    return (nn.silu(gate.astype(mx.float32)) * y).astype(x.dtype)


def rms_norm_gated(x: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Compute ``weight * x / sqrt(mean(x^2) + eps) * silu(gate)``; product and SiLU in float32.

    Args:
        x: Heads to normalise. Shape (..., D).
        gate: Gate of each value. Shape (..., D).
        weight: Weight of the norm. Shape (D,).
        eps: Value added to the mean of the squares.

    Returns:
        The gated norm. Shape (..., D), dtype of x.

    Reference: Zhang and Sennrich 2019, arXiv:1910.07467; gated as in Qwen3-Next's linear attention.
    """
    if use_cpu_kernels():
        from .cpu import rows

        return rows.rms_norm_gated(x, gate, weight, eps)
    return rms_norm_gated_reference(x, gate, weight, eps)
