"""The share of the experts that a packing writes: parsed from "i/N", placed once the source's layers are known."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError
from ..experts.placement import Placement
from ..formats.checkpoint import Checkpoint
from ..formats.packed_share import MAX_RANKS, LayerShare

_SHARD = re.compile(r"([0-9]{1,5})/([0-9]{1,5})", re.ASCII)


@dataclass(frozen=True)
class ShareRequest:
    """A share to write.

    Attributes:
        rank: Rank that loads it, from 0.
        ranks: Number of ranks.
        placement: Plan file that says which rank holds which experts; None deals them out by number.
    """

    rank: int
    ranks: int
    placement: Path | None = None

    def place(self, checkpoint: Checkpoint) -> dict[int, LayerShare]:
        """Return the share of each layer.

        Raises:
            RequestError: If the plan file is not of this checkpoint, or a layer has fewer experts than there are ranks.
        """
        counts = {layer: checkpoint.num_experts(layer) for layer in checkpoint.moe_layers}
        if self.placement is None:
            placement = Placement.by_number(counts, self.ranks)
        else:
            placement = Placement.read(self.placement, counts, self.ranks)
        return {
            layer: LayerShare(self.rank, self.ranks, tuple(owner.tolist())) for layer, owner in placement.owners.items()
        }


def parse_share(shard: str | None, placement: str | Path | None = None) -> ShareRequest | None:
    """Parse pack's arguments.

    Raises:
        RequestError: If they are not usable.
    """
    if shard is None:
        if placement is not None:
            raise RequestError(f"[placement] must come with a shard, got {placement} alone. Add shard, such as 0/2.")
        return None
    found = _SHARD.fullmatch(shard) if isinstance(shard, str) else None
    rank, ranks = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 2 <= ranks <= MAX_RANKS or rank >= ranks:
        raise RequestError(
            f"[shard] must be rank/ranks with ranks from 0, such as 0/2 and 1/2, got {shard!r}. Count from 0."
        )
    return ShareRequest(rank, ranks, None if placement is None else Path(placement).expanduser())


def check_whole(checkpoint: Checkpoint) -> None:
    """Check that a source has all experts.

    Raises:
        RequestError: If it is one rank's share.
    """
    if checkpoint.manifest is not None and (label := checkpoint.manifest.share) is not None:
        raise RequestError(
            f"[source] {checkpoint.directory} must hold all experts, got {label}. Name the checkpoint it was packed "
            "from."
        )
