"""Product of a few rows with a quantised matrix: the projections of one decode step."""

import mlx.core as mx


def dequant_matvec_reference(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    """``dequant_matvec`` in plain MLX operations, for any number of rows."""
    y = mx.quantized_matmul(
        x.astype(mx.float32),
        weight,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        transpose=True,
        group_size=group_size,
        bits=bits,
    )
    return y.astype(x.dtype)


def dequant_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    """Multiply rows of x with an affine-quantised matrix.

    Computes ``y = x W^T`` with ``w = q * scale + bias``, as ``mx.quantized_matmul``, but with float32
    sums whatever the dtype of x.

    Args:
        x: Rows. Shape (..., H), float32, bfloat16 or float16.
        weight: Packed weights. Shape (N, H * bits / 32), uint32.
        scales: Shape (N, H / group_size).
        biases: Shape (N, H / group_size).
        bits: Bits a weight: 2, 3, 4, 5, 6 or 8.
        group_size: Weights that share a scale and a bias: 32, 64 or 128.

    Returns:
        Shape (..., N), dtype of x.
    """
    return dequant_matvec_reference(x, weight, scales, biases, bits=bits, group_size=group_size)
