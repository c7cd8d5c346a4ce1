"""Quantises rows of weights with MLX's own operation, so that the bytes are mlx_lm.convert's.

MLX's operation is single-threaded on the CPU, so each worker thread has its own stream; two threads keep two cores
busy.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..experts.thread_streams import borrow_stream
from ..formats.expert_layout import Quantization
from ..ops.quantized import dequantize, mlx_arguments
from ..ops.slot_memory import MLX_DTYPES
from .settings import Conversion

Bytes = np.ndarray
"""uint8, one dimension, contiguous."""

_NUMPY = {"U32": np.uint32, "U8": np.uint8, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass
class ErrorSums:
    """Sums from which the quantisation error is computed; they add up over tasks."""

    count: int = 0
    squared: float = 0.0
    weight_squared: float = 0.0
    largest: float = 0.0

    def add(self, other: "ErrorSums") -> None:
        self.count += other.count
        self.squared += other.squared
        self.weight_squared += other.weight_squared
        self.largest = max(self.largest, other.largest)

    def to_json(self) -> dict[str, float]:
        """Return the RMSE, the largest absolute error, and the RMSE relative to the weights' root mean square."""
        return {
            "rmse": (self.squared / self.count) ** 0.5 if self.count else 0.0,
            "max": self.largest,
            "relative": (self.squared / self.weight_squared) ** 0.5 if self.weight_squared else 0.0,
            "weights": self.count,
        }


def quantise(
    rows: int, parts: Mapping[str, tuple[str, Bytes]], conversion: Conversion, *, measure: bool
) -> tuple[dict[str, Bytes], ErrorSums | None]:
    """Quantise whole rows.

    Args:
        rows: Number of rows.
        parts: (dtype, bytes) of "weight" and of the other parts of the source's quantisation, by name.
        conversion: Source and target quantisation.
        measure: Whether to measure the error, which takes longer than the quantisation itself.

    Returns:
        The bytes of the target's parts, by name; and the error, if measured.
    """
    with mx.stream(worker_stream()):
        arrays = {
            name: to_mlx(dtype, data, _shape_of(name, rows, conversion.source)) for name, (dtype, data) in parts.items()
        }
        if conversion.source:
            weight = dequantize(arrays, conversion.source, MLX_DTYPES[conversion.dtype])
        else:
            weight = arrays["weight"]
        weight = weight.astype(MLX_DTYPES[conversion.dtype])
        result = mx.quantize(weight, **mlx_arguments(conversion.target))
        sums = _sums(weight, result, conversion.target) if measure else ()
        mx.eval(*result, *sums)
        error = ErrorSums(weight.size, *(float(value.item()) for value in sums)) if measure else None
        return {
            name: to_bytes(value) for name, value in zip(conversion.target.scheme.parts, result, strict=True)
        }, error


def to_bytes(value: mx.array) -> Bytes:
    """Return an evaluated array's bytes, without a copy."""
    return np.frombuffer(memoryview(value).cast("B"), np.uint8) if value.size else np.empty(0, np.uint8)


def worker_stream() -> mx.Stream:
    """Return this thread's own stream, which the next packing's threads use again."""
    borrow_stream()
    return mx.default_stream(mx.default_device())


def to_mlx(dtype: str, data: Bytes, shape: tuple[int, ...]) -> mx.array:
    """Return an array of a safetensors dtype; one dimension may be -1."""
    value = mx.array(data.view(_NUMPY[dtype]).reshape(shape))
    return value.view(mx.bfloat16) if dtype == "BF16" else value


def _shape_of(part: str, rows: int, source: Quantization | None) -> tuple[int, ...]:
    """Return the shape of a part of a matrix, its columns as -1; () if the part is a single number."""
    if source is None or part == "weight":
        return rows, -1
    return () if part in source.scheme.factors else (-(-rows // source.scheme.block_rows), -1)


def _sums(weight: mx.array, result: tuple[mx.array, ...], target: Quantization) -> tuple[mx.array, ...]:
    before = weight.astype(mx.float32)
    difference = mx.dequantize(*result, **mlx_arguments(target)).astype(mx.float32) - before
    return (difference.square().sum(), before.square().sum(), difference.abs().max())
