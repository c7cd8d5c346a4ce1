"""Products with quantised matrices of any mode, and their dequantised weights: MLX's operations, or the mode's own.

A matrix is its parts by name, as the mode's entry in `formats.schemes` lists them.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..formats.expert_layout import Quantization, RecordLayout
from ..formats.schemes import AFFINE
from .backend import use_kernels
from .dequant_matmul import dequant_matmul, dequantizes
from .dequant_matvec import dequant_matvec, dequant_matvec_reference

Parts = Mapping[str, mx.array]
"""A quantised matrix, or a stack of them: "weight" and the other parts of its mode."""


def has_kernels(layout: RecordLayout, backend: str) -> bool:
    """Tell whether our kernels of a backend, "cpu" or "gpu", take every projection of a record that is quantised."""
    return all(q is None or backend in q.scheme.kernels for _, q in layout.quantizations)


def dequantize(parts: Parts, quantization: Quantization, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return the weights, shape (..., out, in). Float parts are converted to ``dtype`` before they are multiplied."""
    own = _in_dtype(parts, dtype)
    if quantization.scheme.dequantise is not None:
        return quantization.scheme.dequantise(own, quantization.bits, quantization.group_size).astype(dtype)
    return mx.dequantize(own["weight"], own["scales"], own.get("biases"), dtype=dtype, **mlx_arguments(quantization))


def mlx_arguments(quantization: Quantization) -> dict[str, int | str]:
    """Return what MLX's quantised operations are told of a quantisation."""
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}


def product_reference(x: mx.array, parts: Parts, quantization: Quantization) -> mx.array:
    """Multiply rows of x (..., in) with the matrix in plain MLX operations, with float32 sums.

    Returns:
        Shape (..., out), dtype of x.
    """
    rows, own = x.astype(mx.float32), _in_dtype(parts, mx.float32)
    if quantization.mode == AFFINE.mode:
        sizes = {"bits": quantization.bits, "group_size": quantization.group_size}
        return dequant_matvec_reference(x, own["weight"], own["scales"], own["biases"], **sizes)
    if quantization.scheme.dequantise is not None or dequantizes():
        return (rows @ dequantize(own, quantization).T).astype(x.dtype)
    y = mx.quantized_matmul(rows, own["weight"], own["scales"], own.get("biases"), **mlx_arguments(quantization))
    return y.astype(x.dtype)


def product(x: mx.array, parts: Parts, quantization: Quantization) -> mx.array:
    """Multiply rows of x with the matrix, with whichever kernel takes it.

    Args:
        x: Rows. Shape (..., in), float32, bfloat16 or float16.
        parts: The matrix, (out, in).
        quantization: Its quantisation.

    Returns:
        Shape (..., out), dtype of x. Sums are float32.

    Raises:
        ShapeError: If the shapes don't belong together.
    """
    if quantization.mode != AFFINE.mode:
        return product_reference(x, parts, quantization)
    sizes = {"bits": quantization.bits, "group_size": quantization.group_size}
    return dequant_matvec(x, parts["weight"], parts["scales"], parts["biases"], **sizes)


def lazy_product(x: mx.array, parts: Parts, quantization: Quantization) -> mx.array:
    """Return ``product`` for many rows, unevaluated: kernels that compute at once are not used."""
    if quantization.mode == AFFINE.mode and use_kernels():
        sizes = {"bits": quantization.bits, "group_size": quantization.group_size}
        return dequant_matmul(x, parts["weight"], parts["scales"], parts["biases"], lazy=True, **sizes)
    return product_reference(x, parts, quantization)


def sorted_product(x: mx.array, parts: Parts, quantization: Quantization | None, index: mx.array) -> mx.array:
    """Multiply many rows with one matrix each out of a small stack, rows sorted by matrix.

    On CUDA the stack is dequantised and multiplied by one grouped product: see `dequant_matmul`.

    Args:
        x: Shape (R, 1, in).
        parts: The stack, (S, out, in).
        quantization: Its quantisation; None if it is unquantised.
        index: Matrix of each row, ascending. Shape (R,), uint32.

    Returns:
        Shape (R, 1, out), dtype of x. Sums are float32.
    """
    if quantization is None or quantization.scheme.dequantise is not None or dequantizes():
        # In float32, then rounded once: in bfloat16 the product with the scale would be rounded as well.
        dense = parts["weight"] if quantization is None else dequantize(parts, quantization)
        return mx.gather_mm(x, dense.astype(x.dtype).swapaxes(-1, -2), rhs_indices=index, sorted_indices=True)
    own = _in_dtype(parts, x.dtype)
    return mx.gather_qmm(
        x,
        own["weight"],
        own["scales"],
        own.get("biases"),
        rhs_indices=index,
        transpose=True,
        sorted_indices=True,
        **mlx_arguments(quantization),
    )


def gathered_product(x: mx.array, parts: Parts, quantization: Quantization, index: mx.array) -> mx.array:
    """Multiply rows with one matrix each out of a stack.

    Args:
        x: Shape (T, 1 or K, 1, in), float32.
        parts: The stack, (S, out, in).
        quantization: Its quantisation.
        index: Matrix of each row. Shape (T, K), uint32.

    Returns:
        Shape (T, K, 1, out), float32.
    """
    own = _in_dtype(parts, mx.float32)
    if quantization.scheme.dequantise is not None:
        return mx.gather_mm(x, dequantize(own, quantization).swapaxes(-1, -2), rhs_indices=index)
    return mx.gather_qmm(
        x,
        own["weight"],
        own["scales"],
        own.get("biases"),
        rhs_indices=index,
        transpose=True,
        **mlx_arguments(quantization),
    )


def _in_dtype(parts: Parts, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The parts with those of float dtypes converted."""
    return {n: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v for n, v in parts.items()}
