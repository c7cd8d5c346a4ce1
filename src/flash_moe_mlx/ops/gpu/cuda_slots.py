"""Slot memory of a CUDA GPU: slots stay in its memory, and records are copied into them.

MLX arrays are managed memory on CUDA. If the host read files into them, their pages would migrate to the host and back.
Therefore whole records are copied, on separate streams: directly from the files, mapped and pinned, if host memory has
room for all of them (`MappedMemory`), or through a few pinned buffers that files are read into (`PinnedMemory`).
"""

import ctypes
import queue
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...errors import MemoryLimitError, StoreError
from ...formats.checkpoint import ByteRange
from ...formats.expert_layout import RecordLayout
from ...storage.file_io import ReadOnlyFile
from ...storage.pending_reads import ReadRequest
from ...storage.store import ExpertStore
from ..dequant_matmul import passing_records
from ..fetch_records import HostRecords, host_records
from ..slot_memory import ExpertSlots, Pending
from .cuda_runtime import CudaRuntime

STREAMS = 2
"""Number of streams for copies: a single one leaves the bus idle between two copies."""


class CudaSlots(ExpertSlots):
    """Slots of one layer in a GPU's memory."""

    def __init__(self, memory: "CudaMemory", layer: int, layout: RecordLayout, num_slots: int):
        """Allocate S zeroed slots, which stay on the GPU.

        Raises:
            MemoryLimitError: If the GPU has no memory left.
            ShapeError: If they would have more elements than an MLX array can.
        """
        try:
            super().__init__(layout, num_slots)
            self.address  # noqa: B018 -- asking for the address makes MLX allocate managed memory
        except RuntimeError as error:
            raise MemoryLimitError(
                f"[gpu_memory_limit] the GPU must have room for {num_slots} slots of {layout.record_bytes} bytes in "
                f"layer {layer}, got {error}. Lower gpu_memory_limit, or end other programs on the GPU."
            ) from error
        self._memory = memory
        self.layer = layer
        memory.runtime.keep_on_device(self.address, self.nbytes)

    def slot_address(self, slot: int) -> int:
        """Return the address of a slot's first byte."""
        return self.address + slot * self.layout.record_bytes

    def receive(self, slots: Mapping[int, int]) -> Pending:
        """Start bringing records into slots; implements `ExpertSlots.receive`."""
        return self._memory.start(self, slots)

    def copy_out(self, slot: int) -> mx.array:
        """Return a copy of a slot's record, in the GPU's memory."""
        record = mx.take(self.array, mx.array([slot]), axis=0)
        mx.eval(record)
        return record

    def copy_in(self, slot: int, record: Any) -> None:
        """Write a record that `copy_out` returned into a slot."""
        source = np.frombuffer(memoryview(record).cast("B"), np.uint8)
        self._memory.copy(self.slot_address(slot), source.ctypes.data, self.layout.record_bytes)
        self._memory.synchronize()


class CudaMemory(ABC):
    """Base class of the two kinds of slot memory of a CUDA GPU.

    Attributes:
        source: Store that records come from.
        runtime: Calls of the CUDA runtime.
    """

    def __init__(self, source: ExpertStore, runtime: CudaRuntime):
        """Create the streams for copies."""
        self.source = source
        self.runtime = runtime
        self._streams = [runtime.stream() for _ in range(STREAMS)]
        self._copies = 0

    def allocate(self, layer: int, layout: RecordLayout, num_slots: int) -> CudaSlots:
        """Allocate the slots of a layer; implements `SlotMemory.allocate`."""
        return CudaSlots(self, layer, layout, num_slots)

    def host_records(self, layer: int) -> HostRecords | None:
        """Return where the GPU finds a layer's records: nowhere, unless their files are mapped."""
        return None

    def passing(self, layer: int) -> CudaSlots | None:
        """Return slots for a prompt's experts that have none: None, unless their files are mapped."""
        return None

    @abstractmethod
    def start(self, target: CudaSlots, slots: Mapping[int, int]) -> Pending:
        """Start bringing records into slots."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Start a copy on the next stream in turn."""
        self._copies += 1
        self.runtime.copy(target, source, nbytes, self._streams[self._copies % STREAMS])

    def synchronize(self) -> None:
        """Wait until every copy has ended."""
        for stream in self._streams:
            self.runtime.synchronize(stream)

    def drain(self) -> None:
        """Wait until nothing writes into any slot; implements `SlotMemory.drain`."""
        self.source.drain()
        self.synchronize()

    def close(self) -> None:
        """Wait for copies in progress and release the streams; implements `SlotMemory.close`."""
        self.drain()
        while self._streams:
            self.runtime.close(self._streams.pop())


