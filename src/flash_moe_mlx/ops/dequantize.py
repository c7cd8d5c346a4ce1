"""Affine-quantised matrices as plain ones of a small dtype: what prompts multiply with on CUDA."""

from functools import cache
from math import prod

import mlx.core as mx

from ..formats.expert_layout import Quantization
from ..formats.schemes import AFFINE
from .gpu import kernel_source
from .gpu.kernel_source import Kernel
from .slot_memory import MLX_DTYPES, ExpertRecords

THREADS, EACH = 256, 8
KERNEL_BITS = (2, 4, 8)


def has_kernel(quantization: Quantization | None) -> bool:
    """Return whether the kernel knows a quantisation."""
    return quantization is not None and quantization.mode == AFFINE.mode and quantization.bits in KERNEL_BITS


@cache
def dequantize_kernel(bits: int, group_size: int, scales: mx.Dtype, dense: mx.Dtype) -> Kernel:
    """Return kernels/dequantize.metal for one quantisation and the dtypes of its scales and of the result."""
    constants = (("BITS", bits), ("GROUP", group_size), ("S", scales), ("X", dense), ("EACH", EACH))
    return Kernel("dequantize", constants, (THREADS, 1, 1))


@cache
def _place(*numbers: int) -> mx.array:
    place = mx.array([*numbers, 0], mx.uint32)
    mx.eval(place)
    return place


def dense_matrix(
    weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int, dtype: mx.Dtype
) -> mx.array:
    """Dequantise one matrix, or some of its rows, in one launch. Kernel: kernels/dequantize.metal.

    Args:
        weight: Packed weights. Shape (out, in * bits / 32), uint32.
        scales: Scales. Shape (out, in / group_size).
        biases: Biases, shape and dtype of the scales.
        bits: 2, 4 or 8.
        group_size: Number of weights that share a scale.
        dtype: Dtype of the result.

    Returns:
        Shape (out, in). Computed in float32 and rounded once.
    """
    outputs, inputs = weight.shape[0], scales.shape[1] * group_size
    arrays = [weight, scales, biases, mx.zeros((1,), mx.uint32)]
    dtypes, none = (scales.dtype, dtype), (0, 0, 0)
    return _run(arrays, 1, (outputs, inputs), bits, group_size, dtypes, none[:2], none)[0]


def dense_experts(records: ExpertRecords, projection: str, slots: mx.array, dtype: mx.Dtype) -> mx.array:
    """Dequantise one projection of several experts out of their records, in one launch.

    Args:
        records: Slots of one layer.
        projection: "gate_proj", "up_proj" or "down_proj", of a quantisation that `has_kernel`.
        slots: The experts' slots. Shape (M,), uint32.
        dtype: Dtype of the result.

    Returns:
        Shape (M, out, in). Computed in float32 and rounded once.
    """
    layout, quantization = records.layout, records.layout.quantization(projection)
    assert quantization is not None
    parts = {part.part: part for part in layout.quantized_parts(projection)}
    small = MLX_DTYPES[parts["scales"].dtype]
    floats = records.array.view(small)
    out, groups = parts["scales"].shape
    return _run(
        [records.array, floats, floats, slots],
        len(slots),
        (out, groups * quantization.group_size),
        quantization.bits,
        quantization.group_size,
        (small, dtype),
        (layout.record_bytes // 4, layout.record_bytes // small.size),
        (parts["weight"].offset // 4, parts["scales"].offset // small.size, parts["biases"].offset // small.size),
    )


def _run(
    arrays: list[mx.array],
    matrices: int,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    dtypes: tuple[mx.Dtype, mx.Dtype],
    pitches: tuple[int, int],
    offsets: tuple[int, int, int],
) -> mx.array:
    count = prod(shape)
    threads = -(-count // (EACH * THREADS)) * THREADS
    kernel = dequantize_kernel(bits, group_size, *dtypes)
    arrays = [*arrays, _place(count, threads, *pitches, *offsets)]
    (dense,) = kernel_source.launch(kernel, arrays, [((matrices, *shape), dtypes[1])], (threads, matrices, 1))
    return dense
