"""Measures how fast a disk reads records at random offsets, bypassing the page cache where the system allows it."""

import mmap
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from .. import system
from ..errors import RequestError, StoreError
from .file_io import DIRECT_ALIGNMENT, ReadOnlyFile, read_aligned, read_fully

FASTEST_DISK = 20e9
"""Bytes per second above which a rate is attributed to the page cache, where that can't be reliably bypassed."""


@dataclass(frozen=True)
class DiskProbe:
    """Result of a disk probe.

    Attributes:
        record_bytes: Size of each read in bytes.
        num_reads: Number of reads by all threads.
        seconds: Duration of the probe.
        num_threads: Number of reading threads.
        direct: Whether the page cache was bypassed; if not, the rate may be that of memory.
    """

    record_bytes: int
    num_reads: int
    seconds: float
    num_threads: int
    direct: bool

    @property
    def bytes_per_second(self) -> float:
        """Read rate in bytes per second."""
        return self.num_reads * self.record_bytes / self.seconds

    @property
    def is_plausible(self) -> bool:
        """Whether the rate is plausible for a disk.

        macOS's F_NOCACHE returns pages that are already in memory; without direct reads, every system does.
        """
        bypassed = self.direct and not system.is_macos()
        return bypassed or self.bytes_per_second <= FASTEST_DISK


def probe_disk(paths: Sequence[Path], record_bytes: int, *, seconds: float = 1.0, num_threads: int = 8) -> DiskProbe:
    """Read records at random offsets of files for a while and measure the rate.

    Raises:
        RequestError: If every file is smaller than a record.
        StoreError: If a file can't be read.
    """
    large = [path for path in paths if path.stat().st_size >= record_bytes]
    if not large:
        raise RequestError(f"[disk probe] a file must have {record_bytes} bytes, got none that large. Name another.")
    try:
        return _probe(large, record_bytes, seconds, num_threads, direct=True)
    except StoreError:  # the file system lacks direct reads: tmpfs, some network shares
        return _probe(large, record_bytes, seconds, num_threads, direct=False)


def _probe(paths: Sequence[Path], record_bytes: int, seconds: float, num_threads: int, direct: bool) -> DiskProbe:
    files = [ReadOnlyFile(path, direct=direct) for path in paths]
    started = time.perf_counter()

    def read() -> int:
        place = random.Random()
        reads = 0
        with closing(mmap.mmap(-1, record_bytes + 2 * DIRECT_ALIGNMENT)) as buffer:  # page-aligned
            target = bytearray(record_bytes)
            while time.perf_counter() - started < seconds:
                file = place.choice(files)
                offset = place.randrange(0, file.size() - record_bytes + 1, DIRECT_ALIGNMENT)
                with memoryview(target) as view:
                    if direct:
                        read_aligned(file.fd, buffer, view, offset)
                    else:
                        read_fully(file.fd, view, offset)
                reads += 1
        return reads

    try:
        if not direct or system.is_macos():
            for file in files:
                system.drop_pages(file.fd)
        with ThreadPoolExecutor(num_threads) as pool:
            tasks = [pool.submit(read) for _ in range(num_threads)]
        num_reads = sum(task.result() for task in tasks)
        return DiskProbe(record_bytes, num_reads, time.perf_counter() - started, num_threads, direct)
    except OSError as error:
        raise StoreError(f"[disk probe] the files must be readable, got {error}. Check them.") from error
    finally:
        for file in files:
            file.close()
