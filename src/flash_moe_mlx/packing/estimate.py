"""Estimates a packing's sizes before it starts, from its plan only."""

import shutil
from dataclasses import dataclass
from typing import Any

from ..stats import NamedRows, format_bytes
from .plan import PackPlan
from .sources import Source
from .workspace import RESERVE_BYTES, Workspace


@dataclass(frozen=True)
class Estimate(NamedRows):
    """Estimated sizes and disk space. Prints as a short table, and as HTML in a notebook.

    Attributes:
        source_bytes: Total size of the source's tensors.
        result_bytes: Size of the result.
        remaining_bytes: Bytes of the result that are not written yet.
        needed_bytes: Free disk space that the destination needs to start: the rest of the result, and shards.
        free_bytes: Free disk space.
        lossy: Settings that change weights, in words.
    """

    source_bytes: int
    result_bytes: int
    remaining_bytes: int
    needed_bytes: int
    free_bytes: int
    lossy: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs in display order."""
        short = self.needed_bytes - self.free_bytes
        rows = [
            ("source", format_bytes(self.source_bytes)),
            ("result", format_bytes(self.result_bytes)),
            ("to write", format_bytes(self.remaining_bytes)),
            ("disk needed", format_bytes(self.needed_bytes)),
            ("disk free", format_bytes(self.free_bytes) + (f": {format_bytes(short)} missing" if short > 0 else "")),
        ]
        return rows + [("lossy", choice) for choice in self.lossy]

    def to_json(self) -> dict[str, Any]:
        """Return the value that ``flash-moe pack --dry-run --json`` prints."""
        return vars(self) | {"lossy": list(self.lossy)}


def estimate(plan: PackPlan, source: Source, workspace: Workspace, remaining_bytes: int) -> Estimate:
    """Add up what a plan reads and writes, and ask for the room on the destination's disk."""
    return Estimate(
        source_bytes=sum(info.nbytes for info in plan.checkpoint.tensors.values()),
        result_bytes=plan.result_bytes,
        remaining_bytes=remaining_bytes,
        needed_bytes=remaining_bytes + RESERVE_BYTES + source.held_bytes,
        free_bytes=shutil.disk_usage(workspace.destination).free,
        lossy=plan.lossy,
    )
