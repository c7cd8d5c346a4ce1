"""The end of an MoE layer: the sum of routed outputs, shared expert and residual, in one fixed order."""

from functools import cache

import mlx.core as mx

from .backend import use_cpu_kernels, use_kernels
from .gpu import kernel_source
from .gpu.kernel_source import Kernel
from .numerics import output_dtype

THREADS = 64

COMBINED_ROWS = 256
"""Tokens that the reference combines at a time."""


def moe_combine_reference(
    y: mx.array,
    weights: mx.array,
    shared: mx.array | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    """Compute ``moe_combine`` in plain MLX operations."""
    if len(y) > COMBINED_ROWS:
        # MLX would compute all K products before the first sum, which takes as much memory again as y.
        blocks = []
        for start in range(0, len(y), COMBINED_ROWS):
            part = slice(start, start + COMBINED_ROWS)
            rest = (None if array is None else array[part] for array in (shared, shared_gate, residual))
            blocks.append(moe_combine_reference(y[part], weights[part], *rest))
            mx.eval(blocks[-1])
        return mx.concatenate(blocks)
    y = y.astype(mx.float32)
    weights = weights.astype(mx.float32)
    total = weights[:, 0:1] * y[:, 0]
    for k in range(1, y.shape[1]):
        total = total + weights[:, k : k + 1] * y[:, k]
    if shared is not None:
        wide = shared.astype(mx.float32)
        if shared_gate is not None:
            wide = mx.sigmoid(shared_gate.astype(mx.float32)) * wide
        total = total + wide
    if residual is not None:
        total = total + residual.astype(mx.float32)
    return total.astype(output_dtype(y, shared, residual))


@cache
def combine_kernel(dtype: mx.Dtype, hidden: int, experts: int, shared: bool, gate: bool, residual: bool) -> Kernel:
    """Return kernels/moe_combine.metal for one layer's shapes; absent inputs are compiled out."""
    return Kernel(
        "moe_combine",
        (
            ("OUT", dtype),
            ("H", hidden),
            ("K", experts),
            ("HAS_SHARED", shared),
            ("HAS_GATE", shared and gate),
            ("HAS_RESIDUAL", residual),
        ),
        (THREADS, 1, 1),
    )


def moe_combine_kernel(
    y: mx.array,
    weights: mx.array,
    shared: mx.array | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    """Compute ``moe_combine`` on the GPU, for H a multiple of 4. Kernel: kernels/moe_combine.metal."""
    tokens, experts, hidden = y.shape
    dtype = output_dtype(y, shared, residual)
    kernel = combine_kernel(dtype, hidden, experts, shared is not None, shared_gate is not None, residual is not None)
    # The kernel always takes all five inputs; any array replaces an absent one.
    inputs = [weights if array is None else array for array in (shared, shared_gate, residual)]
    (out,) = kernel_source.launch(
        kernel,
        [y, weights, *inputs],
        [((tokens, hidden), dtype)],
        (-(-hidden // (4 * THREADS)) * THREADS, tokens, 1),
    )
    return out


def moe_combine(
    y: mx.array,
    weights: mx.array,
    shared: mx.array | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    """Combine the outputs of one layer's experts.

    Computes ``sum_k weights[k] y[k] + sigmoid(shared_gate) shared + residual``. The sum runs over k = 0 to
    K-1 one after the other in float32, so its bits depend on the router's order and on nothing else.

    Args:
        y: Per-expert outputs. Shape (T, K, H), float32.
        weights: Router weights. Shape (T, K).
        shared: Output of the shared expert, or None. Shape (T, H).
        shared_gate: Logit of the shared expert's gate, or None for a gate of one. Shape (T, 1).
        residual: Residual that the layer's output is added to, or None. Shape (T, H).

    Returns:
        The layer's output. Shape (T, H), dtype of the residual, else of shared, else of y.
    """
    if use_cpu_kernels():
        from .cpu import rows

        return rows.moe_combine(y, weights, shared, shared_gate, residual, output_dtype(y, shared, residual))
    if use_kernels() and y.dtype == mx.float32 and y.shape[2] % 4 == 0 and y.size >= kernel_source.MIN_DEVICE_ELEMENTS:
        return moe_combine_kernel(y, weights, shared, shared_gate, residual)
    return moe_combine_reference(y, weights, shared, shared_gate, residual)
