"""Product of a few rows with a quantised matrix: the projections of one decode step."""

from functools import cache
from math import prod

import mlx.core as mx

from ..errors import ShapeError
from .backend import backend, use_cpu_kernels, use_kernels
from .dequant_matmul import dequant_matmul
from .gpu import kernel_source
from .gpu.geometry import Geometry, choose_geometry, load_width
from .gpu.kernel_source import Kernel

MAX_ROWS = 8
"""Maximum number of rows for the kernel; beyond it, a matrix product reads the weights fewer times."""

X_ROWS = 4
"""Rows of x that one threadgroup serves: more would not fit in threadgroup memory together."""


def dequant_matvec_reference(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    """Compute ``dequant_matvec`` in plain MLX operations, for any number of rows."""
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


def has_kernel(weight: mx.array, scales: mx.array) -> bool:
    """Return whether the kernel takes this matrix: one with few elements would be passed in another way."""
    return min(weight.size, scales.size) >= kernel_source.MIN_DEVICE_ELEMENTS


@cache
def matvec_kernel(
    dtype: mx.Dtype, scale_dtype: mx.Dtype, columns: int, outputs: int, x_rows: int, bits: int, group_size: int
) -> tuple[Kernel, Geometry]:
    """Return the kernel kernels/dequant_matvec.metal for one matrix's shape.

    Raises:
        ShapeError: If the kernel does not support the quantisation.
    """
    geometry = choose_geometry(
        "dequant_matvec",
        columns,
        [(bits, group_size)],
        rows=4 if x_rows == 1 else 2,
        # Two bits of few rows are read so fast that staging x shows, so more SIMD groups share it. Not on Metal, where
        # a kernel with many registers may be allowed fewer than 512 threads, down to 384 on the first chips.
        simd_groups=16 if bits == 2 and x_rows == 1 and backend() != "metal" else 8,
        x_rows=x_rows,
    )
    return specialise(dtype, scale_dtype, columns, outputs, x_rows, bits, group_size, geometry), geometry


def specialise(
    dtype: mx.Dtype,
    scale_dtype: mx.Dtype,
    columns: int,
    outputs: int,
    x_rows: int,
    bits: int,
    group_size: int,
    geometry: Geometry,
) -> Kernel:
    """Return the kernel with a given geometry."""
    constants = (
        ("X", dtype),
        ("S", scale_dtype),
        ("H", columns),
        ("N", outputs),
        ("X_ROWS", x_rows),
        ("BITS", bits),
        ("GROUP", group_size),
        ("WIDTH", load_width(columns, bits)),
        *geometry.constants,
    )
    return Kernel("dequant_matvec", constants, geometry.threadgroup)


def dequant_matvec_kernel(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    bits: int,
    group_size: int,
    geometry: Geometry | None = None,
) -> mx.array:
    """Compute ``dequant_matvec`` on the GPU. Kernel: kernels/dequant_matvec.metal.

    Args:
        x: Rows. Shape (..., H), float32, bfloat16 or float16.
        weight: Packed weights. Shape (N, H * bits / 32), uint32.
        scales: Scales. Shape (N, H / group_size).
        biases: Biases. Shape (N, H / group_size).
        bits: Bits per weight.
        group_size: Number of weights that share a scale and a bias.
        geometry: Geometry of the kernel; None chooses it from the shapes.

    Raises:
        ShapeError: If shapes or quantisation do not meet the contract of ``dequant_matvec``, or the matrix is tiny.
    """
    if not has_kernel(weight, scales):
        raise ShapeError(
            f"[dequant_matvec] weight and scales must have at least {kernel_source.MIN_DEVICE_ELEMENTS} elements, got "
            f"{weight.shape} and {scales.shape}. Call dequant_matvec, which runs MLX's own operation on them."
        )
    columns = x.shape[-1]
    outputs = weight.shape[0]
    rows = prod(x.shape[:-1])
    if weight.shape[1] * 32 != columns * bits or scales.shape != (outputs, columns // group_size):
        raise ShapeError(
            f"[dequant_matvec] weight must be (N, {columns} * {bits} / 32) and scales (N, {columns} / {group_size}), "
            f"got {weight.shape} and {scales.shape}. Check bits and group_size against the checkpoint's config.json."
        )
    blocks = -(-rows // X_ROWS)
    x_rows = -(-rows // blocks)
    shape = (x.dtype, scales.dtype, columns, outputs, x_rows, bits, group_size)
    if geometry is None:
        kernel, geometry = matvec_kernel(*shape)
    else:
        kernel = specialise(*shape, geometry)
    (y,) = kernel_source.launch(
        kernel,
        [x.reshape(rows, columns), weight, scales, biases.astype(scales.dtype)],
        [((*x.shape[:-1], outputs), x.dtype)],
        geometry.grid(blocks, outputs),
    )
    return y


def dequant_matvec(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    """Multiply rows of x with an affine-quantised matrix.

    Computes ``y = x W^T`` with ``w = q * scale + bias``, like ``mx.quantized_matmul``, but with float32 sums for any
    dtype of x. On a GPU, more than eight rows are passed to ``dequant_matmul``.

    Args:
        x: Rows. Shape (..., H), float32, bfloat16 or float16.
        weight: Packed weights. Shape (N, H * bits / 32), uint32.
        scales: Scales. Shape (N, H / group_size).
        biases: Biases. Shape (N, H / group_size).
        bits: Bits per weight: 2, 3, 4, 5, 6 or 8.
        group_size: Number of weights that share a scale and a bias: 32, 64 or 128.

    Returns:
        The product. Shape (..., N), dtype of x.

    Raises:
        ShapeError: If the shapes are inconsistent, or the kernel doesn't support the quantisation.
    """
    if use_cpu_kernels():
        from .cpu.matmul import quantized_matmul

        return quantized_matmul(x, weight, scales, biases, bits=bits, group_size=group_size)
    if not (use_kernels() and has_kernel(weight, scales)):
        return dequant_matvec_reference(x, weight, scales, biases, bits=bits, group_size=group_size)
    if prod(x.shape[:-1]) > MAX_ROWS:
        return dequant_matmul(x, weight, scales, biases, bits=bits, group_size=group_size)
    return dequant_matvec_kernel(x, weight, scales, biases, bits=bits, group_size=group_size)
