"""Division of a memory limit, and the smallest limit that works. Plain arithmetic: no MLX import."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..errors import MemoryLimitError
from ..stats import format_bytes

_MIN_BUFFER_CACHE = 1 << 20
_MAX_BUFFER_CACHE = 64 << 20


class ModelMemory(Protocol):
    """Bytes that a model needs in addition to its expert slots; every model definition implements this."""

    @property
    def dense_bytes(self) -> int:
        """Weights kept in memory, in the dtypes they are loaded as."""
        ...

    @property
    def load_bytes(self) -> int:
        """Maximum that loading needs temporarily, beyond the dense weights."""
        ...

    @property
    def kept_bytes(self) -> int:
        """Freed buffers of a prompt's products that are worth keeping; ``scratch_bytes`` includes them."""
        ...

    def state_bytes(self, batch: int, length: int) -> int:
        """Return the bytes of KV caches and recurrent states of ``batch`` sequences of ``length`` tokens."""
        ...

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        """Return the bytes of activations of a pass of ``tokens`` new tokens per sequence, ending at ``length``."""
        ...


@dataclass(frozen=True)
class LayerExperts:
    """Routed experts of one layer: the bytes of a record in a slot, and the number of experts."""

    record_bytes: int
    num_experts: int


@dataclass(frozen=True)
class Budget:
    """Division of a memory limit.

    Attributes:
        limit_bytes: The limit.
        dense_bytes: Weights kept in memory.
        state_bytes: KV caches and recurrent states at the longest context.
        scratch_bytes: Activations of the largest forward pass.
        buffer_bytes: The engine's I/O buffers and MLX's cache of freed buffers.
        slot_bytes: Expert slots.
        num_slots: Slots of each layer.
        reserved_bytes: Memory reserved in addition: state snapshots, and the states of further sequences.
    """

    limit_bytes: int
    dense_bytes: int
    state_bytes: int
    scratch_bytes: int
    buffer_bytes: int
    slot_bytes: int
    num_slots: Mapping[int, int]
    reserved_bytes: int = 0


MAX_STAGING_RECORDS = 64
"""Maximum number of pinned staging buffers: two groups of a prompt's experts; more would lie idle."""


@dataclass(frozen=True)
class HostBudget:
    """Division of the host's memory when a GPU's own memory holds the rest of the model.

    Attributes:
        limit_bytes: The limit.
        mapped_bytes: Size of the experts' files, mapped and pinned; 0 if there is no room for all of them.
        staging_records: Number of pinned buffers, of one record each, if the files are not mapped.
        staging_bytes: Total size of these buffers.
        buffer_bytes: Size of the buffers for direct reads.
    """

    limit_bytes: int
    mapped_bytes: int
    staging_records: int
    staging_bytes: int
    buffer_bytes: int

    @property
    def nbytes(self) -> int:
        """Total bytes."""
        return self.mapped_bytes + self.staging_bytes + self.buffer_bytes


