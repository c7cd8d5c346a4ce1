"""DebugState: an engine's parts, for tests and debugging."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..ops.slot_memory import SlotMemory
from ..storage.store import ExpertStore
from .budget import Budget
from .cache import ExpertCache, LayerSlots
from .memory_plan import MemoryDemand
from .reader import ExpertReader


@dataclass(frozen=True)
class DebugState:
    """An engine's parts at one moment, the live objects themselves. Not part of the public API.

    Attributes:
        budget: How the limit is divided.
        demand: Sizes that the limit was divided by: layouts, K and states.
        reserved_state_bytes: Bytes reserved for the conversations whose caches live.
        store: Store that reads experts.
        memory: Kind of memory of the slots.
        cache: Experts in memory.
        layers: Slot table of each layer with routed experts.
        reader: Reader that counts uses and finds slots.
    """

    budget: Budget
    demand: MemoryDemand
    reserved_state_bytes: int
    store: ExpertStore
    memory: SlotMemory
    cache: ExpertCache
    layers: Mapping[int, LayerSlots]
    reader: ExpertReader
