"""Shares of a packed checkpoint: each of several ranks stores some of every layer's experts (docs/format.md)."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

MAX_RANKS = 1 << 16


@dataclass(frozen=True)
class LayerShare:
    """The share of one layer's experts that a file holds.

    Attributes:
        rank: Rank that the file is for, from 0.
        ranks: Number of ranks.
        owners: Rank of each of the layer's experts.
    """

    rank: int
    ranks: int
    owners: tuple[int, ...] = field(repr=False)

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """Numbers of the experts in the file, ascending."""
        return tuple(expert for expert, owner in enumerate(self.owners) if owner == self.rank)

    @cached_property
    def places(self) -> dict[int, int]:
        """Position in the file of each of these experts."""
        return {expert: place for place, expert in enumerate(self.experts)}


@dataclass(frozen=True)
class ShareLabel:
    """What distinguishes a share from all others of the same checkpoint.

    Attributes:
        rank: Rank that it is for, from 0.
        ranks: Number of ranks.
        placement: Digest of the placement.
    """

    rank: int
    ranks: int
    placement: int

    def __str__(self) -> str:
        return f"share {self.rank} of {self.ranks}"


def placement_digest(ranks: int, owners: Mapping[int, Sequence[int]]) -> int:
    """Return the CRC-32 of a placement.

    Args:
        ranks: Number of ranks, at which the CRC starts.
        owners: Rank of each expert, by layer.
    """
    total = ranks
    for layer, owner in sorted(owners.items()):
        total = zlib.crc32(struct.pack(f"<{len(owner)}q", *owner), zlib.crc32(b"%d" % layer, total))
    return total


def share_folder(rank: int, ranks: int) -> str:
    """Return the name of the folder that holds one share, next to the others."""
    return f"{rank}-of-{ranks}"
