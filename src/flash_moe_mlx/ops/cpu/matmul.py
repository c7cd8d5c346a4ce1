"""Products of rows with stored matrices: many matrices at once, or one MLX array."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ...formats.expert_layout import Quantization
from .arrays import KINDS, NAMES, Output, address, empty, floats, view
from .elementwise import permute_for_dots
from .kernels import (
    BIAS,
    BIASES,
    COLUMNS,
    FACTOR,
    ROWS,
    SCALES,
    SUMS,
    WEIGHTS,
    Format,
    X,
    Y,
    affine,
    dense,
    format_of,
    matvec_kernel,
    permutation,
    tiles_kernel,
)
from .threads import ALONE_BYTES, run
from .tile_ir import PACK_BLOCK

MATVEC_ROWS = 8
"""Maximum number of rows multiplied one by one; beyond it, weights are unpacked once for all rows."""


@dataclass(frozen=True)
class Matrices:
    """P matrices of one shape and format, by address: in MLX arrays, expert slots or mapped files.

    The owner keeps the memory alive for as long as a product runs.

    Attributes:
        format: Storage format of the weights.
        outputs: Number of rows of each matrix.
        weights: Address of each matrix's first byte. Shape (P,), int64.
        scales: Address of each matrix's scales, or None if unquantised. Shape (P,), int64.
        biases: Address of each matrix's biases, or None if unquantised or coded. Shape (P,), int64.
        factors: Factor on each matrix's products, for coded weights. Shape (P,), float32.
        bias: Addresses of vectors that are added to the outputs, or None.
        bias_kind: Floating-point format of ``bias``.
    """

    format: Format
    outputs: int
    weights: np.ndarray
    scales: np.ndarray | None = None
    biases: np.ndarray | None = None
    factors: np.ndarray | None = None
    bias: np.ndarray | None = None
    bias_kind: int = 0

    def followed_by(self, other: "Matrices") -> "Matrices | None":
        """Concatenate these matrices and others. Returns None if shapes or formats differ."""

        def described(matrices: Matrices) -> tuple[object, ...]:
            bias_kind = None if matrices.bias is None else matrices.bias_kind
            return matrices.format, matrices.outputs, bias_kind, matrices.factors is None

        if described(self) != described(other):
            return None

        def joined(own: np.ndarray | None, others: np.ndarray | None) -> np.ndarray | None:
            return None if own is None or others is None else np.concatenate([own, others])

        return replace(
            self,
            weights=np.concatenate([self.weights, other.weights]),
            scales=joined(self.scales, other.scales),
            biases=joined(self.biases, other.biases),
            factors=joined(self.factors, other.factors),
            bias=joined(self.bias, other.bias),
        )

    def jobs(self, index: np.ndarray) -> np.ndarray:
        """Return the jobs of the matrices at ``index``, without x and y."""
        jobs = np.zeros((len(index), COLUMNS), np.int64)
        parts = ((WEIGHTS, self.weights), (SCALES, self.scales), (BIASES, self.biases), (BIAS, self.bias))
        for column, part in parts:
            if part is not None:
                jobs[:, column] = part[index]
        if self.factors is not None:
            jobs[:, FACTOR] = address(self.factors) + index * self.factors.itemsize
        return jobs


def _places(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the addresses of rows, int64."""
    return address(array) + rows.astype(np.int64) * array.strides[0]


def row_products(
    x: np.ndarray, matrices: Matrices, index: np.ndarray, y: np.ndarray, x_rows: np.ndarray, y_rows: np.ndarray
) -> None:
    """Compute ``y[y_rows[i]] = W[index[i]] x[x_rows[i]]``, one row each; used in decode.

    Args:
        x: Rows. Shape (T, inputs), contiguous float32.
        matrices: Matrices W.
        index: Matrix of each product. Shape (P,).
        y: Result, shape (Q, outputs), contiguous float32.
        x_rows: Row of x of each product. Shape (P,).
        y_rows: Row of y of each product. Shape (P,).

    The bits of a product depend on no other product.
    """
    form, inputs = matrices.format, x.shape[1]
    jobs = matrices.jobs(index)
    if form.bits:
        ordered, sums = empty(*x.shape), empty(len(x), form.groups(inputs))
        permute_for_dots(x, *permutation(form), form.group_size, ordered, sums)
        jobs[:, SUMS] = _places(sums, x_rows)
        x = ordered
    jobs[:, X], jobs[:, Y] = _places(x, x_rows), _places(y, y_rows)
    scalars = (matrices.outputs, inputs, form.row_bytes(inputs), matrices.bias_kind)
    work = len(jobs) * matrices.outputs * form.row_bytes(inputs)
    run(matvec_kernel(form), jobs, *scalars, alone=work < ALONE_BYTES)


