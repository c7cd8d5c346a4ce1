"""SlotTable: which expert of a layer is in which slot. Bookkeeping without memory; simulations use it too."""

from collections.abc import Sequence
from typing import NamedTuple

from .policies import Policy

PAIRWISE_TOKENS = 8
"""Up to this many tokens, each (token, expert) pair is computed on its own, in one call where all experts fit."""

GROUP_EXPERTS = 32
"""Experts of a prompt that are computed while the next ones are read: enough to keep threads and disk busy."""


class PlannedGroup(NamedTuple):
    """Experts that are brought in together.

    Attributes:
        experts: The experts.
        keep: The group before, where the slots hold both: its experts stay while this one is read.
    """

    experts: list[int]
    keep: list[int]


def plan_groups(ordered: Sequence[int], hits: int, num_slots: int, tokens: int) -> list[PlannedGroup]:
    """Split experts into groups of which two neighbours fit the slots: one is computed while the next is read.

    All are one group where that is possible and nothing would be gained.

    Args:
        ordered: Distinct experts, as `SlotTable.order` returns them.
        hits: Number of them, the first ones, that are in memory.
        num_slots: S.
        tokens: Number of tokens in the forward pass.
    """
    fit = len(ordered) <= num_slots
    if fit and (tokens <= PAIRWISE_TOKENS or hits == len(ordered) or len(ordered) <= GROUP_EXPERTS):
        return [PlannedGroup(list(ordered), [])] if ordered else []
    # Where some have to leave, larger groups would push out what decode wants: experiment 062.
    size = GROUP_EXPERTS if fit else max(min(num_slots // 4, GROUP_EXPERTS), 1)
    present, missing = ordered[:hits], ordered[hits:]
    groups = [list(part[i : i + size]) for part in (present, missing) for i in range(0, len(part), size)]
    before = [[], *groups] if num_slots > 1 else [[] for _ in groups]
    return [PlannedGroup(group, keep) for group, keep in zip(groups, before, strict=False)]


class SlotTable:
    """Slots of one layer: experts in them, and slots that are free or being filled.

    Attributes:
        num_slots: S.
        present: Slot of each expert whose record is whole.
        filling: Slot of each expert that is being read.
        free: Slots that hold nothing.
        hits, misses: Experts asked for since the beginning, counted by `order`.
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
        """Count distinct experts as used, and say in which order to bring them in, where that takes several groups.

        Those present come first, so that the first group evicts none that is wanted; then, where there are more than
        slots, the others by how much they are worth keeping, the most at last.

        Args:
            experts: Distinct expert ids.
            counts: Tokens that picked each; None is one each.
            tokens: Of the forward pass.

        Returns:
            The experts in order, and how many of them are present.
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
        """Slots of distinct experts; each absent one gets a free slot, or that of an expert which leaves.

        Args:
            experts: The experts of one group.
            keep: Experts that may not leave, since they are being computed: with the others, at most S.
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

    def publish(self) -> None:
        """Records that were being read are whole."""
        self.present.update(self.filling)
        self.filling.clear()
        self.unsettled = False

    def release(self) -> None:
        """Give up slots whose records never arrived.

        An interrupt may have come between any two steps of `claim` and `publish`, with a slot in no list or in two:
        what holds an expert is what `present` says, and every other slot is free.
        """
        self.filling.clear()
        held = set(self.present.values())
        self.free = [slot for slot in range(self.num_slots)[::-1] if slot not in held]
        self._policy.restore(self.present)
        self.unsettled = False

    def clear(self) -> None:
        """Forget what is in memory."""
        self.unsettled = True
        self.present.clear()
        self.release()
