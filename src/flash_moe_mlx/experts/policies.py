"""Eviction policies: which expert of a layer gives up its slot. Plain numpy: the engine and simulations share the code.

A policy is told which experts are used, and keeps a score of every expert, in memory or not: a layer has a few hundred,
so nothing has to be forgotten. The expert in memory with the lowest score is evicted first.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

HALF_LIFE = 32
"""Number of tokens after which a use counts half. Measured: experiments 030 to 032."""

FRESH_WEIGHT = 0.25
"""Factor on a newcomer's score where hits are rare: suits cycles of up to 2 ``HALF_LIFE`` tokens."""

RARE = 1.3
"""Below this multiple of a static cache's hit odds, the workload counts as cyclic. Absorbs bursts of hits."""

HITS_HALF_LIFE = 4
"""Half-lives of a use after which a hit counts half, so that bursts of hits in a cycle average out."""

_FIRST_EXPERTS = 64  # initial size; arrays grow with the largest expert id seen
_LARGEST_INCREMENT = 1e200


class Policy(Protocol):
    """Decides which experts keep the slots of one layer."""

    def used(self, experts: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 1) -> None:
        """Note that a forward pass of ``tokens`` tokens uses experts, ``counts`` tokens each (None: one each)."""
        ...

    def entered(self, experts: Sequence[int], displaced: bool) -> None:
        """Note that experts were given slots: those of evicted experts if ``displaced``, else free ones."""
        ...

    def victims(self, count: int, wanted: Sequence[int]) -> list[int]:
        """Choose ``count`` experts to evict now, none of them in ``wanted``."""
        ...

    def restore(self, present: Iterable[int]) -> None:
        """Note that exactly these experts are in memory."""
        ...

    def scores(self, experts: Sequence[int]) -> list[float]:
        """Return how much each expert is worth keeping, in the policy's own measure."""
        ...


class _ByScore:
    """Policy that evicts the lowest score first. Subclasses maintain ``_score``."""

    def __init__(self) -> None:
        self._score = np.zeros(_FIRST_EXPERTS)
        self._held = np.zeros(_FIRST_EXPERTS, bool)  # whether each expert is in memory
        self._num_experts = 0  # lower bound: the largest id seen, plus one

    def _grow(self, experts: Sequence[int]) -> None:
        if (most := max(experts, default=0)) < self._num_experts:
            return
        # An interrupt between two of these lines is harmless: the next call executes them again.
        if most >= len(self._score):
            size = max(most + 1, 2 * len(self._score))
            self._held = np.pad(self._held, (0, size - len(self._held)))
            self._score = np.pad(self._score, (0, size - len(self._score)))
        self._num_experts = most + 1

    def entered(self, experts: Sequence[int], displaced: bool) -> None:
        self._grow(experts)
        self._held[experts] = True

    def victims(self, count: int, wanted: Sequence[int]) -> list[int]:
        score = np.where(self._held, self._weighted(count), np.inf)
        score[wanted] = np.inf
        chosen: list[int] = score.argpartition(count - 1)[:count].tolist()
        self._held[chosen] = False
        return chosen

    def _weighted(self, missing: int) -> np.ndarray:
        return self._score

    def restore(self, present: Iterable[int]) -> None:
        experts = list(present)
        self._grow(experts)
        self._held[:] = False
        self._held[experts] = True

    def scores(self, experts: Sequence[int]) -> list[float]:
        self._grow(experts)
        return self._score[list(experts)].tolist()  # type: ignore[no-any-return]


class LRU(_ByScore):
    """Evicts the least recently used expert. It never hits on a cycle of requests longer than the slots."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0

    def used(self, experts: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 1) -> None:
        self._grow(experts)
        self._score[experts] = np.arange(self._clock + 1, self._clock + 1 + len(experts))
        self._clock += len(experts)


class AgedLFU(_ByScore):
    """Evicts the least frequently used expert, where a use counts half after ``half_life`` tokens.

    Uses of experts that are not in memory count too, so an expert that returns keeps its history.

    Where experts are requested in a cycle longer than the slots, the one used longest ago is needed next, and nothing
    ever hits. So when hits are rarer than those of a fixed choice of experts would be, newcomers (experts that took
    another's slot and were not requested since) count ``fresh_weight`` of their score: they displace each other, and
    the others stay.

    Reference: Lee et al. 2001, "LRFU: a spectrum of policies", doi:10.1109/TC.2001.970573, for the ageing.
    """

    def __init__(self, half_life: float = HALF_LIFE, fresh_weight: float = FRESH_WEIGHT):
        super().__init__()
        self._half_life = half_life
        self._fresh_weight = fresh_weight
        self._increment = 1.0  # grows, instead of shrinking all scores
        self._growth = 2 ** (1 / half_life)
        self._fresh: set[int] = set()
        self._asked = self._missed = 0.0  # requested and missed experts, with ageing

    def used(self, experts: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 1) -> None:
        self._grow(experts)
        if tokens == 1:
            aged = 1 / self._growth
            self._increment *= self._growth
            self._score[np.array(experts, np.int64)] += self._increment
        else:
            # Equivalent to ``tokens`` steps in each of which an expert is used counts / tokens times.
            aged = 2 ** -min(tokens / self._half_life, 16)
            self._increment /= aged
            weight = (1 - aged) / (1 - 1 / self._growth) / tokens
            self._score[experts] += self._increment * weight * (1 if counts is None else np.asarray(counts))
        if self._increment > _LARGEST_INCREMENT:
            self._score /= self._increment
            self._increment = 1.0
        kept = aged ** (1 / HITS_HALF_LIFE)
        self._asked = kept * self._asked + len(experts)
        self._missed *= kept
        self._fresh.difference_update(experts)

    def entered(self, experts: Sequence[int], displaced: bool) -> None:
        super().entered(experts, displaced)
        self._missed += len(experts)
        if displaced:
            self._fresh.update(experts)

    def victims(self, count: int, wanted: Sequence[int]) -> list[int]:
        chosen = super().victims(count, wanted)
        self._fresh.difference_update(chosen)
        return chosen

    def _weighted(self, missing: int) -> np.ndarray:
        score = self._score
        if self._fresh and self._hits_are_rare(missing):
            score = score.copy()
            score[list(self._fresh)] *= self._fresh_weight
        return score

    def _hits_are_rare(self, missing: int) -> bool:
        """Return whether a fixed choice would hit about as often, if all experts were equally likely."""
        missed, held = self._missed + missing, np.count_nonzero(self._held)
        return bool((self._asked - missed) * (self._num_experts - held) <= RARE * missed * held)

    def restore(self, present: Iterable[int]) -> None:
        super().restore(present)
        self._fresh.clear()


class Belady(_ByScore):
    """Evicts the expert needed latest: the bound that no policy without foresight can reach. For simulations.

    Reference: Belady 1966, doi:10.1147/sj.52.0078.
    """

    def __init__(self, requests: Sequence[Sequence[int]]):
        """Take the experts of every future call of ``used``, in order."""
        super().__init__()
        later: dict[int, int] = {}
        self._next: list[list[int]] = []
        for now in range(len(requests) - 1, -1, -1):
            self._next.append([-later.get(expert, len(requests)) for expert in requests[now]])
            later.update(dict.fromkeys(requests[now], now))

    def used(self, experts: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 1) -> None:
        self._grow(experts)
        self._score[experts] = self._next.pop()
