"""Products with quantised matrices of any mode, and their dequantised weights: MLX's operations, or the mode's own.

A matrix is its parts by name, as the mode's entry in `formats.schemes` lists them.
"""

from collections.abc import Mapping
from math import prod

import mlx.core as mx

from ..formats.expert_layout import PROJECTIONS, Quantization, RecordLayout
from ..formats.schemes import AFFINE
from .backend import use_cpu_kernels, use_kernels
from .dequant_matmul import TILE_BYTES, dequant_matmul, dequantizes
from .dequant_matvec import dequant_matvec, dequant_matvec_reference

GATHERED_BYTES = 64 << 20
"""Memory of experts that MLX's operations compute at once: beyond it they come one by one, to the same bits."""

_MANY_PAIRS = 64  # more experts than that are seldom waiting at once where they are small

Parts = Mapping[str, mx.array]
"""A quantised matrix, or a stack of them: "weight" and the other parts of its mode."""


def has_kernels(layout: RecordLayout, backend: str) -> bool:
    """Return whether our kernels of a backend, "cpu" or "gpu", take a record's layout and quantised projections."""
    known = all(q is None or backend in q.scheme.kernels for _, q in layout.quantizations)
    if backend == "cpu":
        return known and all(_steps_over_rows(layout, *own) for own in layout.quantizations)
    return known and not layout.has_views and layout.projections == PROJECTIONS


def _steps_over_rows(layout: RecordLayout, projection: str, quantization: Quantization | None) -> bool:
    """Return whether the CPU's kernels read a projection's rows in place: in order, or every other one of codes."""
    apart = {part.rows_apart for part in layout.parts if part.projection == projection}
    return apart == {1} or (apart == {2} and quantization is not None and quantization.scheme.coded)


def pair_bytes(layout: RecordLayout) -> int:
    """Return the peak memory of MLX's operations for one expert on a few rows, besides its record.

    Two projections are alive at once: their gathered parts, and the weights computed from them.
    """
    each = max(_bytes_per_weight(quantization) for _, quantization in layout.quantizations)
    return 2 * layout.hidden_size * layout.intermediate_size * each


def come_one_by_one(layout: RecordLayout, pairs: int) -> bool:
    """Return whether so many pairs of a token and an expert are computed one after the other, to bound their scratch.

    A GPU's graph stays lazy, unless weights are dequantised by several operations.
    """
    lazily = use_kernels() and all(q is None or _multiplies(q) for _, q in layout.quantizations)
    return not lazily and pairs * pair_bytes(layout) > GATHERED_BYTES


def reference_bytes(layout: RecordLayout) -> int:
    """Return the scratch of experts that MLX's operations compute; 0 where kernels take the layout."""
    if (use_cpu_kernels() and has_kernels(layout, "cpu")) or (use_kernels() and has_kernels(layout, "gpu")):
        return 0
    return max(min(GATHERED_BYTES, _MANY_PAIRS * pair_bytes(layout)), pair_bytes(layout))


def _bytes_per_weight(quantization: Quantization | None) -> int:
    if quantization is None:
        return 8  # as stored, and float32
    # Dequantised: codes, scales and products in float32, rounded once, and float32 again.
    return 2 if _multiplies(quantization) else 24


