"""Slots in MLX memory and the cache over them, with a source that fills records with their expert's number."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe_mlx.errors import MemoryLimitError, ShapeError, StoreError
from flash_moe_mlx.experts.cache import ExpertCache
from flash_moe_mlx.experts.policies import LRU, AgedLFU, Policy
from flash_moe_mlx.experts.slots import plan_groups
from flash_moe_mlx.formats.expert_layout import Quantization, RecordLayout
from flash_moe_mlx.ops.slot_memory import UnifiedMemory, UnifiedSlots
from flash_moe_mlx.storage.store import ReadRequest

from ..support.staging import StagingMemory

LAYOUT = RecordLayout.contiguous(
    {
        ("gate_proj", "weight"): ("U32", (3, 8)),
        ("gate_proj", "scales"): ("BF16", (3, 1)),
        ("gate_proj", "biases"): ("BF16", (3, 1)),
        ("up_proj", "weight"): ("F16", (3, 64)),
        ("down_proj", "weight"): ("F32", (64, 3)),
    },
    {"gate_proj": Quantization(4, 64), "up_proj": None, "down_proj": None},
)


class CountingSource:
    """Fills a record with ``layer * 100 + expert`` bytes when waited for; can be told to fail."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.fail_next: BaseException | None = None

    def submit(self, requests: Sequence[ReadRequest]) -> "CountedReads":
        return CountedReads(self, requests)

    def drain(self) -> None:
        pass


@dataclass
class CountedReads:
    source: CountingSource
    requests: Sequence[ReadRequest]

    def wait(self) -> int:
        if self.source.fail_next is not None:
            error, self.source.fail_next = self.source.fail_next, None
            raise error
        for r in self.requests:
            self.source.reads.append((r.layer, r.expert))
            r.buffer[:] = bytes([r.layer * 100 + r.expert]) * len(r.buffer)
        return sum(len(r.buffer) for r in self.requests)


MakeCache = Callable[..., tuple[ExpertCache, CountingSource]]


@pytest.fixture(scope="module", params=[UnifiedMemory, StagingMemory])
def make_cache(request: pytest.FixtureRequest) -> MakeCache:
    """Whatever kind of memory the slots are, the cache over them behaves the same."""

    def make(slots: int, layers: int = 1, policy: Callable[[], Policy] = AgedLFU):
        source = CountingSource()
        layouts, num_slots = dict.fromkeys(range(layers), LAYOUT), dict.fromkeys(range(layers), slots)
        return ExpertCache(request.param(source), layouts, num_slots, policy), source

    return make


def contents(cache: ExpertCache, layer: int, slot: int) -> int:
    """The number that a slot's record is full of, as kernels see it."""
    values = set(np.array(cache.bank(layer).array[slot]).tobytes())
    assert len(values) == 1, "a slot holds parts of two records"
    return values.pop()


def test_parts_are_views_of_what_was_written_later() -> None:
    bank = UnifiedSlots(LAYOUT, 5)
    views = {part.name: bank.part(part.name) for part in LAYOUT.parts}
    rng = np.random.default_rng(0)
    expected = {}
    for part in LAYOUT.parts:
        kind = {"U32": np.uint32, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}[part.dtype]
        values = rng.integers(1, 200, part.shape).astype(kind)
        expected[part.name] = values
        bank.slot(3)[part.offset : part.offset + part.nbytes] = values.tobytes()
    for part in LAYOUT.parts:
        view = views[part.name]
        assert view.shape == (5, *part.shape)
        raw = view[3].view(mx.uint16) if part.dtype == "BF16" else view[3]
        np.testing.assert_array_equal(np.array(raw), expected[part.name])
        assert not np.array(view[2].astype(mx.float32)).any()


def test_parts_start_on_their_boundaries() -> None:
    assert all(part.offset % 16 == 0 for part in LAYOUT.parts)
    assert LAYOUT.record_bytes % 512 == 0
    assert LAYOUT.record_bytes >= LAYOUT.parts[-1].offset + LAYOUT.parts[-1].nbytes


@pytest.mark.parametrize("slots", [0, 2**31])
def test_impossible_banks(slots: int) -> None:
    with pytest.raises(ShapeError):
        UnifiedSlots(LAYOUT, slots)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 9), min_size=1, max_size=6)), max_size=40),
)
def test_behaves_as_lru_and_every_slot_holds_its_record(
    make_cache: MakeCache, slots: int, requests: list[tuple[int, set[int]]]
) -> None:
    cache, source = make_cache(slots, layers=2, policy=LRU)
    model: dict[int, list[int]] = {0: [], 1: []}
    for layer, wanted in requests:
        experts = sorted(wanted)[:slots]
        fetch = cache.acquire(layer, experts)
        fetch.wait()
        assert set(fetch.misses) == set(experts) - set(model[layer])
        assert len(set(fetch.slots.values())) == len(experts)
        for expert, slot in fetch.slots.items():
            assert contents(cache, layer, slot) == layer * 100 + expert
        # Least recently used first.
        kept = [e for e in model[layer] if e not in experts]
        room = slots - len(experts)
        model[layer] = kept[len(kept) - min(room, len(kept)) :] + experts
        assert set(cache.present(layer)) == set(model[layer])
    assert len(source.reads) == len([1 for _ in source.reads])


def test_more_experts_than_slots_is_an_error_that_changes_nothing(make_cache: MakeCache) -> None:
    cache, _ = make_cache(3)
    cache.acquire(0, [1, 2]).wait()
    with pytest.raises(MemoryLimitError, match="3 slots"):
        cache.acquire(0, [1, 2, 3, 4])
    assert cache.present(0) == (1, 2)