class _Copies(NamedTuple):
    """Copies in progress from mapped files."""

    memory: "MappedMemory"
    nbytes: int

    def wait(self) -> int:
        """Wait until every record is whole in its slot."""
        self.memory.synchronize()
        return self.nbytes


class MappedMemory(CudaMemory):
    """Slot memory filled directly from the experts' files, which are mapped and pinned whole."""

    def __init__(self, source: ExpertStore, runtime: CudaRuntime):
        """Map and pin the files that hold experts. This reads all of their pages.

        Raises:
            MemoryLimitError: If the system has no memory for them.
            StoreError: If a file can't be mapped or pinned.
        """
        super().__init__(source, runtime)
        self._files: dict[Path, ReadOnlyFile] = {}
        self._addresses: dict[Path, int] = {}
        self._checked: set[tuple[int, int]] = set()
        self._records: dict[int, HostRecords | None] = {}
        self._lengths: dict[Path, int] = {}
        self._held: list[bytearray] = []  # checked records, held while they are copied from here
        self._passing: CudaSlots | None = None
        self.host_bytes = 0
        # A model that is dropped without being closed must not leave its addresses pinned.
        self._unpin = weakref.finalize(self, _unpin, runtime, self._addresses, self._files)
        self._unpin.atexit = False
        with ExitStack() as undo:
            undo.callback(self.close)
            for path in source.checkpoint.expert_files:
                file = self._files[path] = ReadOnlyFile(path, direct=False)
                view = file.map()
                address = int(np.frombuffer(view, np.uint8).ctypes.data)
                runtime.register(address, len(view))
                self._addresses[path] = address
                self._lengths[path] = len(view)
                self.host_bytes += len(view)
            undo.pop_all()

    def start(self, target: CudaSlots, slots: Mapping[int, int]) -> Pending:
        """Start copying records from the mapped files."""
        nbytes = 0
        for expert, slot in slots.items():
            address = target.slot_address(slot)
            ranges = self.source.checkpoint.ranges(target.layer, expert)
            if (record := self._compared(target.layer, expert, ranges)) is not None:
                self._held.append(record)
                self.copy(address, ctypes.addressof(ctypes.c_char.from_buffer(record)), len(record))
                nbytes += len(record)
                continue
            for run in ranges:
                self.copy(address + run.record_offset, self._addresses[run.path] + run.file_offset, run.nbytes)
                nbytes += run.nbytes
        return _Copies(self, nbytes)

    def host_records(self, layer: int) -> HostRecords | None:
        """Return where the GPU finds a layer's records; None if every one is to be checked by the processor first."""
        if self.source.check.interval == 1:
            return None
        if layer not in self._records:
            self._records[layer] = self._find_records(layer)
        return self._records[layer]

    def _find_records(self, layer: int) -> HostRecords | None:
        checkpoint = self.source.checkpoint
        held = checkpoint.held_experts(layer)
        records = {expert: checkpoint.ranges(layer, expert) for expert in held}
        first = records[held[0]]
        starts = [run.record_offset for run in first]
        end = first[-1].record_offset + first[-1].nbytes
        lengths = np.diff([*starts, end]).tolist()  # of each run and the padding behind it
        addresses = np.zeros((checkpoint.num_experts(layer), len(first)), np.uint64)
        for expert, runs in records.items():
            if [run.record_offset for run in runs] != starts or any(
                run.file_offset + nbytes > self._lengths[run.path] for run, nbytes in zip(runs, lengths, strict=True)
            ):
                return None
            addresses[expert] = [self._addresses[run.path] + run.file_offset for run in runs]
        return host_records(addresses, starts, end, checkpoint.layout(layer).record_bytes)

    def passing(self, layer: int) -> CudaSlots | None:
        """Return slots for a prompt's experts that have none: see `SlotMemory.passing`.

        Without them, the fewer slots a layer has, the fewer experts a prompt would compute at a time.
        """
        layout = self.source.checkpoint.layout(layer)
        self.synchronize()  # an interrupted prompt may have left copies on their way
        if self._passing is None or self._passing.layout is not layout:
            self._passing = None  # freed before others are allocated
            count = passing_records(layout.record_bytes, layout.hidden_size, layout.intermediate_size)
            self._passing = CudaSlots(self, layer, layout, count) if count > 1 else None
        if self._passing is not None:
            self._passing.layer = layer
        return self._passing

    def _compared(self, layer: int, expert: int, ranges: Sequence[ByteRange]) -> bytearray | None:
        """Return a verified copy of the record if this one is to be checked, else None.

        Each record is considered once, because pinned pages don't change.
        """
        check = self.source.check
        if not check.interval or (layer, expert) in self._checked:
            return None
        self._checked.add((layer, expert))
        if not check.is_due():
            return None
        (where,) = ranges
        file = self._files[where.path]
        record = bytearray(file.map()[where.file_offset : where.file_offset + where.nbytes])
        if corrupt := check.find_error(layer, expert, memoryview(record)):
            self._checked.discard((layer, expert))
            raise corrupt
        return record

    def synchronize(self) -> None:
        """Wait until every copy has ended."""
        super().synchronize()
        self._held.clear()

    def close(self) -> None:
        """Unpin and unmap the files."""
        super().close()
        self._passing = None
        _unpin(self.runtime, self._addresses, self._files)
        self.host_bytes = 0


