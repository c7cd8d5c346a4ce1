"""ExpertCache: which experts are in memory, a share of slots for each layer, least recently used out first.

A global LRU smaller than one token's working set hits exactly never, since every token walks all
layers before it returns to the first: hence a share a layer.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .bank import ExpertBank
from .errors import MemoryLimitError
from .record import RecordLayout
from .store import PendingReads, ReadRequest


class ExpertSource(Protocol):
    """Where records come from: an ExpertStore, or anything else that fills buffers with them."""

    def submit(self, requests: Sequence[ReadRequest]) -> PendingReads: ...

    def drain(self) -> None: ...


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
    _reads: PendingReads | None

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


class LayerSlots:
    """Slots of one layer: a bank, the experts in it by recency, and slots that are free or being filled."""

    def __init__(self, layout: RecordLayout, num_slots: int):
        self.bank = ExpertBank(layout, num_slots)
        self.present: OrderedDict[int, int] = OrderedDict()
        self.free = list(range(num_slots))[::-1]
        self.filling: dict[int, int] = {}
        self.unsettled = False

    def claim(self, experts: Sequence[int]) -> dict[int, int]:
        """Mark experts as just used; give each absent one a slot, evicting the least recently used others."""
        self.unsettled = True
        wanted = set(experts)
        for expert in experts:
            if expert in self.present:
                self.present.move_to_end(expert)
        for expert in experts:
            if expert not in self.present:
                if not self.free:
                    victim = next(e for e in self.present if e not in wanted)
                    self.free.append(self.present.pop(victim))
                self.filling[expert] = self.free.pop()
        self.unsettled = bool(self.filling)
        return {e: self.present[e] if e in self.present else self.filling[e] for e in experts}

    def publish(self) -> None:
        """Records that were being read are whole."""
        self.present.update(self.filling)
        self.filling.clear()
        self.unsettled = False

    def release(self) -> None:
        """Give up slots whose records never arrived.

        An interrupt may have come between any two steps of `claim` and `publish`, with a slot in no list or in two:
        what holds an expert is what `present` says, and every other slot is free.
        """
        self.filling.clear()
        held = set(self.present.values())
        self.free = [slot for slot in range(self.bank.num_slots)[::-1] if slot not in held]
        self.unsettled = False


class ExpertCache:
    """Slot banks of all layers under one byte budget.

    Not thread-safe: the engine's lock is held around it. An interrupt between any two steps leaves it
    consistent: slots whose reads were never waited for are drained and freed on the next use of the layer.
    """

    def __init__(self, source: ExpertSource, layouts: Mapping[int, RecordLayout], num_slots: Mapping[int, int]):
        """Allocate the banks.

        Args:
            source: Fills buffers with records.
            layouts: Record layout of each layer with routed experts.
            num_slots: Slots of each layer.
        """
        self._source = source
        self._layouts = dict(layouts)
        self._layers = {layer: LayerSlots(layouts[layer], slots) for layer, slots in num_slots.items()}

    def num_slots(self, layer: int) -> int:
        return self._layers[layer].bank.num_slots

    @property
    def nbytes(self) -> int:
        """Bytes of all banks."""
        return sum(slots.bank.nbytes for slots in self._layers.values())

    @property
    def total_slots(self) -> int:
        return sum(slots.bank.num_slots for slots in self._layers.values())

    def bank(self, layer: int) -> ExpertBank:
        return self._layers[layer].bank

    def present(self, layer: int) -> tuple[int, ...]:
        """Experts of a layer that are in memory, least recently used first."""
        return tuple(self._layers[layer].present)

    def contains(self, layer: int, expert: int) -> bool:
        return expert in self._layers[layer].present

    def acquire(self, layer: int, experts: Sequence[int]) -> Fetch:
        """Slots for distinct experts of a layer; reads of the absent ones are under way on return.

        The caller must have waited for every computation that reads this layer's slots.

        Raises:
            MemoryLimitError: If they are more than the layer has slots.
        """
        slots = self._layers[layer]
        if slots.unsettled:  # an earlier fetch was interrupted or failed
            self._source.drain()
            slots.release()
        if len(experts) > slots.bank.num_slots:
            raise MemoryLimitError(
                f"[ExpertCache] layer {layer} has {slots.bank.num_slots} slots, {len(experts)} experts were asked "
                "for at once. Raise memory_limit."
            )
        assigned = slots.claim(experts)
        misses = tuple(slots.filling)
        reads = None
        if misses:
            requests = [ReadRequest(layer, expert, slots.bank.slot(slots.filling[expert])) for expert in misses]
            reads = self._source.submit(requests)
        return Fetch(assigned, misses, slots, reads)

    def resize(self, num_slots: Mapping[int, int]) -> None:
        """Change the layers' shares. Banks whose share changes start empty. Cut short, it may be called again."""
        self._source.drain()
        changed = [
            layer for layer, slots in num_slots.items() if layer not in self._layers or self.num_slots(layer) != slots
        ]
        # Free before allocating: the sum must never exceed the larger of the two budgets.
        for layer in changed:
            self._layers.pop(layer, None)
        for layer in changed:
            self._layers[layer] = LayerSlots(self._layouts[layer], num_slots[layer])

    def clear(self) -> None:
        """Forget every expert; the banks stay."""
        self._source.drain()
        for slots in self._layers.values():
            slots.unsettled = True
            slots.present.clear()
            slots.release()