def block_products(
    x: np.ndarray,
    matrices: Matrices,
    index: np.ndarray,
    y: np.ndarray,
    x_rows: np.ndarray,
    y_rows: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Compute ``y[y_rows[i]] = W[index[p]] x[x_rows[i]]`` for ``counts[p]`` consecutive i; used in prefill.

    Args:
        x: Rows. Shape (T, inputs), contiguous float32.
        matrices: Matrices W.
        index: Matrix of each product. Shape (P,).
        y: Result, shape (Q, outputs), contiguous float32.
        x_rows: Row of x of each row of the products. Shape (R,).
        y_rows: Row of y of each row of the products. Shape (R,).
        starts: First i of each product. Shape (P,).
        counts: Number of rows of each product. Shape (P,).

    The bits of a row depend on no other row.
    """
    form, inputs = matrices.format, x.shape[1]
    jobs, sources, targets = matrices.jobs(index), _places(x, x_rows), _places(y, y_rows)
    jobs[:, X], jobs[:, Y] = _places(sources, starts), _places(targets, starts)
    jobs[:, ROWS] = counts
    scalars = (matrices.outputs, inputs, form.row_bytes(inputs), matrices.bias_kind)
    run(tiles_kernel(form), jobs, *scalars)


def _product(x: mx.array, matrices: Matrices) -> mx.array:
    rows = floats(x).reshape(-1, x.shape[-1])
    made, each = Output(*x.shape[:-1], matrices.outputs), np.arange(len(rows))
    y = made.array.reshape(len(rows), matrices.outputs)
    if len(rows) <= MATVEC_ROWS or x.shape[-1] % PACK_BLOCK:
        row_products(rows, matrices, np.zeros(len(rows), np.int64), y, each, each)
    else:
        one = np.zeros(1, np.int64)
        block_products(rows, matrices, one, y, each, each, one, np.array([len(rows)]))
    return made.result(x.dtype)


def quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    """Compute ``x W^T`` of an affine-quantised matrix, for any number of rows; see ``ops.dequant_matvec``.

    Args:
        x: Rows. Shape (..., inputs).
        weight: Packed weights. Shape (outputs, inputs * bits / 32), uint32.
        scales: Scales, read as stored. Shape (outputs, inputs / group_size), float32, bfloat16 or float16.
        biases: Biases, of the same shape and dtypes.
        bits: Bits per weight: 2, 3, 4, 5, 6 or 8.
        group_size: Number of weights that share a scale and a bias: 32, 64 or 128.

    Returns:
        The product. Shape (..., outputs), dtype of x. Sums are float32. The bits of a row depend on no other row, only
        on whether there are more than MATVEC_ROWS.
    """
    memory = [view(part, np.uint8) for part in (weight, scales, biases)]
    weights, own_scales, own_biases = (np.array([address(part)]) for part in memory)
    form = affine(bits, group_size, KINDS[scales.dtype])
    return _product(x, Matrices(form, weight.shape[0], weights, own_scales, own_biases))


def coded_matmul(x: mx.array, parts: Mapping[str, mx.array], quantization: Quantization, factor: float) -> mx.array:
    """Compute ``x W^T`` of a matrix in a supported mode other than affine, for any number of rows.

    Args:
        x: Rows. Shape (..., inputs).
        parts: The matrix's "weight" and "scales".
        quantization: The matrix's quantisation.
        factor: Factor on the products.

    Returns:
        The product. Shape (..., outputs), dtype of x. Sums are float32.
    """
    weight, scales = (view(parts[name], np.uint8) for name in ("weight", "scales"))
    form = format_of(quantization, NAMES[parts["scales"].dtype])
    places = np.array([address(weight)]), np.array([address(scales)])
    factors = None if factor == 1.0 else np.array([factor], np.float32)
    return _product(x, Matrices(form, parts["weight"].shape[0], *places, places[1] if form.excess else None, factors))


def takes_dense(weight: mx.array) -> bool:
    """Return whether ``dense_matmul`` supports this matrix, whose rows must divide into blocks."""
    return weight.shape[1] % PACK_BLOCK == 0 and weight.dtype in KINDS


def dense_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """Compute ``x W^T`` of an unquantised matrix (outputs, inputs) that ``takes_dense``; x is (..., inputs).

    The result has the dtype of x; sums are float32.
    """
    kind, memory = KINDS[weight.dtype], view(weight, np.uint8)
    return _product(x, Matrices(dense(kind), weight.shape[0], np.array([address(memory)])))