def _unpin(runtime: CudaRuntime, addresses: dict[Path, int], files: dict[Path, ReadOnlyFile]) -> None:
    while addresses:
        runtime.unregister(addresses.popitem()[1])
    while files:
        files.popitem()[1].close()


class _Staged:
    """Records that pass through pinned buffers: the store's threads read them, then they are copied."""

    def __init__(self, memory: "PinnedMemory", target: CudaSlots, slots: Mapping[int, int]):
        self._memory = memory
        self._target = target
        self._left = list(slots.items())
        self._fault: StoreError | None = None
        self._read()

    def _read(self) -> None:
        """Start reading as many of the remaining records as there are buffers."""
        memory, target, size = self._memory, self._target, self._target.layout.record_bytes
        self._buffers = memory.take(len(self._left))
        now, self._left = self._left[: len(self._buffers)], self._left[len(self._buffers) :]
        self._reads = memory.source.submit(
            [
                ReadRequest(
                    target.layer, expert, buffer.view[:size], self._copying(target.slot_address(slot), buffer, size)
                )
                for (expert, slot), buffer in zip(now, self._buffers, strict=True)
            ]
        )

    def _copying(self, address: int, buffer: "_Buffer", nbytes: int) -> Any:
        """Return the function that an I/O thread calls once the record is complete in its buffer."""

        def copy() -> None:
            try:
                self._memory.copy(address, buffer.address, nbytes)
            except StoreError as error:
                self._fault = error

        return copy

    def wait(self) -> int:
        """Wait until every record is whole in its slot."""
        nbytes = 0
        while True:
            nbytes += self._reads.wait()
            self._memory.synchronize()
            self._memory.give_back(self._buffers)
            if self._fault is not None:
                raise self._fault
            if not self._left:
                return nbytes
            self._read()


class _Buffer(NamedTuple):
    address: int
    view: memoryview


class PinnedMemory(CudaMemory):
    """Slot memory filled through pinned buffers, each as long as the longest record."""

    def __init__(self, source: ExpertStore, runtime: CudaRuntime, buffers: int):
        """Allocate the buffers.

        Args:
            source: Store that records come from.
            runtime: Calls of the CUDA runtime.
            buffers: Number of buffers. Further records of a group are read after earlier ones have been copied.

        Raises:
            MemoryLimitError: If the system has no memory for them.
        """
        super().__init__(source, runtime)
        checkpoint = source.checkpoint
        self._size = max(checkpoint.layout(layer).record_bytes for layer in checkpoint.moe_layers)
        self._all: list[_Buffer] = []
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        with ExitStack() as undo:
            undo.callback(self.close)
            for _ in range(buffers):
                address = runtime.allocate_pinned(self._size)
                view = memoryview((ctypes.c_char * self._size).from_address(address)).cast("B")
                self._all.append(_Buffer(address, view))
            undo.pop_all()
        self._reset()

    @property
    def host_bytes(self) -> int:
        """Bytes of the buffers."""
        return len(self._all) * self._size

    def start(self, target: CudaSlots, slots: Mapping[int, int]) -> Pending:
        """Start reading records into buffers. Each is copied as soon as it is complete."""
        return _Staged(self, target, slots)

    def take(self, wanted: int) -> list[_Buffer]:
        """Return at least one and up to ``wanted`` free buffers. If all are taken, their reads were abandoned."""
        if self._free.empty():
            self.drain()
        return [self._free.get() for _ in range(min(wanted, self._free.qsize()))]

    def give_back(self, buffers: list[_Buffer]) -> None:
        """Return buffers to the free ones."""
        while buffers:
            self._free.put(buffers.pop())

    def _reset(self) -> None:
        self._free = queue.SimpleQueue()
        for buffer in self._all:
            self._free.put(buffer)

    def drain(self) -> None:
        """Wait until nothing writes into any slot; then every buffer is free."""
        super().drain()
        self._reset()

    def close(self) -> None:
        """Free the buffers."""
        super().close()
        while self._all:
            self.runtime.free_pinned(self._all.pop().address)
