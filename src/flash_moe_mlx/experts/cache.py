"""ExpertCache: the experts in memory, with a share of slots per layer; a policy decides which ones are evicted.

Each layer has its own share because every token walks all layers before it returns to the first: a global LRU smaller
than one token's working set would never hit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import MemoryLimitError
from ..formats.expert_layout import RecordLayout
from ..ops.fetch_records import NOT_IN_SLOT, HostRecords
from ..ops.slot_memory import ExpertSlots, Pending, SlotMemory
from .policies import AgedLFU, Policy
from .slots import SlotTable


@dataclass
class Fetch:
    """Slots of a set of experts, some of them still being read.

    Attributes:
        slots: Slot of each requested expert.
        misses: Experts that are being read into their slots.
    """

    slots: dict[int, int]
    misses: tuple[int, ...]
    _layer: "LayerSlots"
    _reads: Pending | None

    def wait(self) -> int:
        """Block until every record has been read; only then do the misses count as present.

        Returns:
            The number of bytes read.

        Raises:
            StoreError: If a read failed. The slots of the misses are free again.
        """
        if self._reads is None:
            return 0
        nbytes = self._reads.wait()
        self._layer.publish()
        return nbytes


class LayerSlots(SlotTable):
    """A SlotTable together with the memory of its slots."""

    _table: mx.array | None = None

    def table(self, num_experts: int) -> mx.array:
        """Return the slot of each expert, NOT_IN_SLOT for those that are not present. Shape (E,), uint32."""
        if self._table is None:
            slots = [self.present.get(expert, NOT_IN_SLOT) for expert in range(num_experts)]
            self._table = mx.array(slots, mx.uint32)
            mx.eval(self._table)
        return self._table

    def make_free(self, count: int) -> bool:
        evicted = super().make_free(count)
        if evicted:
            self._table = None
        return evicted

    def publish(self) -> None:
        super().publish()
        self._table = None

    def release(self) -> None:
        super().release()
        self._table = None

    def __init__(self, bank: ExpertSlots, policy: Policy):
        super().__init__(bank.num_slots, policy)
        self.bank = bank

    def put_in(self, records: Mapping[int, Any]) -> None:
        """Fill free slots with records that `ExpertSlots.copy_out` returned."""
        if records:
            for expert, slot in self.claim(list(records)).items():
                self.bank.copy_in(slot, records[expert])
            self.publish()


class ExpertCache:
    """Slots of all layers under one byte budget.

    Not thread-safe: callers hold the engine's lock. An interrupt between any two steps leaves it consistent: slots
    whose reads were never waited for are drained and freed on the next use of the layer.
    """

    def __init__(
        self,
        memory: SlotMemory,
        layouts: Mapping[int, RecordLayout],
        num_slots: Mapping[int, int],
        policy: Callable[[], Policy] = AgedLFU,
    ):
        """Allocate the slots.

        Args:
            memory: Kind of memory that records are read into.
            layouts: Record layout of each layer with routed experts.
            num_slots: Number of slots of each layer.
            policy: Factory of a layer's policy.
        """
        self._memory = memory
        self.changes = 0  # incremented whenever slots change
        self._layouts = dict(layouts)
        self._policies = {layer: policy() for layer in layouts}
        self._layers = {layer: self._allocate(layer, slots) for layer, slots in num_slots.items()}

    def _allocate(self, layer: int, num_slots: int) -> LayerSlots:
        return LayerSlots(self._memory.allocate(layer, self._layouts[layer], num_slots), self._policies[layer])

    @property
    def layers(self) -> Mapping[int, LayerSlots]:
        """Slot table of each layer, live."""
        return self._layers

    def num_slots(self, layer: int) -> int:
        return self._layers[layer].bank.num_slots

    def num_present(self, layer: int) -> int:
        """Return how many experts of a layer are in memory."""
        return len(self._layers[layer].present)

    @property
    def nbytes(self) -> int:
        """Total bytes of the slots."""
        return sum(slots.bank.nbytes for slots in self._layers.values())

    @property
    def total_slots(self) -> int:
        return sum(slots.bank.num_slots for slots in self._layers.values())

    def bank(self, layer: int) -> ExpertSlots:
        """Return the slots of a layer, for kernels."""
        return self._layers[layer].bank

    def table(self, layer: int, num_experts: int) -> mx.array:
        """Return the slot of each expert of a layer, NOT_IN_SLOT for those not present. Shape (E,), uint32."""
        return self._settled(layer).table(num_experts)

    def host_records(self, layer: int) -> HostRecords | None:
        """Return where a GPU finds a layer's records in host memory; None if it can't read them by itself."""
        return self._memory.host_records(layer)

    def passing(self, layer: int) -> ExpertSlots | None:
        """Return slots for a prompt's experts that have none: see `SlotMemory.passing`."""
        return self._memory.passing(layer)

    def landing(self, layer: int, count: int) -> list[int]:
        """Return ``count`` slots that hold no expert, having evicted the least valuable ones."""
        slots = self._settled(layer)
        if slots.make_free(count):
            self.changes += 1
        return slots.free[:count]

    def used(self, layer: int, experts: Sequence[int]) -> int:
        """Note that one token used these experts, without `acquire`; return how many were in no slot."""
        slots = self._layers[layer]
        self._policies[layer].used(experts)
        misses = sum(expert not in slots.present for expert in experts)
        slots.hits += len(experts) - misses
        slots.misses += misses
        return misses

    def promote(self, layer: int, experts: Sequence[int], kept_free: int) -> Fetch:
        """Start reading absent experts that are worth more than present ones, in their place.

        Args:
            layer: The layer.
            experts: Its experts that are read here.
            kept_free: Number of slots that stay free.
        """
        slots = self._settled(layer)
        better = slots.more_valuable(experts, kept_free)
        if better:
            self.changes += 1
            slots.make_free(kept_free + len(better))
        return self.acquire(layer, better, counted=True)

    def present(self, layer: int) -> tuple[int, ...]:
        """Return the experts of a layer that are in memory, most recently added last."""
        return tuple(self._layers[layer].present)

    def by_value(self) -> dict[int, list[int]]:
        """Return the experts in memory of each layer, most valuable first."""
        found = {}
        for layer, slots in self._layers.items():
            present, policy = list(slots.present), self._policies[layer]
            worth = dict(zip(present, policy.scores(present), strict=True))
            found[layer] = sorted(present, key=worth.__getitem__, reverse=True)
        return found

    def order(
        self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 1
    ) -> tuple[list[int], int]:
        """Count experts as used and order them for groups: those present first, then the rest, least valuable first.

        Args:
            layer: The layer.
            experts: Distinct expert ids: all that a forward pass of ``tokens`` tokens needs from this layer.
            counts: Number of tokens that picked each expert; None means one each.
            tokens: Number of tokens in the pass.

        Returns:
            The ordered experts, and how many of them are present.
        """
        return self._settled(layer).order(experts, counts, tokens)

    def acquire(self, layer: int, experts: Sequence[int], *, counted: bool = False, keep: Sequence[int] = ()) -> Fetch:
        """Return slots for distinct experts of a layer, and start reading the absent ones.

        The caller must have waited for every computation that reads this layer's slots, except those of ``keep``.

        Args:
            layer: The layer.
            experts: Distinct expert ids.
            counted: Whether `order` has already counted them as used.
            keep: Experts in memory that must not be evicted.

        Raises:
            MemoryLimitError: If the layer has too few slots for them.
        """
        slots = self._settled(layer)
        if len(experts) + len(keep) > slots.bank.num_slots:
            raise MemoryLimitError(
                f"[ExpertCache] layer {layer} has {slots.bank.num_slots} slots, {len(experts) + len(keep)} experts "
                "were asked for at once. Raise memory_limit."
            )
        assigned = slots.claim(experts if counted else slots.order(experts)[0], keep)
        misses = tuple(slots.filling)
        self.changes += bool(misses)
        reads = slots.bank.receive(dict(slots.filling)) if misses else None
        return Fetch(assigned, misses, slots, reads)

    def resize(self, num_slots: Mapping[int, int], spare_bytes: int = 0) -> None:
        """Change the layers' shares, keeping the most valuable experts that can be copied within the memory given.

        If interrupted, it may be called again.

        Args:
            num_slots: Number of slots of each layer.
            spare_bytes: Memory available temporarily, in addition to the larger of the old and the new slots.
        """
        self.changes += 1
        self._memory.drain()
        changed = [
            layer for layer, slots in num_slots.items() if layer not in self._layers or self.num_slots(layer) != slots
        ]
        # Shrink before growing: the total must never exceed the larger of the two budgets.
        for layer in sorted(
            changed, key=lambda layer: layer in self._layers and num_slots[layer] > self.num_slots(layer)
        ):
            kept = self._take_out(layer, num_slots[layer], spare_bytes)
            self._layers.pop(layer, None)  # freed before the new one is allocated
            self._policies[layer].restore(())
            slots = self._allocate(layer, num_slots[layer])
            slots.put_in(kept)
            self._layers[layer] = slots

    def _take_out(self, layer: int, most: int, spare_bytes: int) -> dict[int, Any]:
        """Return copies of the ``most`` most valuable records of a layer."""
        if layer not in self._layers:
            return {}
        slots = self._settled(layer)
        present, policy = list(slots.present), self._policies[layer]
        worth = dict(zip(present, policy.scores(present), strict=True))
        present.sort(key=worth.__getitem__, reverse=True)
        fit = min(most, spare_bytes // slots.bank.layout.record_bytes)
        return {expert: slots.bank.copy_out(slots.present[expert]) for expert in present[:fit]}

    def clear(self) -> None:
        """Drop all experts; the slots stay."""
        self.changes += 1
        self._memory.drain()
        for slots in self._layers.values():
            slots.clear()

    def _settled(self, layer: int) -> LayerSlots:
        slots = self._layers[layer]
        if slots.unsettled:  # an earlier fetch was interrupted or failed
            self.changes += 1
            self._memory.drain()
            slots.release()
        return slots
