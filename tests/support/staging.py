"""Slot memory that records reach by way of a few staging buffers: what a GPU with memory of its own needs, on a CPU."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe_mlx.formats.expert_layout import RecordLayout
from flash_moe_mlx.ops.slot_memory import ExpertSlots, Pending, RecordSource
from flash_moe_mlx.storage.store import ReadRequest

BUFFERS = 2
"""Fewer than a token's experts, so that buffers are used again within one fetch."""

POISON = 0xA5


class StagingSlots(ExpertSlots):
    def __init__(self, memory: "StagingMemory", layer: int, layout: RecordLayout, num_slots: int):
        super().__init__(layout, num_slots)
        self.memory, self.layer = memory, layer

    def write(self, slot: int, record: np.ndarray) -> None:
        np.frombuffer(self._bytes, np.uint8).reshape(self.num_slots, -1)[slot] = record

    def receive(self, slots: Mapping[int, int]) -> Pending:
        # Nothing may look at a slot before it was waited for: it would see this.
        for slot in slots.values():
            self.write(slot, np.full(self.layout.record_bytes, POISON, np.uint8))
        return StagedRecords(self, dict(slots))

    def copy_out(self, slot: int) -> mx.array:
        record = self.array[slot] + 0
        mx.eval(record)
        return record

    def copy_in(self, slot: int, record: Any) -> None:
        self.write(slot, np.array(record).view(np.uint8))


class StagedRecords:
    """Reads as many records as there are buffers at once; `wait` copies them and starts the next ones."""

    def __init__(self, target: StagingSlots, slots: dict[int, int]):
        self.target, self.left = target, list(slots.items())
        self.submit()

    def submit(self) -> None:
        target = self.target
        self.under_way, self.left = self.left[:BUFFERS], self.left[BUFFERS:]
        self.staged = target.memory.buffers[target.layout.record_bytes]
        self.reads = target.memory.source.submit(
            [
                ReadRequest(target.layer, expert, memoryview(buffer))
                for (expert, _), buffer in zip(self.under_way, self.staged, strict=False)
            ]
        )

    def wait(self) -> int:
        nbytes = 0
        while True:
            nbytes += self.reads.wait()
            for (_, slot), record in zip(self.under_way, self.staged, strict=False):
                self.target.write(slot, record)
            if not self.left:
                return nbytes
            self.submit()


class StagingMemory:
    def __init__(self, source: RecordSource):
        self.source = source
        self.buffers: dict[int, np.ndarray] = {}  # by bytes of a record

    @property
    def host_bytes(self) -> int:
        return sum(buffers.nbytes for buffers in self.buffers.values())

    def allocate(self, layer: int, layout: RecordLayout, num_slots: int) -> StagingSlots:
        self.buffers.setdefault(layout.record_bytes, np.full((BUFFERS, layout.record_bytes), POISON, np.uint8))
        return StagingSlots(self, layer, layout, num_slots)

    def host_records(self, layer: int) -> None:
        return None

    def passing(self, layer: int) -> None:
        return None

    def drain(self) -> None:
        self.source.drain()

    def close(self) -> None:
        self.buffers.clear()