def divide_host(
    limit_bytes: int, *, file_bytes: int, record_bytes: int, load_bytes: int, io_buffer_bytes: int, min_records: int
) -> HostBudget:
    """Divide the limit on the host's memory: all experts' files if they fit, else staging buffers.

    Args:
        limit_bytes: The limit.
        file_bytes: Size of all files that hold experts; 0 if they are not to be mapped.
        record_bytes: Bytes of the largest record.
        load_bytes: Bytes that loading needs temporarily.
        io_buffer_bytes: Size of the buffers for direct reads.
        min_records: Minimum number of staging buffers: the experts of one token.

    Raises:
        MemoryLimitError: If the limit is too small; names the smallest limit that works.
    """
    if file_bytes and file_bytes + load_bytes <= limit_bytes:
        return HostBudget(limit_bytes, file_bytes, 0, 0, 0)
    smallest = io_buffer_bytes + load_bytes + min_records * record_bytes
    if limit_bytes < smallest:
        raise MemoryLimitError(
            f"[memory_limit] must be at least {format_bytes(smallest)}, got {format_bytes(limit_bytes)}: "
            f"{min_records} records in transfer to the GPU, buffers {format_bytes(io_buffer_bytes)}, "
            f'{format_bytes(load_bytes)} while loading. Use memory_limit="{_round_up(smallest)}".',
            smallest_limit_bytes=smallest,
        )
    records = min((limit_bytes - io_buffer_bytes - load_bytes) // record_bytes, MAX_STAGING_RECORDS)
    return HostBudget(limit_bytes, 0, records, records * record_bytes, io_buffer_bytes)


def buffer_cache_bytes(scratch_bytes: int) -> int:
    """Return how many bytes of freed buffers MLX may keep: enough to reuse a layer's activations."""
    return min(max(scratch_bytes // 8, _MIN_BUFFER_CACHE), _MAX_BUFFER_CACHE)


def divide(
    limit_bytes: int,
    footprint: ModelMemory,
    experts: Mapping[int, LayerExperts],
    *,
    min_slots: int,
    batch: int,
    tokens: int,
    length: int,
    io_buffer_bytes: int = 0,
    reserved_bytes: int = 0,
    limit_name: str = "memory_limit",
) -> Budget:
    """Divide a limit: first dense weights, states, scratch and buffers, then expert slots from the remainder.

    Every layer gets the same number of slots, at least ``min_slots`` and at most its number of experts. The first
    layers get one more each from what then remains.

    Args:
        limit_bytes: The limit.
        footprint: Bytes that the model needs in addition to its slots.
        experts: Routed experts of each layer.
        min_slots: Minimum number of slots per layer: the experts of one token.
        batch: Number of concurrent sequences.
        tokens: New tokens per sequence in the largest forward pass.
        length: Length of the longest sequence.
        io_buffer_bytes: The engine's own I/O buffers.
        reserved_bytes: Memory to reserve in addition: state snapshots, and the states of further sequences.
        limit_name: Name of the argument that sets the limit, for errors.

    Raises:
        MemoryLimitError: If the limit is too small; names the smallest limit that works.
    """
    state = footprint.state_bytes(batch, length)
    scratch = footprint.scratch_bytes(batch, tokens, length)
    buffers = io_buffer_bytes + buffer_cache_bytes(scratch)
    fixed = footprint.dense_bytes + state + scratch + buffers + reserved_bytes
    # Capped by the number of experts, so that a model with fewer experts than min_slots (K = E) can still be divided.
    floor = {layer: min(min_slots, e.num_experts) for layer, e in experts.items()}
    smallest = max(
        fixed + sum(floor[layer] * e.record_bytes for layer, e in experts.items()),
        footprint.dense_bytes + footprint.load_bytes,
    )
    if limit_bytes < smallest:
        named = _round_up(smallest)
        raise MemoryLimitError(
            f"[{limit_name}] must be at least {format_bytes(smallest)} for {length} tokens of context, got "
            f"{format_bytes(limit_bytes)}: dense weights {format_bytes(footprint.dense_bytes)}, KV cache and states "
            f"{format_bytes(state)}, scratch {format_bytes(scratch)}, buffers {format_bytes(buffers)}, "
            f"{f'snapshots and other sequences {format_bytes(reserved_bytes)}, ' if reserved_bytes else ''}"
            f'{min_slots} experts per layer. Use {limit_name}="{named}", or a smaller max_context.',
            smallest_limit_bytes=smallest,
        )
    slots = _share_slots(limit_bytes - fixed, experts, floor)
    return Budget(
        limit_bytes=limit_bytes,
        dense_bytes=footprint.dense_bytes,
        state_bytes=state,
        scratch_bytes=scratch,
        buffer_bytes=buffers,
        slot_bytes=sum(slots[layer] * e.record_bytes for layer, e in experts.items()),
        num_slots=slots,
        reserved_bytes=reserved_bytes,
    )


def _share_slots(available: int, experts: Mapping[int, LayerExperts], floor: Mapping[int, int]) -> dict[int, int]:
    slots = dict(floor)
    available -= sum(slots[layer] * e.record_bytes for layer, e in experts.items())
    growing = {layer: e for layer, e in experts.items() if slots[layer] < e.num_experts}
    while growing:
        # Several rounds at once: as many as fit, but only up to the next layer that becomes complete.
        round_bytes = sum(e.record_bytes for e in growing.values())
        rounds = min(available // round_bytes, min(e.num_experts - slots[layer] for layer, e in growing.items()))
        for layer in growing:
            slots[layer] += rounds
        available -= rounds * round_bytes
        if rounds == 0:
            for layer, e in growing.items():
                if e.record_bytes <= available:
                    slots[layer] += 1
                    available -= e.record_bytes
            break
        growing = {layer: e for layer, e in growing.items() if slots[layer] < e.num_experts}
    return slots


def _round_up(nbytes: int) -> str:
    """Return a size that a user can type: rounded up to about three digits, in a unit that parse_size reads."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= size:
            hundredths = -(-nbytes * 100 // size)
            return f"{hundredths // 100}.{hundredths % 100:02d}{unit}"
    return f"{nbytes}B"
