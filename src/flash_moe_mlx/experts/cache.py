"""ExpertCache: which experts are in memory, a share of slots for each layer; a policy says which give way.

A global LRU smaller than one token's working set hits exactly never, since every token walks all
layers before it returns to the first: hence a share a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import MemoryLimitError
from ..formats.expert_layout import RecordLayout
from ..ops.slot_memory import ExpertSlots, Pending, SlotMemory
from .policies import AgedLFU, Policy
from .slots import SlotTable


@dataclass
class Fetch:
    """Slots of a set of experts, some of them still being read.

    Attributes:
        slots: Slot of each expert asked for.
        misses: Experts that are being read into theirs.
    """

    slots: dict[int, int]
    misses: tuple[int, ...]
    _layer: "LayerSlots"
    _reads: Pending | None

    def wait(self) -> int:
        """Block until every record is whole; only then do the misses count as present.

        Returns:
            Bytes read.

        Raises:
            StoreError: If a read failed. The slots of the misses are free again.
        """
        if self._reads is None:
            return 0
        nbytes = self._reads.wait()
        self._layer.publish()
        return nbytes


class LayerSlots(SlotTable):
    """A SlotTable, and the memory of its slots."""

    _table: mx.array | None = None

    def table(self) -> mx.array:
        """Return the slot of each expert, once all experts are present. Shape (E,), uint32."""
        if self._table is None:
            self._table = mx.array([self.present[expert] for expert in range(len(self.present))], mx.uint32)
            mx.eval(self._table)
        return self._table

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

    Not thread-safe: the engine's lock is held around it. An interrupt between any two steps leaves it
    consistent: slots whose reads were never waited for are drained and freed on the next use of the layer.
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
            memory: Kind of memory, filled with records.
            layouts: Record layout of each layer with routed experts.
            num_slots: Slots of each layer.
            policy: Makes a layer's policy.
        """
        self._memory = memory
        self.changes = 0  # counts up whenever slots change
        self._layouts = dict(layouts)
        self._policies = {layer: policy() for layer in layouts}
        self._layers = {layer: self._allocate(layer, slots) for layer, slots in num_slots.items()}

    def _allocate(self, layer: int, num_slots: int) -> LayerSlots:
        return LayerSlots(self._memory.allocate(layer, self._layouts[layer], num_slots), self._policies[layer])

    def num_slots(self, layer: int) -> int:
        return self._layers[layer].bank.num_slots

    def num_present(self, layer: int) -> int:
        """Return how many experts of a layer are in memory."""
        return len(self._layers[layer].present)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slots.bank.nbytes for slots in self._layers.values())

    @property
    def total_slots(self) -> int:
        return sum(slots.bank.num_slots for slots in self._layers.values())

    def bank(self, layer: int) -> ExpertSlots:
        """Return the slots of a layer, for kernels."""
        return self._layers[layer].bank

    def table(self, layer: int) -> mx.array:
        """Return the slot of each expert of a layer all of whose experts are present. Shape (E,), uint32."""
        return self._settled(layer).table()

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Tell the layer's policy that one token used these experts."""
        self._policies[layer].used(experts)

    def present(self, layer: int) -> tuple[int, ...]:
        """Experts of a layer that are in memory, those that came last at the end."""
        return tuple(self._layers[layer].present)

    def order(
        self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 1
    ) -> tuple[list[int], int]:
        """Count experts as used, and order them for groups: those present, then the others, the most useful last.

        Args:
            layer: The layer.
            experts: Distinct expert ids: all that a forward pass of ``tokens`` tokens asks of this layer.
            counts: Tokens that picked each; None is one each.
            tokens: Of the pass.

        Returns:
            The experts in order, and how many of them are present.
        """
        return self._settled(layer).order(experts, counts, tokens)

    def acquire(self, layer: int, experts: Sequence[int], *, counted: bool = False, keep: Sequence[int] = ()) -> Fetch:
        """Slots for distinct experts of a layer; reads of the absent ones are under way on return.

        The caller must have waited for every computation that reads this layer's slots, but those of ``keep``.

        Args:
            layer: The layer.
            experts: Distinct expert ids.
            counted: `order` has counted them as used.
            keep: Experts in memory that stay there.

        Raises:
            MemoryLimitError: If they are more than the layer has slots.
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
        """Change the layers' shares. Experts worth keeping stay, as far as they can be copied within the memory given.

        Cut short, it may be called again.

        Args:
            num_slots: Slots of each layer.
            spare_bytes: Memory that may be used for a moment, besides the larger of the old and the new slots.
        """
        self.changes += 1
        self._memory.drain()
        changed = [
            layer for layer, slots in num_slots.items() if layer not in self._layers or self.num_slots(layer) != slots
        ]
        # Shrink before growing: the sum must never exceed the larger of the two budgets.
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
        """Return copies of the records of a layer that are most worth keeping."""
        if layer not in self._layers:
            return {}
        slots = self._settled(layer)
        present, policy = list(slots.present), self._policies[layer]
        worth = dict(zip(present, policy.scores(present), strict=True))
        present.sort(key=worth.__getitem__, reverse=True)
        fit = min(most, spare_bytes // slots.bank.layout.record_bytes)
        return {expert: slots.bank.copy_out(slots.present[expert]) for expert in present[:fit]}

    def clear(self) -> None:
        """Forget every expert; the slots stay."""
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
