"""Product of one token's normalised hidden state with a quantised matrix, and of a mixer's output with its last one."""

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from .backend import use_kernels
from .dequant_matvec import dequant_matvec_reference
from .gpu import kernel_source
from .gpu.geometry import Geometry, choose_geometry, load_width
from .gpu.kernel_source import Kernel
from .norm import Norm

ROWS = 4
SIMD_GROUPS = 8
"""Rows of the matrix that a lane takes at once, and SIMD groups a threadgroup: those of ``dequant_matvec``."""

FEW_OUTPUTS = 1024
"""Outputs below which a lane takes one row, so that a router's few rows are spread over more of the GPU."""


class Matrix(NamedTuple):
    """An affine-quantised matrix (N, H), ``w = q * scale + bias``.

    Attributes:
        weight: Packed weights. Shape (N, H * bits / 32), uint32.
        scales: Shape (N, H / group_size).
        biases: Shape (N, H / group_size), dtype of scales.
        bits: Bits per weight.
        group_size: Number of weights that share a scale and a bias.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    def reference(self, x: mx.array) -> mx.array:
        """Compute ``x W^T`` in plain MLX operations."""
        return dequant_matvec_reference(x, *self[:3], bits=self.bits, group_size=self.group_size)


class Gate(NamedTuple):
    """Logits of the gate of each value of x, in rows that hold other things too.

    Attributes:
        rows: Shape (T, P).
        start: Column of the first head's first logit.
        head: Values per head.
        pitch: Columns from one head's first logit to the next one's.
    """

    rows: mx.array
    start: int
    head: int
    pitch: int

    def reference(self, width: int) -> mx.array:
        """Return the logits alone, shape (T, width)."""
        places = mx.arange(width)
        return self.rows[:, self.start + places // self.head * self.pitch + places % self.head]


@cache
def geometry_of(columns: int, outputs: int, bits: int, group_size: int) -> Geometry:
    """Spread over threads of one matrix."""
    rows = 1 if outputs < FEW_OUTPUTS else ROWS
    return choose_geometry("norm_matvec", columns, [(bits, group_size)], rows=rows, simd_groups=SIMD_GROUPS)


def _constants(x: mx.array, matrix: Matrix) -> tuple[tuple[tuple[str, int | bool | float | mx.Dtype], ...], Geometry]:
    outputs, columns = matrix.weight.shape[0], x.shape[1]
    geometry = geometry_of(columns, outputs, matrix.bits, matrix.group_size)
    return (
        ("X", x.dtype),
        ("S", matrix.scales.dtype),
        ("H", columns),
        ("N", outputs),
        ("BITS", matrix.bits),
        ("GROUP", matrix.group_size),
        ("WIDTH", load_width(columns, matrix.bits)),
        *geometry.constants,
    ), geometry


_norm_kernels: dict[tuple[object, ...], tuple[Kernel, Geometry]] = {}
_residual_kernels: dict[tuple[object, ...], tuple[Kernel, Geometry]] = {}


def norm_matvec_reference(x: mx.array, norm: Norm, matrix: Matrix, dtype: mx.Dtype) -> mx.array:
    """Compute ``norm_matvec`` in plain MLX operations."""
    return matrix.reference(norm.reference(x)).astype(dtype)


def norm_matvec_kernel(x: mx.array, norm: Norm, matrix: Matrix, dtype: mx.Dtype) -> mx.array:
    """Compute ``norm_matvec`` on the GPU, in one launch. Kernel: kernels/norm_matvec.metal."""
    key = (x.dtype, x.shape[1], matrix.weight.shape[0], matrix.scales.dtype, *matrix[3:], norm.eps, dtype)
    made = _norm_kernels.get(key)
    if made is None:
        constants, geometry = _constants(x, matrix)
        kernel = Kernel("norm_matvec", (("OUT", dtype), ("EPS", norm.eps), *constants), geometry.threadgroup)
        made = _norm_kernels[key] = kernel, geometry
    kernel, geometry = made
    tokens, outputs = x.shape[0], matrix.weight.shape[0]
    (y,) = kernel_source.launch(
        kernel, [x, norm.weight, *matrix[:3]], [((tokens, outputs), dtype)], geometry.grid(tokens, outputs)
    )
    return y


def norm_matvec(x: mx.array, norm: Norm, matrix: Matrix, dtype: mx.Dtype | None = None) -> mx.array:
    """Normalise tokens and multiply them with a quantised matrix: ``y = W norm(x)``.

    Args:
        x: Hidden states of a few tokens. Shape (T, H), float32, bfloat16 or float16.
        norm: The layer's norm.
        matrix: Joined projections, or the router.
        dtype: Dtype of y; None is the dtype of x.

    Returns:
        Shape (T, N). Sums are float32, and the normalised x is not rounded.
    """
    dtype = dtype or x.dtype
    run = norm_matvec_kernel if use_kernels() else norm_matvec_reference
    return run(x, norm, matrix, dtype)


def matvec_residual_reference(x: mx.array, matrix: Matrix, residual: mx.array, gate: Gate | None) -> mx.array:
    """Compute ``matvec_residual`` in plain MLX operations."""
    wide = x.astype(mx.float32)
    if gate is not None:
        wide = wide * mx.sigmoid(gate.reference(x.shape[1]).astype(mx.float32))
    return (matrix.reference(wide) + residual.astype(mx.float32)).astype(x.dtype)


def matvec_residual_kernel(x: mx.array, matrix: Matrix, residual: mx.array, gate: Gate | None) -> mx.array:
    """Compute ``matvec_residual`` on the GPU, in one launch. Kernel: kernels/matvec_residual.metal."""
    place = (0, 0, 4, 4) if gate is None else (gate.rows.shape[1], *gate[1:])
    key = (x.dtype, x.shape[1], matrix.weight.shape[0], matrix.scales.dtype, *matrix[3:], gate is None, place)
    made = _residual_kernels.get(key)
    if made is None:
        constants, geometry = _constants(x, matrix)
        names = ("GATE_PITCH", "GATE_AT", "HEAD", "HEAD_PITCH")
        gates = (("HAS_GATE", gate is not None), *zip(names, place, strict=True))
        made = _residual_kernels[key] = Kernel("matvec_residual", constants + gates, geometry.threadgroup), geometry
    kernel, geometry = made
    tokens, outputs = x.shape[0], matrix.weight.shape[0]
    (out,) = kernel_source.launch(
        kernel,
        [x, x if gate is None else gate.rows, *matrix[:3], residual],
        [((tokens, outputs), x.dtype)],
        geometry.grid(tokens, outputs),
    )
    return out


def matvec_residual(x: mx.array, matrix: Matrix, residual: mx.array, gate: Gate | None = None) -> mx.array:
    """Multiply a mixer's output with its last matrix and add the residual: ``residual + W (sigmoid(gate) * x)``.

    Args:
        x: The mixer's output for a few tokens. Shape (T, H), float32, bfloat16 or float16.
        matrix: The output projection.
        residual: Shape (T, N).
        gate: Position of each value's gate, or None for gates of one. Its head is a multiple of 4.

    Returns:
        Shape (T, N), dtype of x. Sums are float32, rounded once.
    """
    run = matvec_residual_kernel if use_kernels() else matvec_residual_reference
    return run(x, matrix, residual, gate)
