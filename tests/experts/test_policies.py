"""Eviction policies against slow definitions of what they do."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe_mlx.experts.policies import LRU, AgedLFU, Belady, Policy
from flash_moe_mlx.experts.slots import SlotTable

REQUESTS = st.lists(st.sets(st.integers(0, 90), min_size=1, max_size=4).map(sorted), min_size=1, max_size=60)


def replay(requests: Sequence[Sequence[int]], slots: int, policy: Policy) -> list[int]:
    """Hits of each request."""
    table = SlotTable(slots, policy)
    hits = []
    for experts in requests:
        before = table.hits
        table.claim(table.order(experts)[0])
        table.publish()
        assert set(experts) <= set(table.present), "what is asked for is in memory"
        assert len(table.present) + len(table.free) == slots
        hits.append(table.hits - before)
    return hits


def rate(requests: Sequence[Sequence[int]], slots: int, policy: Policy) -> float:
    return sum(replay(requests, slots, policy)) / sum(map(len, requests))


def draws(tokens: int, experts: int, k: int, seed: int, exponent: float = 0.0) -> list[list[int]]:
    """Each token's experts, by Zipf's law with this exponent, independent of the others."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(tokens, experts)) - exponent * np.log(1 + rng.permutation(experts))
    return np.argsort(-scores)[:, :k].tolist()


@given(REQUESTS, st.integers(4, 12))
def test_lru_is_lru(requests: list[list[int]], slots: int):
    recent: list[int] = []
    expected = []
    for experts in requests:
        expected.append(len(set(experts) & set(recent)))
        kept = [e for e in recent if e not in experts]
        recent = (kept + experts)[-slots:]
    assert replay(requests, slots, LRU()) == expected


@given(REQUESTS, st.integers(4, 12), st.sampled_from([1.0, 3.0, 50.0]))
def test_aged_lfu_evicts_the_lowest_sum_of_aged_uses(requests: list[list[int]], slots: int, half_life: float):
    table = SlotTable(slots, AgedLFU(half_life, fresh_weight=1.0))
    for now, experts in enumerate(requests):
        before = set(table.present)
        table.claim(table.order(experts)[0])
        table.publish()

        def worth(expert: int, now: int = now) -> float:
            return sum(2 ** ((then - now) / half_life) for then in range(now + 1) if expert in requests[then])

        gone, stayed = before - set(table.present), before & set(table.present) - set(experts)
        if gone and stayed:
            assert max(map(worth, gone)) <= min(map(worth, stayed)) * (1 + 1e-9)


@given(REQUESTS, st.integers(4, 12), st.sampled_from([LRU, AgedLFU]))
def test_nothing_beats_belady(requests: list[list[int]], slots: int, policy: Callable[[], Policy]):
    assert sum(replay(requests, slots, Belady(requests))) >= sum(replay(requests, slots, policy()))


@pytest.mark.parametrize("slots", [20, 48, 96, 200])
@pytest.mark.parametrize("pool", [0, 24, 48], ids=["in-turn", "pool-24", "pool-48"])
def test_cycles_longer_than_the_slots(slots: int, pool: int):
    """The same tokens over and over: recency alone hits little or never, a part that stays in memory hits."""
    experts, k = 256, 8
    in_turn = [[(t * k + j) % experts for j in range(k)] for t in range(32)]
    cycle = draws(pool, experts, k, seed=1) if pool else in_turn
    requests = cycle * (800 // len(cycle))
    if not pool:
        assert rate(requests, slots, LRU()) == 0
    # K slots are always in transit; what any fixed choice of experts would hit is the rest's share.
    assert rate(requests, slots, AgedLFU()) > 0.9 * (slots - k) / experts - 0.02


@pytest.mark.parametrize("slots", [12, 32, 80])
def test_uniform_routing_hits_as_often_as_chance(slots: int):
    requests = draws(1500, 128, 6, seed=2)
    assert rate(requests, slots, AgedLFU()) == pytest.approx((slots - 3) / 128, abs=0.03)


def test_frequency_beats_recency_where_routing_is_local():
    requests = draws(1000, 128, 6, seed=3, exponent=1.0)
    assert rate(requests, 24, AgedLFU()) > rate(requests, 24, LRU()) + 0.03


def test_a_change_of_subject_is_followed():
    first = draws(400, 128, 6, seed=4, exponent=1.2)
    second = draws(400, 128, 6, seed=5, exponent=1.2)
    alone = rate(second[200:], 32, AgedLFU())
    hits = replay(first + second, 32, AgedLFU())
    assert sum(hits[600:]) / (200 * 6) > alone - 0.03


def test_a_chunk_counts_by_its_tokens():
    """Experts that 30 tokens of a prompt picked outweigh those of 2 tokens, and age with each token."""
    policy = AgedLFU(half_life=32)
    policy.used([1, 2, 3], [30, 2, 9], tokens=41)
    one, two, three = policy.scores([1, 2, 3])
    assert one / two == pytest.approx(15)
    assert one / three == pytest.approx(30 / 9)
    single = AgedLFU(half_life=32)
    for _ in range(41):
        single.used([1])
    assert sum([one, two, three]) / policy._increment == pytest.approx(single.scores([1])[0] / single._increment)


@settings(max_examples=20)
@given(st.integers(1, 40))
def test_scores_are_rescaled_in_time(half_life: int):
    """A long run overflows nothing, and changes no order."""
    policy = AgedLFU(half_life)
    for _ in range(60):
        policy.used([1, 2], [500, 250], tokens=1000)
        policy.used([3], [2000], tokens=2000)
    for _ in range(3):
        policy.used([2])
    scores = policy.scores([0, 1, 2, 3])
    assert np.isfinite(scores).all() and 0 == scores[0] <= scores[1] < scores[2]


def test_what_was_never_read_leaves_no_trace():
    table = SlotTable(3, policy := AgedLFU())
    table.claim(table.order([1, 2])[0])
    table.publish()
    table.claim(table.order([3, 4])[0])  # nobody waits for these
    table.release()
    assert sorted([*table.present.values(), *table.free]) == [0, 1, 2]
    assert policy.victims(1, []) == list(table.present)


def test_a_token_whose_experts_are_all_elsewhere_uses_none():
    policy = AgedLFU()
    policy.used([1])
    policy.used([])
    one, two = policy.scores([1, 2])
    assert one > two
