"""Formulas and constants that references, GPU kernels and CPU kernels share."""

from collections.abc import Callable

import mlx.core as mx

L2_EPS = 1e-6
"""Added to the sum of squares of q and of k before the root, as transformers and mlx-lm do."""

Activation = Callable[[mx.array, mx.array], mx.array]
"""(up, gate) to the input of the down projection, element by element; up twice where experts have no gate."""


def swiglu(up: mx.array, gate: mx.array) -> mx.array:
    """Compute ``silu(gate) * up``, as the kernels do."""
    return gate * mx.sigmoid(gate) * up


def output_dtype(y: mx.array, shared: mx.array | None, residual: mx.array | None) -> mx.Dtype:
    """Return the dtype of the residual, else of the shared expert, else of y."""
    for array in (residual, shared):
        if array is not None:
            return array.dtype
    return y.dtype
