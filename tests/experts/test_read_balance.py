"""Reads divided between ranks: even, the same on all, experts computed where they are, and never more than fit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flash_moe_mlx.experts.distributed import Share
from flash_moe_mlx.experts.executor import ELSEWHERE
from flash_moe_mlx.experts.placement import Placement
from flash_moe_mlx.experts.read_balance import ReadBalance

EXPERTS, K = 40, 8


class Simulated:
    """Ranks whose slots hold the experts that they computed last."""

    def __init__(self, placement: Placement, num_slots: int):
        self.held: list[list[int]] = [[] for _ in range(placement.ranks)]
        self.num_slots = num_slots
        self.balances = [ReadBalance(placement, rank, self._holding(rank)) for rank in range(placement.ranks)]

    def _holding(self, rank: int) -> Any:
        return lambda layer: (tuple(self.held[rank]), self.num_slots)

    def token(self, ids: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return the rank of each expert, and how many each rank reads; then tell all what the slots hold."""
        answers = [balance.ranks_of(0, ids)[ids] for balance in self.balances]
        assert all((answer == answers[0]).all() for answer in answers)
        reads = []
        for rank, held in enumerate(self.held):
            own = ids[answers[0] == rank].tolist()
            reads.append(len(set(own) - set(held)))
            held[:] = [*(expert for expert in held if expert not in own), *own][-self.num_slots :]
        total = np.sum([balance.words(0) for balance in self.balances], 0, dtype=np.uint32)
        for balance in self.balances:
            balance.learn(0, total)
        return answers[0], reads


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_read_equally_many(ranks: int):
    rng = np.random.default_rng(7)
    simulated = Simulated(Placement.by_number({0: EXPERTS}, ranks), 10)
    spread, owners = [], []
    for _ in range(60):
        ids = rng.choice(EXPERTS, K, replace=False)
        before = [set(held) for held in simulated.held]
        computed, reads = simulated.token(ids)
        spread.append(max(reads) - min(reads))
        owners.append(max(np.bincount(ids % ranks)) - min(np.bincount(ids % ranks, minlength=ranks)))
        if len(spread) > 1:
            for expert, rank in zip(ids.tolist(), computed.tolist(), strict=True):
                assert expert in before[rank] or not any(expert in held for held in before)
    assert max(spread[1:]) <= 1 and max(owners) > 3  # by owner they would not


def test_experts_stay_with_their_owners_where_all_fit():
    rng = np.random.default_rng(7)
    simulated = Simulated(Placement.by_number({0: EXPERTS}, 2), EXPERTS // 2)
    for _ in range(20):
        ids = rng.choice(EXPERTS, K, replace=False)
        assert (simulated.token(ids)[0] == ids % 2).all()
    assert not set(simulated.held[0]) & set(simulated.held[1])


def test_a_rank_gets_no_more_than_it_has_slots_for():
    """One that owns fewer experts than a token picks may have no more slots, whatever it said it holds."""
    placement = Placement(2, {0: (np.arange(EXPERTS) < 3).astype(np.int64)})
    simulated = Simulated(placement, 10)
    simulated.held[1][:] = range(5, 12)
    simulated.token(np.arange(K))
    computed, _ = simulated.token(np.arange(5, 5 + K))
    assert (computed == 1).sum() == 3


@pytest.mark.parametrize("is_open", [True, False])
def test_exchanges_carry_what_slots_hold(is_open: bool):
    """Rank 0 owns experts 0, 2 and 4, and rank 1 holds 2: each reads one of the other two."""
    placement = Placement.by_number({0: EXPERTS}, 2)
    other = ReadBalance(placement, 1, lambda layer: ((2,), 4))
    told = other.words(0)

    def total(words: np.ndarray) -> np.ndarray:
        words = words.copy()
        words[-len(told) :] += told if is_open else 0
        return words

    ranks: Any = SimpleNamespace(rank=0, size=2, sums_on_gpu=False, sum=total)
    cache: Any = SimpleNamespace(present=lambda layer: (), num_slots=lambda layer: 4)
    share = Share(ranks, placement, is_open=is_open)
    share.use(cache)
    share._check_sums = lambda layer, sums: None  # type: ignore[method-assign]
    y, ids = np.ones((3, 2), np.float32), np.array([0, 2, 4])
    share.exchange(0, ids, share.own(0, ids), y)
    assert (y == 1).all()
    assert share.own(0, ids).tolist() == ([0, ELSEWHERE, ELSEWHERE] if is_open else [0, 2, 4])
