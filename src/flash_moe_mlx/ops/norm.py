"""RMS norm as an argument: kernels that read hidden states normalise them while reading."""

from typing import NamedTuple

import mlx.core as mx


class Norm(NamedTuple):
    """``weight * x / sqrt(mean(x^2) + eps)``. Reference: Zhang and Sennrich 2019, arXiv:1910.07467.

    Attributes:
        weight: Weight of the norm. Shape (H,), dtype of x.
        eps: Value added to the mean of the squares.
    """

    weight: mx.array
    eps: float

    def reference(self, x: mx.array) -> mx.array:
        """Normalise in plain MLX operations: float32, as the kernels do, without rounding in between."""
        return mx.fast.rms_norm(x.astype(mx.float32), self.weight.astype(mx.float32), self.eps)
