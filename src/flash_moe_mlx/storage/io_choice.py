"""How experts are read where ``io="auto"``: through the page cache or past it, and by how many threads."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError, StoreError
from ..machine import PROCESS_OVERHEAD_BYTES
from ..stats import format_bytes
from .disk_probe import probe_disk
from .file_io import ReadOnlyFile

logger = logging.getLogger(__name__)

DEPTHS = (2, 4, 8, 16)
"""Numbers of threads that are tried."""

DEFAULT_THREADS = 8

_PROBE_SECONDS = 0.08  # each depth: some hundred records, where a disk gives 2 GB/s
_PROBE_FROM_BYTES = 1 << 30  # smaller checkpoints are read sooner than their disk is probed
_GOOD_ENOUGH = 0.95  # of the best rate: more threads take more buffers


@dataclass(frozen=True)
class IoChoice:
    """What was chosen.

    Attributes:
        io: "pread" or "direct".
        reason: Why, in a few words.
    """

    io: str
    reason: str


def choose_io(
    paths: Sequence[Path], expert_bytes: int, slot_bytes: int, limit_bytes: int, usable_bytes: int
) -> IoChoice:
    """One owner for each byte: the page cache where it has room for the experts, else the slots alone.

    Args:
        paths: Files that hold experts.
        expert_bytes: Of all experts.
        slot_bytes: Of the expert slots.
        limit_bytes: The memory limit.
        usable_bytes: What this machine, or the process's control group, has.
    """
    spare = max(usable_bytes - limit_bytes - PROCESS_OVERHEAD_BYTES, 0)
    if slot_bytes >= expert_bytes:
        return IoChoice("pread", "all experts fit in the slots")
    if spare >= expert_bytes:
        return IoChoice("pread", f"the page cache has room for all experts: {format_bytes(spare)} beside the limit")
    if not all(_direct_reads(path) for path in paths):
        return IoChoice("pread", "the file system has no direct reads")
    return IoChoice(
        "direct", f"{format_bytes(expert_bytes)} of experts, {format_bytes(spare)} for the page cache beside the limit"
    )


def _direct_reads(path: Path) -> bool:
    try:
        ReadOnlyFile(path, direct=True).close()
    except StoreError:
        return False
    return True


def choose_threads(paths: Sequence[Path], record_bytes: int, expert_bytes: int, remembered: Path | None = None) -> int:
    """Threads that read records past the page cache fastest, by a short probe of these files.

    It is remembered by device and size of a record.

    Args:
        paths: Files that hold experts.
        record_bytes: Of one expert.
        expert_bytes: Of all experts.
        remembered: Where; None is in the user's cache folder.
    """
    if expert_bytes < _PROBE_FROM_BYTES:
        return DEFAULT_THREADS
    remembered = remembered or cache_folder() / "disks.json"
    key = f"{paths[0].stat().st_dev}:{record_bytes}"
    known = _read(remembered)
    if (threads := known.get(key)) in DEPTHS:
        return threads
    try:
        rates = {
            depth: probe_disk(paths, record_bytes, seconds=_PROBE_SECONDS, num_threads=depth).bytes_per_second
            for depth in DEPTHS
        }
    except (RequestError, StoreError) as error:
        logger.info("the disk could not be probed: %s", error)
        return DEFAULT_THREADS
    best = max(rates.values())
    threads = next(depth for depth in DEPTHS if rates[depth] >= _GOOD_ENOUGH * best)
    logger.info("reads by %d threads: %.2f GB/s", threads, rates[threads] / 1e9)
    _write(remembered, {**known, key: threads})
    return threads


def cache_folder() -> Path:
    """This library's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash_moe_mlx"


def _read(path: Path) -> dict[str, int]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or cut short
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except OSError as error:  # a home that can't be written: it is probed again next time
        logger.info("the probe's result could not be kept: %s", error)
