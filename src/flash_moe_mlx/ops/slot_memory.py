"""Slot memory: where I/O puts experts' records and where kernels read them.

`ExpertRecords` is what kernels take: records in one MLX array. `ExpertSlots` are the slots of one layer, which records
arrive in. A `SlotMemory` is one kind of memory: it allocates slots and says how records reach them. `UnifiedMemory` is
that of machines where reads go straight into what kernels read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import ShapeError
from ..formats.expert_layout import RecordLayout
from ..storage.pending_reads import ReadRequest
from .allocation import explain_no_memory
from .fetch_records import HostRecords

MLX_DTYPES = {"U32": mx.uint32, "U8": mx.uint8, "F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
DTYPE_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}

_WORD_BYTES = 4
_MAX_WORDS = 2**31 - 1  # MLX's dimensions are int32


class Pending(Protocol):
    """Records on their way to memory."""

    def wait(self) -> int:
        """Wait until every record is whole where it was asked for. Returns bytes read.

        Nothing writes there any more once this has returned or raised.

        Raises:
            StoreError: If a record can't be read.
        """
        ...


class RecordSource(Protocol):
    """Source of records: an ExpertStore, or anything else that fills buffers with them."""

    def submit(self, requests: Sequence[ReadRequest]) -> Pending: ...

    def drain(self) -> None: ...


class ExpertRecords:
    """S records of one layout in one MLX array, as kernels read them.

    Attributes:
        layout: Layout of a record.
        num_slots: S.
        array: Records, shape (S, record_bytes / 4), uint32. Never rebound: Python's reference to it keeps MLX from
            donating its buffer, and memoryviews of it stay valid as long as this object lives.
    """

    def __init__(self, layout: RecordLayout, array: mx.array):
        """Wrap records that lie in an evaluated array."""
        self.layout = layout
        self.num_slots = array.shape[0]
        self.array = array
        self._parts: dict[str, mx.array] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all records, in memory that kernels read."""
        return self.num_slots * self.layout.record_bytes

    @cached_property
    def _bytes(self) -> memoryview:
        return memoryview(self.array).cast("B")

    @cached_property
    def address(self) -> int:
        """Address of the first record's first byte, on backends whose memory the processor reads."""
        return int(np.frombuffer(self._bytes, np.uint8).ctypes.data)

    def part(self, name: str) -> mx.array:
        """Return one part of every record, without a copy.

        Args:
            name: "gate_proj.weight" and so on.

        Returns:
            Typed view of shape (S, *part.shape), strided from record to record.
        """
        if name not in self._parts:
            part = self.layout.by_name[name]
            dtype = MLX_DTYPES[part.dtype]
            strides = [self.layout.record_bytes // dtype.size, *part.element_strides]
            view = mx.as_strided(
                self.array.view(dtype), (self.num_slots, *part.shape), strides, part.offset // dtype.size
            )
            mx.eval(view)
            self._parts[name] = view
        return self._parts[name]


class ExpertSlots(ExpertRecords, ABC):
    """Slots of one layer, which records arrive in.

    A slot may be overwritten only after the last computation that reads it was waited for, and read only after its
    record was: both are the caller's part.
    """

    def __init__(self, layout: RecordLayout, num_slots: int):
        """Allocate S zeroed slots.

        Raises:
            MemoryLimitError: If there is no memory left.
            ShapeError: If they would have more elements than an MLX array can.
        """
        words, remainder = divmod(layout.record_bytes, _WORD_BYTES)
        if remainder or not 1 <= num_slots * words <= _MAX_WORDS:
            raise ShapeError(
                f"[ExpertSlots] {num_slots} slots of {layout.record_bytes} bytes must be between 1 and "
                f"{_MAX_WORDS} words of 4 bytes. Lower memory_limit."
            )
        with explain_no_memory():
            array = mx.zeros((num_slots, words), dtype=mx.uint32)
            mx.eval(array)
        super().__init__(layout, array)

    @abstractmethod
    def receive(self, slots: Mapping[int, int]) -> Pending:
        """Start bringing experts' records into slots.

        Args:
            slots: Slot of each expert. Nobody reads them until the result was waited for.
        """

    @abstractmethod
    def copy_out(self, slot: int) -> Any:
        """Return a copy of a slot's record for `copy_in`, of these or of other slots, in memory of the same kind."""

    @abstractmethod
    def copy_in(self, slot: int, record: Any) -> None:
        """Write a record that `copy_out` returned into a slot; kernels may read it on return."""


class SlotMemory(Protocol):
    """A kind of memory for slots, and the way that records take to it."""

    @property
    def source(self) -> RecordSource:
        """Where records come from."""
        ...

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that it takes besides the slots."""
        ...

    def allocate(self, layer: int, layout: RecordLayout, num_slots: int) -> ExpertSlots:
        """Allocate the slots of a layer.

        Raises:
            MemoryLimitError: If there is no memory left.
            ShapeError: If they would have more elements than an MLX array can.
        """
        ...

    def host_records(self, layer: int) -> HostRecords | None:
        """Return where a GPU finds a layer's records in host memory; None if it can't read them by itself."""
        ...

    def passing(self, layer: int) -> ExpertSlots | None:
        """Return slots for a prompt's experts that have none, shared by all layers; None without room for two.

        What reads them must have been computed before they are overwritten, and before this is called again.
        """
        ...

    def drain(self) -> None:
        """Wait until nothing writes into any slot, after an interrupt, when nobody waits any more.

        Raises:
            StoreError: If a read hangs, which may still write into its slot.
        """
        ...

    def close(self) -> None:
        """Release what it holds besides the slots. May be called again."""
        ...


class UnifiedSlots(ExpertSlots):
    """Slots that the processor writes and kernels read: reads end in them."""

    def __init__(self, layout: RecordLayout, num_slots: int, memory: "UnifiedMemory | None" = None, layer: int = 0):
        """Allocate S zeroed slots.

        Args:
            layout: Layout of a record.
            num_slots: S.
            memory: Its source is where `receive` reads records from; None where slots are filled by hand.
            layer: The layer's number.
        """
        super().__init__(layout, num_slots)
        self._memory = memory
        self._layer = layer

    def slot(self, index: int) -> memoryview:
        """Return one slot's writable bytes, ``record_bytes`` long."""
        start = index * self.layout.record_bytes
        return self._bytes[start : start + self.layout.record_bytes]

    def receive(self, slots: Mapping[int, int]) -> Pending:
        """Start reading records straight into their slots: see `ExpertSlots.receive`."""
        assert self._memory is not None
        requests = [ReadRequest(self._layer, expert, self.slot(slot)) for expert, slot in slots.items()]
        return self._memory.source.submit(requests)

    def copy_out(self, slot: int) -> np.ndarray:
        """Return a copy of a slot's record."""
        return np.array(self.slot(slot))

    def copy_in(self, slot: int, record: np.ndarray) -> None:
        """Write a record that `copy_out` returned into a slot."""
        self.slot(slot)[:] = record.data


class UnifiedMemory:
    """SlotMemory that processor and kernels share: of CPUs, and of Apple's chips."""

    host_bytes = 0

    def __init__(self, source: RecordSource):
        """Fill slots from a source of records."""
        self.source = source

    def allocate(self, layer: int, layout: RecordLayout, num_slots: int) -> UnifiedSlots:
        """Allocate the slots of a layer."""
        return UnifiedSlots(layout, num_slots, self, layer)

    def host_records(self, layer: int) -> None:
        """Return None: records are read into the memory that kernels read."""

    def passing(self, layer: int) -> None:
        """Return None: all of the memory for experts is their layers' slots."""

    def drain(self) -> None:
        """Wait until no read is under way."""
        self.source.drain()

    def close(self) -> None:
        """Do nothing: the slots are all that it holds."""