@pytest.mark.parametrize("error", [StoreError("disk"), KeyboardInterrupt()])
def test_a_record_counts_as_present_only_when_whole(make_cache: MakeCache, error: BaseException) -> None:
    cache, source = make_cache(2)
    cache.acquire(0, [1, 2]).wait()
    source.fail_next = error
    fetch = cache.acquire(0, [3])
    assert 3 not in cache.present(0)
    with pytest.raises(type(error)):
        fetch.wait()
    assert cache.present(0) == (2,)
    # No slot is lost: both are usable again, and hold what they say.
    again = cache.acquire(0, [3, 4])
    again.wait()
    assert sorted(again.slots.values()) == [0, 1]
    assert contents(cache, 0, again.slots[3]) == 3


def test_a_fetch_that_nobody_waited_for_is_forgotten(make_cache: MakeCache) -> None:
    cache, _ = make_cache(2)
    cache.acquire(0, [1, 2])
    later = cache.acquire(0, [1, 3])
    assert set(later.misses) == {1, 3}
    later.wait()
    assert set(cache.present(0)) == {1, 3}


def test_resize_and_clear(make_cache: MakeCache) -> None:
    cache, source = make_cache(4, layers=2)
    for layer in (0, 1):
        cache.acquire(layer, [1, 2, 3]).wait()
    cache.resize({0: 2, 1: 4})
    assert cache.present(0) == (), "no memory to keep any by"
    assert cache.present(1) == (1, 2, 3), "an unchanged layer keeps its experts"
    assert cache.nbytes == 6 * LAYOUT.record_bytes
    cache.acquire(0, [5, 6]).wait()
    assert (cache.num_slots(0), cache.total_slots) == (2, 6)
    cache.clear()
    assert cache.present(1) == ()
    cache.acquire(1, [1, 2, 3, 4]).wait()
    assert source.reads[-4:] == [(1, 1), (1, 2), (1, 3), (1, 4)]


@pytest.mark.parametrize("slots", [3, 6])
@pytest.mark.parametrize("spare", [0, 1, 2, 8])
def test_experts_worth_keeping_outlive_a_resize(make_cache: MakeCache, slots: int, spare: int) -> None:
    """The most used ones, as many as may be copied and as fit; with their bytes, in slots that hold nothing else."""
    cache, source = make_cache(4)
    for experts in ([1, 2, 3, 4], [2, 3, 4], [2, 4], [4]):
        cache.acquire(0, experts).wait()
    source.reads.clear()
    cache.resize({0: slots}, spare * LAYOUT.record_bytes)
    kept = {4, 2, 3, 1} if spare == 8 and slots == 6 else {*(4, 2, 3)[:spare]}
    assert set(cache.present(0)) == kept
    assert source.reads == []
    fetch = cache.acquire(0, [2, 4, 5])
    fetch.wait()
    assert set(fetch.misses) == {2, 4, 5} - kept
    for expert, slot in cache._layers[0].present.items():
        assert contents(cache, 0, slot) == expert
    table = cache._layers[0]
    assert sorted([*table.present.values(), *table.free]) == list(range(slots))


def test_what_is_known_of_experts_outlives_a_resize(make_cache: MakeCache) -> None:
    cache, _ = make_cache(3)
    for _ in range(5):
        cache.acquire(0, [7]).wait()
    cache.resize({0: 2})
    cache.acquire(0, [7]).wait()
    for expert in (1, 2, 3):
        cache.acquire(0, [expert]).wait()
    assert 7 in cache.present(0), "five uses before the resize weigh more than one after it"


def test_experts_of_a_large_pass_come_hottest_last(make_cache: MakeCache) -> None:
    cache, _ = make_cache(2)
    cache.acquire(0, [5]).wait()
    ordered, hits = cache.order(0, [1, 2, 3, 5], [7, 1, 4, 1], tokens=10)
    assert (ordered, hits) == ([5, 2, 3, 1], 1)
    for group in ([5, 2], [3, 1]):
        cache.acquire(0, group, counted=True).wait()
    assert set(cache.present(0)) == {3, 1}


@settings(deadline=None)
@given(
    slots=st.integers(1, 9),
    passes=st.lists(st.sets(st.integers(0, 15), min_size=1), min_size=1, max_size=4),
    tokens=st.sampled_from([1, 100]),
)
def test_a_wave_stays_while_the_next_is_read(
    make_cache: MakeCache, slots: int, passes: list[set[int]], tokens: int
) -> None:
    """And each expert of a pass comes once, is read at most once, and not at all if it was in memory."""
    cache, source = make_cache(slots)
    for wanted in passes:
        ordered, hits = cache.order(0, sorted(wanted), None, tokens)
        present, read = set(cache.present(0)), len(source.reads)
        planned = plan_groups(ordered, hits, slots, tokens)
        assert sorted(expert for group in planned for expert in group.experts) == sorted(wanted)
        fetch = cache.acquire(0, planned[0].experts, counted=True)
        fetch.wait()
        for group, following in itertools.zip_longest(planned, planned[1:]):
            current = fetch
            if following is not None:
                assert following.keep == (group.experts if slots > 1 else [])
                fetch = cache.acquire(0, following.experts, counted=True, keep=following.keep)
                fetch.wait()  # it lands while the first one is being computed
            if slots > 1:
                assert {contents(cache, 0, slot) for slot in current.slots.values()} == set(group.experts)
        assert set(source.reads[read:]) == {(0, expert) for expert in wanted - present}
        assert len(source.reads[read:]) == len(wanted - present)


def test_what_is_kept_counts_as_asked_for(make_cache: MakeCache) -> None:
    cache, _ = make_cache(3)
    cache.acquire(0, [1, 2]).wait()
    with pytest.raises(MemoryLimitError, match="4 experts"):
        cache.acquire(0, [3, 4], keep=[1, 2])
