"""Lists the hot experts, and reads them again at the next start in the order of the files."""

import itertools
from collections.abc import Mapping, Sequence

from .engine import StreamingEngine

_AT_ONCE = 32


def hot_experts(engine: StreamingEngine) -> dict[int, list[int]]:
    """Return the experts of each layer that are in memory, most valuable first."""
    with engine.between_passes() as (reader, _):
        return reader.cache.by_value()


def warm(engine: StreamingEngine, experts: Mapping[int, Sequence[int]]) -> int:
    """Read experts into free slots, in the order of the checkpoint's files. Nothing is evicted.

    Args:
        engine: ``model.streaming``.
        experts: Experts of each layer, most valuable first. Those that the model doesn't have are left out.

    Returns:
        The number of experts read.

    Raises:
        StoreError: If one can't be read, or the engine is closed.
    """
    with engine.between_passes() as (reader, checkpoint):
        reader.settle()
        wanted = []
        for layer, listed in experts.items():
            num_experts = reader.num_experts(layer)
            if not num_experts:
                continue
            present = set(reader.cache.present(layer))
            absent = [e for e in dict.fromkeys(listed) if e not in present and 0 <= e < num_experts]
            for expert in absent[: reader.cache.num_slots(layer) - len(present)]:
                place = checkpoint.ranges(layer, expert)[0]
                wanted.append((place.path, place.file_offset, layer, expert))
        for layer, group in itertools.groupby(sorted(wanted), key=lambda found: found[2]):
            ordered = [expert for *_, expert in group]
            for start in range(0, len(ordered), _AT_ONCE):
                fetch = reader.cache.acquire(layer, ordered[start : start + _AT_ONCE])
                reader.counters.bytes_read += fetch.wait()
        return len(wanted)
