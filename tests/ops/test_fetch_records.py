import functools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.fetch_records import (
    NOT_IN_SLOT,
    fetch_records_kernel,
    fetch_records_reference,
    halves_of,
    host_records,
)
from flash_moe_mlx.ops.gpu import kernel_source

from ..kernels import opencl

EXPERTS, SLOTS = 7, 5
# Bytes of each run of a record
CASES = {"one run": [4096 + 8], "nine runs": [2048, 128, 128] * 3, "more than a block": [3 * 8 * 256 * 8 + 64, 8]}


class Memory:
    """Host memory with every expert's runs apart, and slots that hold other bytes."""

    def __init__(self, runs: list[int]):
        rng = np.random.default_rng(5)
        self.record_bytes, self.starts = sum(runs), np.cumsum([0, *runs])[:-1].tolist()
        self.whole = rng.integers(0, 256, (EXPERTS, self.record_bytes)).astype(np.uint8)
        self.file = rng.integers(0, 256, EXPERTS * (self.record_bytes + 80 * len(runs)) + 8).astype(np.uint8)
        addresses, place = np.zeros((EXPERTS, len(runs)), np.uint64), 0
        for expert, each in enumerate(self.whole):
            for run, (start, size) in enumerate(zip(self.starts, runs, strict=True)):
                place += 1 + (5 * expert + run) % 71  # at any byte, as in a file
                addresses[expert, run] = self.file.ctypes.data + place
                self.file[place : place + size] = each[start : start + size]
                place += size
        self.records = host_records(addresses, self.starts, self.record_bytes, self.record_bytes + 24)
        self.slots = np.full((SLOTS, self.record_bytes + 24), 0xA5, np.uint8)
        self.target = halves_of(self.slots.ctypes.data)


def check(fetch: Callable[..., mx.array], runs: list[int]) -> None:
    """Absent records are whole, and other slots are left alone."""
    memory = Memory(runs)
    assert memory.records is not None
    table = np.full(EXPERTS, NOT_IN_SLOT, np.uint32)
    table[[2, 6]] = [3, 0]
    ids, landing = mx.array([[6, 1, 2, 5]], mx.uint32), mx.array([4, 1, 3, 2], mx.uint32)
    places = fetch(ids, mx.array(table), landing, memory.target, memory.records, mx.zeros((1,)))
    assert places.tolist() == [[0, 1, 3, 2]]
    assert np.array_equal(memory.slots[1, :-24], memory.whole[1])
    assert np.array_equal(memory.slots[2, :-24], memory.whole[5])
    assert (memory.slots[[0, 3, 4]] == 0xA5).all()
    assert (memory.slots[:, -24:] == 0xA5).all()


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
def test_the_reference_fetches_what_is_absent(runs: list[int]):
    check(fetch_records_reference, runs)


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kernels", ["opencl"], indirect=True)  # this memory is none that a GPU reads
def test_the_kernel_fetches_what_is_absent(runs: list[int], kernels: None):
    check(fetch_records_kernel, runs)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("absent ? landing[rank] : slot", "landing[rank]"),
        ("uint(source % 8) * 8", "0"),
        ("unit - starts[run]", "unit"),
        ("unit >= starts[later]", "unit > starts[later]"),
        ("words[1] << (64 - shift)", "0"),
    ],
)
def test_a_fault_shows(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch):
    if opencl.opencl() is None:
        pytest.skip("needs the OpenCL CPU runtime of the dev extra (Linux x86-64)")

    def edit(helpers: str, body: str) -> tuple[str, str]:
        assert body.count(right) == 1
        return helpers, body.replace(right, wrong)

    monkeypatch.setattr(kernel_source, "launch", functools.partial(opencl.launch, edit=edit))
    with pytest.raises(AssertionError):
        check(fetch_records_kernel, CASES["nine runs"])


def test_what_is_not_in_units_is_refused():
    addresses = np.array([[4096, 8192]], np.uint64)
    assert host_records(addresses, [0, 64], 128, 128) is not None
    assert host_records(addresses, [0, 60], 128, 128) is None
    assert host_records(addresses, [0, 64], 132, 136) is None
