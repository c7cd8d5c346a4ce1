"""MLX arrays as memory: numpy views and addresses of MLX's buffers, and results returned to MLX."""

from ctypes import addressof, c_char, c_float
from math import prod

import mlx.core as mx
import numpy as np

from .vector_ir import BF16, F16, F32

KINDS = {mx.bfloat16: BF16, mx.float16: F16, mx.float32: F32}
RECORD_KINDS = {"BF16": BF16, "F16": F16, "F32": F32}
NAMES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint8: "U8"}
"""Safetensors names of dtypes."""

_ALIGNMENT = 64
_COPIED_BYTES = 1 << 18
"""Size up to which copying a result costs less than evaluating an array to write it into."""


def view(array: mx.array, dtype: type) -> np.ndarray:
    """Return an array's memory as a flat view of ``dtype``, evaluating it if needed. The view keeps the array alive.

    ``mx.array.view`` would cost an evaluation. Cost: under a microsecond when evaluated and contiguous.
    """
    try:
        return np.frombuffer(array, dtype)  # type: ignore[call-overload, no-any-return]
    except (BufferError, ValueError):  # strided, or empty
        if array.size == 0:
            return np.empty(0, dtype)
        return np.frombuffer(mx.contiguous(array), dtype)  # type: ignore[call-overload, no-any-return]


def floats(array: mx.array) -> np.ndarray:
    """Return an array of any shape as contiguous float32 in numpy, without a copy if it is that already."""
    if array.dtype != mx.float32:
        array = array.astype(mx.float32)
    return view(array, np.float32).reshape(array.shape)


def empty(*shape: int) -> np.ndarray:
    """Return uninitialised float32 memory aligned to a cache line: an unaligned 64-byte load touches two lines."""
    size = 4 * prod(shape)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -address(raw) % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)


def address(array: np.ndarray) -> int:
    """Return the address of an array's first byte."""
    try:
        # A third of the time that array.ctypes takes.
        return addressof(c_char.from_buffer(array))  # type: ignore[arg-type]
    except (BufferError, TypeError, ValueError):  # strided, read-only or empty
        return array.ctypes.data


def float_at(place: int) -> float:
    """Return the float32 at an address."""
    return float(c_float.from_address(place).value)


class Output:
    """Output of a kernel, in float32: written directly into an MLX array if copying it there would cost more.

    Attributes:
        array: The memory, contiguous and uninitialised.
    """

    def __init__(self, *shape: int):
        self._made: mx.array | None = None
        if 4 * prod(shape) > _COPIED_BYTES:
            self._made = mx.zeros(shape, mx.float32)
            mx.eval(self._made)
            self.array = view(self._made, np.float32).reshape(shape)
        else:
            self.array = empty(*shape)

    def result(self, dtype: mx.Dtype) -> mx.array:
        """Return the memory as an MLX array of ``dtype``, lazily converted unless that is float32."""
        result = mx.array(self.array) if self._made is None else self._made
        return result if dtype == mx.float32 else result.astype(dtype)
