"""Chooses how ``io="auto"`` reads experts: through the page cache or directly, and with how many threads."""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import system
from ..errors import CheckpointError, RequestError, StoreError
from ..formats.safetensors_header import load_json, read_bytes
from ..machine import PROCESS_OVERHEAD_BYTES, cache_folder
from ..progress import report
from ..stats import format_bytes
from .disk_probe import probe_disk
from .file_io import ReadOnlyFile
from .store import direct_buffer_bytes

logger = logging.getLogger(__name__)

DEPTHS = (2, 4, 8, 16)
"""Numbers of threads to try."""

APPLE_DEPTHS = (*DEPTHS, 32)
"""Numbers of threads to try on macOS: the SSD controllers in Apple's chips handle more concurrent requests."""

REMEMBERED_DAYS = 30
"""How long a disk's best number of threads is remembered: disks fill up, and systems change."""

DEFAULT_THREADS = 8

_PROBE_SECONDS = 0.08  # per thread count: a few hundred records at 2 GB/s
_PROBE_FROM_BYTES = 1 << 30  # reading a smaller checkpoint is quicker than probing its disk
_GOOD_ENOUGH = 0.95  # share of the best rate that suffices: more threads need more buffers


@dataclass(frozen=True)
class Reads:
    """The chosen way of reading experts.

    Attributes:
        io: "mmap", "pread" or "direct".
        reason: The reason for the choice, in a few words.
        num_threads: I/O threads.
    """

    io: str
    reason: str
    num_threads: int = DEFAULT_THREADS

    @property
    def buffer_bytes(self) -> int:
        """Memory that these reads need besides the slots."""
        return direct_buffer_bytes(self.num_threads) if self.io == "direct" else 0

    def with_threads(self, num_threads: int) -> "Reads":
        """Return the same choice with another number of threads."""
        return replace(self, num_threads=num_threads)


def choose_io(paths: Sequence[Path], expert_bytes: int, slot_bytes: int, limit_bytes: int, usable_bytes: int) -> Reads:
    """Cache each byte only once: in the page cache if all experts fit there, otherwise only in the slots.

    Args:
        paths: Files that hold experts.
        expert_bytes: Total size of all experts.
        slot_bytes: Total size of the expert slots.
        limit_bytes: Memory limit.
        usable_bytes: Memory of this machine or of the process's control group.
    """
    spare = max(usable_bytes - limit_bytes - PROCESS_OVERHEAD_BYTES, 0)
    if slot_bytes >= expert_bytes:
        return Reads("pread", "all experts fit in the slots")
    if spare >= expert_bytes:
        return Reads("pread", f"the page cache has room for all experts: {format_bytes(spare)} besides the limit")
    if not all(_direct_reads(path) for path in paths):
        return Reads("pread", "the file system has no direct reads")
    return Reads(
        "direct", f"{format_bytes(expert_bytes)} of experts, {format_bytes(spare)} for the page cache besides the limit"
    )


def _direct_reads(path: Path) -> bool:
    try:
        ReadOnlyFile(path, direct=True).close()
    except StoreError:
        return False
    return True


def choose_threads(paths: Sequence[Path], record_bytes: int, expert_bytes: int, remembered: Path | None = None) -> int:
    """Return the number of threads with the fastest direct reads, by a short probe of these files.

    The result is remembered for a month, by device and record size.

    Args:
        paths: Files that hold experts.
        record_bytes: Size of one expert's record.
        expert_bytes: Total size of all experts.
        remembered: File that stores results; None for the default in the user's cache folder.
    """
    if expert_bytes < _PROBE_FROM_BYTES:
        return DEFAULT_THREADS
    remembered = remembered or cache_folder() / "disks.json"
    key = f"{paths[0].stat().st_dev}:{record_bytes}"
    known = _read(remembered)
    depths = APPLE_DEPTHS if system.is_macos() else DEPTHS
    if (threads := _remembered_threads(known.get(key))) in depths:
        return threads
    try:
        report("probing the disk, once per disk")
        probes = [probe_disk(paths, record_bytes, seconds=_PROBE_SECONDS, num_threads=depth) for depth in depths]
    except (RequestError, StoreError) as error:
        logger.info("the disk could not be probed: %s", error)
        return DEFAULT_THREADS
    if not all(probe.is_plausible for probe in probes):
        logger.info("the disk could not be probed: its files came from memory")
        return DEFAULT_THREADS
    best = max(probe.bytes_per_second for probe in probes)
    chosen = next(probe for probe in probes if probe.bytes_per_second >= _GOOD_ENOUGH * best)
    logger.info("reads by %d threads: %.2f GB/s", chosen.num_threads, chosen.bytes_per_second / 1e9)
    _write(remembered, {**known, key: {"threads": chosen.num_threads, "probed": int(time.time())}})
    return chosen.num_threads


def _remembered_threads(entry: object) -> int:
    """Return the threads of an entry that is recent enough, else 0. Old entries are a number without a date."""
    if not (isinstance(entry, dict) and isinstance(entry.get("probed"), int)):
        return 0
    age = time.time() - entry["probed"]
    threads = entry.get("threads")
    return threads if isinstance(threads, int) and 0 <= age < REMEMBERED_DAYS * 86400 else 0


def _read(path: Path) -> dict[str, Any]:
    try:
        value = load_json(read_bytes(path, "Remove it."), path.name, "Remove it.")
    except CheckpointError:  # missing, truncated, or not a regular file
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except OSError as error:  # the home directory isn't writable: probe again next time
        logger.info("the probe's result could not be kept: %s", error)
