"""What a packing will take, before it is begun: from its plan, and a second's probe of this machine."""

import os
import shutil
import time
from dataclasses import dataclass
from typing import Any

from ..machine import available_cores
from ..stats import NamedRows, format_bytes
from ..system import full_sync
from .plan import PackPlan
from .sources import Source
from .tasks import ExpertTask, SourceFiles
from .workspace import RESERVE_BYTES, Workspace

_PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class Estimate(NamedRows):
    """Sizes, room and time. Prints as a short table, and as HTML in a notebook.

    Attributes:
        source_bytes: Of the source's tensors.
        result_bytes: Of the result.
        remaining_bytes: Of the result that is not written yet.
        needed_bytes: That must be free on the destination's disk to begin: the rest of the result, and shards.
        free_bytes: That are free.
        seconds: About; a download comes on top.
        lossy: What changes weights, in words.
    """

    source_bytes: int
    result_bytes: int
    remaining_bytes: int
    needed_bytes: int
    free_bytes: int
    seconds: float
    lossy: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs in the order in which they are shown."""
        short = self.needed_bytes - self.free_bytes
        rows = [
            ("source", format_bytes(self.source_bytes)),
            ("result", format_bytes(self.result_bytes)),
            ("to write", format_bytes(self.remaining_bytes)),
            ("disk needed", format_bytes(self.needed_bytes)),
            ("disk free", format_bytes(self.free_bytes) + (f": {format_bytes(short)} missing" if short > 0 else "")),
            ("time", f"about {self.seconds:.0f} s on this machine, downloads not counted"),
        ]
        return rows + [("lossy", choice) for choice in self.lossy]

    def to_json(self) -> dict[str, Any]:
        """As ``flash-moe pack --dry-run --json`` prints it."""
        return vars(self) | {"lossy": list(self.lossy)}


def estimate(plan: PackPlan, source: Source, workspace: Workspace, remaining_bytes: int) -> Estimate:
    """Estimate from one task's speed on one core, and the disk's on a small file."""
    rate = min(_task_rate(plan) * available_cores(), _write_rate(workspace))
    return Estimate(
        source_bytes=sum(info.nbytes for info in plan.checkpoint.tensors.values()),
        result_bytes=plan.result_bytes,
        remaining_bytes=remaining_bytes,
        needed_bytes=remaining_bytes + RESERVE_BYTES + source.held_bytes,
        free_bytes=shutil.disk_usage(workspace.destination).free,
        seconds=remaining_bytes / rate,
        lossy=plan.lossy,
    )


def _task_rate(plan: PackPlan) -> float:
    """Bytes of result that one thread makes a second, reading included."""
    task = next(task for task in plan.tasks if isinstance(task, ExpertTask))
    files = SourceFiles()
    begin = time.perf_counter()
    try:
        records, _ = task.make(files)
    finally:
        files.close()
    return records.size / max(time.perf_counter() - begin, 1e-6)


def _write_rate(workspace: Workspace) -> float:
    """Bytes that the destination's disk takes a second; the probe is removed."""
    path = workspace.folder / "probe"
    begin = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(_PROBE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
            full_sync(file.fileno())
        return _PROBE_BYTES / max(time.perf_counter() - begin, 1e-6)
    finally:
        path.unlink(missing_ok=True)
