"""Product with an unquantised matrix: MLX's own, except on the CPU, where that is 15 to 30 times too slow."""

import mlx.core as mx

from .backend import use_cpu_kernels


def dense_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """Compute ``y = x W^T``.

    Args:
        x: Rows. Shape (..., H), float32, bfloat16 or float16.
        weight: The matrix. Shape (N, H), float32, bfloat16 or float16.

    Returns:
        The product. Shape (..., N), dtype of x.
    """
    if use_cpu_kernels():
        from .cpu import matmul

        if matmul.takes_dense(weight):
            return matmul.dense_matmul(x, weight)
    return (x @ weight.T).astype(x.dtype)
