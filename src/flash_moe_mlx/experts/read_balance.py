"""ReadBalance: which rank computes an expert, so that all ranks read about as many missing experts at once.

Half of the missing experts belong to each of two ranks on average, but to one of them more in most layers, and the
other waits. If every rank can read every expert, those that no rank has in a slot are dealt out evenly instead. One
that is in a slot is computed there, so experts stay in the slots of one rank.

Every exchange of outputs carries which experts are in each rank's slots: no message is added. Slots may have changed
when that knowledge is used, in which case the rank that was thought to hold an expert reads it. Only that all ranks
know the same matters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .placement import Placement

_BITS = 32

Holding = Callable[[int], tuple[tuple[int, ...], int]]
"""Returns a layer's experts in this rank's slots, and the number of slots."""


@dataclass(frozen=True)
class _Known:
    """Knowledge about one layer's slots on all ranks.

    Attributes:
        homes: Rank that holds each expert, its owner's number first; -1 for none. Shape (E,), int64.
        free: Number of slots of each rank that hold nothing.
    """

    homes: np.ndarray
    free: list[int]


class ReadBalance:
    """Division of each pass's experts between ranks, from what all of them have told each other."""

    def __init__(self, placement: Placement, rank: int, holding: Holding):
        """Begin with the placement, which holds until something is known.

        Args:
            placement: Rank that owns each expert.
            rank: This rank's number.
            holding: Returns what this rank's slots hold.
        """
        self._placement, self._rank, self._holding = placement, rank, holding
        self._known: dict[int, _Known] = {}

    def words(self, layer: int) -> np.ndarray:
        """Return this rank's part of what all have to know, with zeros for the others. Shape (n,), uint32."""
        present, num_slots = self._holding(layer)
        words = np.zeros((self._placement.ranks, 1 + self._width(layer)), np.uint32)
        held = np.zeros(_BITS * self._width(layer), np.uint8)
        held[list(present)] = 1
        words[self._rank, 0] = num_slots
        words[self._rank, 1:] = np.packbits(held).view(np.uint32)
        return words.reshape(-1)

    def learn(self, layer: int, words: np.ndarray) -> None:
        """Take the sum of all ranks' words."""
        owners, ranks = self._placement.owners[layer], self._placement.ranks
        table = np.ascontiguousarray(words).reshape(ranks, -1)
        owned = np.bincount(owners, minlength=ranks)
        if (table[:, 0] >= owned).all():  # each owner has room for its experts, which are read once
            self._known.pop(layer, None)
            return
        held = np.unpackbits(table[:, 1:].copy().view(np.uint8), axis=1)[:, : len(owners)].astype(bool)
        others = np.where(held.any(0), held.argmax(0), -1)
        homes = np.where(held[owners, np.arange(len(owners))], owners, others)
        self._known[layer] = _Known(homes, (table[:, 0].astype(np.int64) - held.sum(1)).tolist())

    def ranks_of(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """Return the rank that computes each expert. Shape (E,), int64; of the experts in ``ids`` only.

        Args:
            layer: The layer.
            ids: The router's choice, of any shape.
        """
        owners = self._placement.owners[layer]
        if (known := self._known.get(layer)) is None:
            return owners
        ranks, free = known.homes.copy(), list(known.free)
        reads = [0] * len(free)
        # A rank has at least as many slots as it owns experts, or as a token picks.
        room = np.bincount(owners, minlength=len(free)).tolist()
        missing = []
        for expert in np.unique(ids).tolist():
            if (home := int(ranks[expert])) >= 0 and room[home]:
                room[home] -= 1
            else:
                missing.append(expert)
        for expert in missing:
            # Of the ranks that read the fewest, the one with most free slots, then the owner.
            able = (rank for rank in range(len(free)) if room[rank])
            rank = min(able, key=lambda r: (reads[r], -free[r], r != owners[expert]))
            ranks[expert] = rank
            reads[rank] += 1
            room[rank] -= 1
            free[rank] = max(free[rank] - 1, 0)
        return ranks

    def _width(self, layer: int) -> int:
        return -(-len(self._placement.owners[layer]) // _BITS)
