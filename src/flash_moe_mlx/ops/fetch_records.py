"""Experts' records that a GPU copies from host memory into slots by itself, so that the host need not see the ids."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from .backend import use_kernels
from .gpu import kernel_source
from .gpu.kernel_source import Kernel

NOT_IN_SLOT = 2**31
"""Entry of a slot table for an expert that is in no slot."""

THREADS, COUNT = 256, 8
_UNIT_BYTES = 8
_LEAST_STARTS = 8  # smaller inputs are in another address space


@dataclass(frozen=True, eq=False)
class HostRecords:
    """Addresses of the records of one layer, in host memory that a GPU reads.

    Attributes:
        sources: Low and high half of the address of each run of bytes of each expert's record. Shape (E, R, 2), uint32.
        starts: First unit of 8 bytes of each run in the record, then the number of units. Shape (8 or more,), uint32.
        num_runs: R.
        units: Number of units of a record.
        slot_bytes: Length of a slot.
    """

    sources: mx.array
    starts: mx.array
    num_runs: int
    units: int
    slot_bytes: int


def host_records(
    addresses: np.ndarray, starts: Sequence[int], record_bytes: int, slot_bytes: int
) -> HostRecords | None:
    """Describe records in host memory to `fetch_records`; None if a run does not begin at a multiple of 8 bytes.

    Args:
        addresses: Address of each run. Shape (E, R), uint64. A run reaches to the next one's first byte.
        starts: First byte of each run in the record, ascending, the first one 0.
        record_bytes: Number of bytes of a record to copy.
        slot_bytes: Length of a slot.
    """
    if any(at % _UNIT_BYTES for at in (*starts, record_bytes, slot_bytes)):
        return None
    units = record_bytes // _UNIT_BYTES
    firsts = [at // _UNIT_BYTES for at in starts]
    firsts += [units] * max(_LEAST_STARTS - len(firsts), 1)
    halves = np.ascontiguousarray(addresses, np.uint64).view(np.uint32).reshape(*addresses.shape, 2)
    return HostRecords(mx.array(halves), mx.array(firsts, mx.uint32), len(starts), units, slot_bytes)


def halves_of(address: int) -> mx.array:
    """Return an address as ``target`` of `fetch_records`. Shape (2,), uint32."""
    return mx.array([address & 0xFFFFFFFF, address >> 32], mx.uint32)


@cache
def fetch_kernel(units: int, num_runs: int, slot_bytes: int, threads: int) -> Kernel:
    """Return kernels/fetch_records.metal for records of one size."""
    constants = (
        ("UNITS", units),
        ("RUNS", num_runs),
        ("STRIDE", slot_bytes),
        ("COUNT", COUNT),
        ("THREADS", threads),
        ("NOT_IN_SLOT", NOT_IN_SLOT),
    )
    return Kernel("fetch_records", constants, (THREADS, 1, 1))


def fetch_records_kernel(
    ids: mx.array, table: mx.array, landing: mx.array, target: mx.array, records: HostRecords, after: mx.array
) -> mx.array:
    """Compute ``fetch_records`` on the GPU, in one launch. Kernel: kernels/fetch_records.metal."""
    threads = -(-records.units // (COUNT * THREADS)) * THREADS
    (places,) = kernel_source.launch(
        fetch_kernel(records.units, records.num_runs, records.slot_bytes, threads),
        [ids, table, landing, target, records.sources, records.starts, after],
        [(ids.shape, mx.uint32)],
        (threads, ids.size, 1),
    )
    return places


def fetch_records_reference(
    ids: mx.array, table: mx.array, landing: mx.array, target: mx.array, records: HostRecords, after: mx.array
) -> mx.array:
    """Compute ``fetch_records`` on the host, which waits for all of its arguments."""
    mx.eval(after)
    experts, slots = np.array(ids).reshape(-1), np.array(table)
    places = np.where(slots[experts] == NOT_IN_SLOT, np.array(landing), slots[experts])
    sources, starts = np.array(records.sources).astype(np.uint64), np.array(records.starts).tolist()
    low, high = np.array(target).tolist()
    for expert, place in zip(experts.tolist(), places.tolist(), strict=True):
        if slots[expert] == NOT_IN_SLOT:
            record = low + (high << 32) + place * records.slot_bytes
            for run in range(records.num_runs):
                source = int(sources[expert, run, 0] | sources[expert, run, 1] << np.uint64(32))
                nbytes = (starts[run + 1] - starts[run]) * _UNIT_BYTES
                ctypes.memmove(record + starts[run] * _UNIT_BYTES, source, nbytes)
    return mx.array(places.astype(np.uint32)).reshape(ids.shape)


def fetch_records(
    ids: mx.array, table: mx.array, landing: mx.array, target: mx.array, records: HostRecords, after: mx.array
) -> mx.array:
    """Find the slots of one token's experts; copy the records of those that are in none from host memory into slots.

    Slots change although they are no output: what reads them must take the result as an argument, and what has read
    them must be computed before ``after``.

    Args:
        ids: The token's experts. Shape (1, K), uint32.
        table: Slot of each expert, NOT_IN_SLOT for those in none. Shape (E,), uint32.
        landing: Slot that the k-th expert is copied to if it is in none. Shape (K,), uint32.
        target: Address of slot 0, of `halves_of`. Shape (2,), uint32.
        records: Records of the layer.
        after: Array to wait for before any slot is overwritten.

    Returns:
        Slots of the experts. Shape (1, K), uint32.

    Cost: 8 UNITS bytes over the bus for each expert that is in no slot.
    """
    run = fetch_records_kernel if use_kernels() else fetch_records_reference
    return run(ids, table, landing, target, records, after)