def dequantize(parts: Parts, quantization: Quantization, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return the weights, shape (..., out, in). Float parts are converted to ``dtype`` before they are multiplied."""
    own = _completed(parts, quantization, dtype)
    reference = quantization.scheme.dequantise or _DEQUANTISE.get(quantization.mode)
    if reference is not None:
        return reference(own, quantization.bits, quantization.group_size).astype(dtype)
    weight = mx.dequantize(own["weight"], own["scales"], own.get("biases"), dtype=dtype, **mlx_arguments(quantization))
    return _times_factors(weight, parts, quantization)


def _fp8(parts: Parts, bits: int, group_size: int) -> mx.array:
    """Dequantise 8-bit floats with a scale per ``group_size`` rows and columns to bfloat16, as mlx-lm does."""
    weight, scales = parts["weight"], parts["weight_scale_inv"]
    for axis in (-2, -1):
        scales = mx.repeat(scales, group_size, axis=axis)
    scales = scales[..., : weight.shape[-2], : weight.shape[-1]]
    return (mx.from_fp8(weight, dtype=scales.dtype) * scales).astype(mx.bfloat16)


_DEQUANTISE = {"fp8": _fp8}
"""References of modes that MLX doesn't have, by name."""


def _multiplies(quantization: Quantization) -> bool:
    """Return whether MLX multiplies with matrices of this mode without dequantising them first."""
    return quantization.scheme.dequantise is None and quantization.mode not in _DEQUANTISE


def _times_factors(y: mx.array, parts: Parts, quantization: Quantization) -> mx.array:
    """Multiply with the scales of whole matrices, of which ``parts`` has one or one for each leading index of y."""
    for name, factor in quantization.scheme.factors.items():
        value = factor(parts[name].astype(mx.float32))
        y = (y * value.reshape(*value.shape, 1, 1)).astype(y.dtype)
    return y


def _completed(parts: Parts, quantization: Quantization, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return the parts for MLX's operations: floats of one dtype, with biases if the mode implies them."""
    own = {
        name: part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part
        for name, part in parts.items()
        if name not in quantization.scheme.factors
    }
    if quantization.scheme.excess:
        own["biases"] = -quantization.scheme.excess * own["scales"]
    return own


def mlx_arguments(quantization: Quantization) -> dict[str, int | str]:
    """Return what MLX's quantised operations are told of a quantisation."""
    mode = AFFINE.mode if quantization.scheme.excess else quantization.scheme.stated_mode
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": mode}


def product_reference(x: mx.array, parts: Parts, quantization: Quantization) -> mx.array:
    """Multiply rows of x (..., in) with the matrix in plain MLX operations, with float32 sums.

    Returns:
        Shape (..., out), dtype of x.
    """
    rows, own = x.astype(mx.float32), _completed(parts, quantization, mx.float32)
    if quantization.mode == AFFINE.mode:
        sizes = {"bits": quantization.bits, "group_size": quantization.group_size}
        return dequant_matvec_reference(x, own["weight"], own["scales"], own["biases"], **sizes)
    if not _multiplies(quantization) or dequantizes():
        return _tiled_product(rows, parts, quantization).astype(x.dtype)
    y = mx.quantized_matmul(rows, own["weight"], own["scales"], own.get("biases"), **mlx_arguments(quantization))
    return _times_factors(y, parts, quantization).reshape(y.shape).astype(x.dtype)


def _tiled_product(x: mx.array, parts: Parts, quantization: Quantization) -> mx.array:
    """Multiply float32 rows with the matrix, dequantised some of its rows at a time where they are many."""
    outputs, block = parts["weight"].shape[0], quantization.scheme.block_rows
    tile = max(1, TILE_BYTES // (x.shape[-1] * mx.float32.size * block)) * block
    if outputs <= tile:
        return x @ dequantize(parts, quantization).T
    results = []
    for first in range(0, outputs, tile):
        own = {
            name: part
            if part.ndim == 0
            else part[first : first + tile]
            if name == "weight" or block == 1
            else part[first // block : -(-(first + tile) // block)]
            for name, part in parts.items()
        }
        results.append(x @ dequantize(own, quantization).T)
        mx.eval(results[-1])
    return mx.concatenate(results, axis=-1)


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
        if use_cpu_kernels() and "cpu" in quantization.scheme.kernels:
            from .cpu.matmul import coded_matmul

            factors = quantization.scheme.factors.items()
            return coded_matmul(x, parts, quantization, prod(factor(parts[name].item()) for name, factor in factors))
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
    if quantization is None or not _multiplies(quantization) or dequantizes():
        # In float32, then rounded once: in bfloat16 the product with the scale would be rounded as well.
        dense = parts["weight"] if quantization is None else dequantize(parts, quantization)
        return grouped_product(x, dense.astype(x.dtype), index)
    own = _completed(parts, quantization, x.dtype)
    y = mx.gather_qmm(
        x,
        own["weight"],
        own["scales"],
        own.get("biases"),
        rhs_indices=index,
        transpose=True,
        sorted_indices=True,
        **mlx_arguments(quantization),
    )
    return _times_factors(y, {name: parts[name][index] for name in quantization.scheme.factors}, quantization)


def grouped_product(x: mx.array, matrices: mx.array, index: mx.array) -> mx.array:
    """Multiply rows (R, 1, in), sorted by matrix, with one of several plain matrices (S, out, in) each."""
    # Reshaped, not expanded: MLX's grouped product on CUDA takes the stride of the axis of one for that of the rows.
    x = x.reshape(len(x), -1).reshape(len(x), 1, -1)
    return mx.gather_mm(x, matrices.swapaxes(-1, -2), rhs_indices=index, sorted_indices=True)


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
    if not _multiplies(quantization):
        return mx.gather_mm(x, dequantize(parts, quantization).swapaxes(-1, -2), rhs_indices=index)
    own = _completed(parts, quantization, mx.float32)
    y = mx.gather_qmm(
        x,
        own["weight"],
        own["scales"],
        own.get("biases"),
        rhs_indices=index,
        transpose=True,
        **mlx_arguments(quantization),
    )
    factors = {name: parts[name][index] for name in quantization.scheme.factors}
    return _times_factors(y, factors, quantization)
