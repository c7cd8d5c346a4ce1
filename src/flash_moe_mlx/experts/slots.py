"""SlotTable: the slot of each expert of a layer. Bookkeeping without memory, shared with simulations."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from .policies import Policy

PAIRWISE_TOKENS = 8
"""Up to this number of tokens, each (token, expert) pair is computed separately, in one call if all experts fit."""

GROUP_EXPERTS = 32
"""Experts of a prompt computed while the next ones are read: enough to keep threads and disk busy."""


REPLACE_RATIO = 1.5
"""How much more an absent expert must be worth than one in a slot, to be read in its place between two tokens."""


class PlannedGroup(NamedTuple):
    """The experts of one group, and those of the previous group that must stay resident while it is read.

    Attributes:
        experts: Experts to bring in together.
        keep: Experts of the previous group, if the slots hold both groups.
    """

    experts: list[int]
    keep: list[int]


def plan_groups(ordered: Sequence[int], hits: int, num_slots: int, tokens: int) -> list[PlannedGroup]:
    """Split experts into groups such that two neighbours fit the slots: one is computed while the next is read.

    Returns a single group if everything fits and splitting would gain nothing.

    Args:
        ordered: Distinct experts, as `SlotTable.order` returns them.
        hits: Number of leading experts that are already in memory.
        num_slots: Number of slots, S.
        tokens: Number of tokens in the forward pass.
    """
    fit = len(ordered) <= num_slots
    if fit and (tokens <= PAIRWISE_TOKENS or hits == len(ordered) or len(ordered) <= GROUP_EXPERTS):
        return [PlannedGroup(list(ordered), [])] if ordered else []
    # If experts must be evicted, larger groups would displace those that decode needs: experiment 062.
    size = GROUP_EXPERTS if fit else max(min(num_slots // 4, GROUP_EXPERTS), 1)
    present, missing = ordered[:hits], ordered[hits:]
    groups = [list(part[i : i + size]) for part in (present, missing) for i in range(0, len(part), size)]
    before = [[], *groups] if num_slots > 1 else [[] for _ in groups]
    return [PlannedGroup(group, keep) for group, keep in zip(groups, before, strict=False)]


class SlotTable:
    """Slots of one layer: occupied, free or being filled.

    Attributes:
        num_slots: Number of slots, S.
        present: Slot of each expert whose record is complete.
        filling: Slot of each expert that is being read.
        free: Slots that hold nothing.
        hits, misses: Total number of requested experts that were or were not present, counted by `order`.
    """

    def __init__(self, num_slots: int, policy: Policy):
        self.num_slots = num_slots
        self.present: dict[int, int] = {}
        self.filling: dict[int, int] = {}
        self.free = list(range(num_slots))[::-1]
        self.unsettled = False
        self.hits = self.misses = 0
        self._policy = policy

    def order(
        self, experts: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 1
    ) -> tuple[list[int], int]:
        """Count distinct experts as used, and return the order in which to bring them in.

        Experts that are present come first, so that the first group evicts none that is wanted. If there are more
        experts than slots, the rest follow, least valuable first.

        Args:
            experts: Distinct expert ids.
            counts: Number of tokens that picked each expert; None means one each.
            tokens: Number of tokens in the forward pass.

        Returns:
            The ordered experts, and how many of them are present.
        """
        self._policy.used(experts, counts, tokens)
        hits = [e for e in experts if e in self.present]
        missing = [e for e in experts if e not in self.present]
        self.hits += len(hits)
        self.misses += len(missing)
        if len(experts) > self.num_slots:
            worth = dict(zip(missing, self._policy.scores(missing), strict=True))
            missing.sort(key=worth.__getitem__)
        return hits + missing, len(hits)

    def claim(self, experts: Sequence[int], keep: Sequence[int] = ()) -> dict[int, int]:
        """Return slots of distinct experts; each absent one gets a free slot or that of an evicted expert.

        Args:
            experts: The experts of one group.
            keep: Experts that must not be evicted because they are in use; at most S together with ``experts``.
        """
        self.unsettled = True
        present, filling, free = self.present, self.filling, self.free
        misses = [e for e in experts if e not in present]
        displaced = len(misses) > len(free)
        if displaced:
            for victim in self._policy.victims(len(misses) - len(free), [*experts, *keep]):
                free.append(present.pop(victim))
        if misses:
            for expert in misses:
                filling[expert] = free.pop()
            self._policy.entered(misses, displaced)
        self.unsettled = bool(filling)
        return {e: present[e] if e in present else filling[e] for e in experts}

    def make_free(self, count: int) -> bool:
        """Evict the least valuable experts until ``count`` slots are free; return whether any was evicted."""
        wanting = count - len(self.free)
        if wanting <= 0:
            return False
        self.unsettled = True
        for victim in self._policy.victims(wanting, []):
            self.free.append(self.present.pop(victim))
        self.unsettled = bool(self.filling)
        return True

    def more_valuable(self, experts: Sequence[int], kept_free: int) -> list[int]:
        """Return absent experts that deserve a slot: a free one, or that of an expert worth much less.

        Args:
            experts: Experts that may have a slot.
            kept_free: Number of slots that are to stay free.
        """
        scores = dict(zip(experts, self._policy.scores(experts), strict=True))
        absent = [e for e in experts if e not in self.present and scores[e] > 0]
        absent.sort(key=scores.__getitem__, reverse=True)
        weakest = sorted(self.present, key=scores.__getitem__)
        room = max(len(self.free) - kept_free, 0)
        better = itertools.takewhile(
            lambda pair: scores[pair[0]] > REPLACE_RATIO * scores[pair[1]], zip(absent[room:], weakest, strict=False)
        )
        return absent[:room] + [expert for expert, _ in better]

    def publish(self) -> None:
        """Mark the records that were being read as complete."""
        self.present.update(self.filling)
        self.filling.clear()
        self.unsettled = False

    def release(self) -> None:
        """Free slots whose records never arrived.

        An interrupt may have left a slot in no list or in two, between any two steps of `claim` and `publish`. So
        ``present`` alone decides which slots are occupied; all others are free.
        """
        self.filling.clear()
        held = set(self.present.values())
        self.free = [slot for slot in range(self.num_slots)[::-1] if slot not in held]
        self._policy.restore(self.present)
        self.unsettled = False

    def clear(self) -> None:
        """Drop all experts."""
        self.unsettled = True
        self.present.clear()
        self.release()
