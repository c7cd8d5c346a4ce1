"""ExpertBank: the slots of one layer in MLX memory. I/O threads write records into it, kernels read them."""

from functools import cached_property

import mlx.core as mx
import numpy as np

from ..errors import ShapeError
from ..formats.expert_layout import RecordLayout

MLX_DTYPES = {"U32": mx.uint32, "U8": mx.uint8, "F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}

_WORD_BYTES = 4
_MAX_WORDS = 2**31 - 1  # MLX's dimensions are int32


class ExpertBank:
    """S slots of one layer, each one record long.

    The array is allocated once and never rebound: Python's reference to it keeps MLX from donating
    its buffer, and the memoryviews stay valid as long as the bank lives. A slot may be overwritten
    only after the last computation that reads it was waited for.

    Attributes:
        layout: What a record looks like.
        num_slots: S.
        array: Slots, shape (S, record_bytes / 4), uint32.
    """

    def __init__(self, layout: RecordLayout, num_slots: int):
        """Allocate S zeroed slots.

        Raises:
            ShapeError: If the bank would have more elements than an MLX array can.
        """
        words, remainder = divmod(layout.record_bytes, _WORD_BYTES)
        if remainder or not 1 <= num_slots * words <= _MAX_WORDS:
            raise ShapeError(
                f"[ExpertBank] {num_slots} slots of {layout.record_bytes} bytes must be between 1 and "
                f"{_MAX_WORDS} words of 4 bytes. Lower memory_limit."
            )
        self.layout = layout
        self.num_slots = num_slots
        self.array = mx.zeros((num_slots, words), dtype=mx.uint32)
        mx.eval(self.array)
        self._parts: dict[str, mx.array] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.layout.record_bytes

    @cached_property
    def _bytes(self) -> memoryview:
        return memoryview(self.array).cast("B")

    @cached_property
    def address(self) -> int:
        """Address of the first slot's first byte, on backends whose memory the processor reads."""
        return int(np.frombuffer(self._bytes, np.uint8).ctypes.data)

    def slot(self, index: int) -> memoryview:
        """Writable bytes of one slot, ``record_bytes`` long."""
        start = index * self.layout.record_bytes
        return self._bytes[start : start + self.layout.record_bytes]

    def part(self, name: str) -> mx.array:
        """One part of every slot, without a copy.

        Args:
            name: "gate_proj.weight" and so on.

        Returns:
            Typed view of shape (S, *part.shape), strided from record to record.
        """
        if name not in self._parts:
            part = self.layout.by_name[name]
            dtype = MLX_DTYPES[part.dtype]
            strides = [self.layout.record_bytes // dtype.size]
            for axis in range(len(part.shape)):
                step = 1
                for dimension in part.shape[axis + 1 :]:
                    step *= dimension
                strides.append(step)
            view = mx.as_strided(
                self.array.view(dtype), (self.num_slots, *part.shape), strides, part.offset // dtype.size
            )
            mx.eval(view)
            self._parts[name] = view
        return self._parts[name]
