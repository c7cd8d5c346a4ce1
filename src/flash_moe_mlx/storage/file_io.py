"""A read-only file: opened once, read at offsets, mapped on demand, optionally bypassing the page cache.

Functions here block; `store.py` runs them on its I/O threads.
"""

import errno
import io
import mmap
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from .. import system
from ..errors import StoreError

DIRECT_ALIGNMENT = system.BLOCK_BYTES

_SAME_TIME_NS = 2_000_000_000
"""Difference of two modification times that may be rounding: FAT keeps them to two seconds."""


class ReadOnlyFile:
    """A read-only file, opened once and memory-mapped on demand."""

    def __init__(self, path: Path, *, direct: bool):
        self.path = path
        flags = os.O_RDONLY | os.O_CLOEXEC
        open_file = system.open_direct if direct else os.open
        try:
            # This object closes the descriptor even if its owner is dropped without close().
            self._file = io.FileIO(path, opener=lambda name, _: open_file(name, flags))
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                raise StoreError(
                    f'[store] io="direct" must be possible on the file system of {path}, got a refusal. Use io="pread".'
                ) from error
            raise StoreError(f"[store] {path} must be readable, got {error}. Check the file.") from error
        self.fd = self._file.fileno()
        self._opened = os.fstat(self.fd)
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def check_unchanged(self, modified_ns: int | None = None) -> None:
        """Check that nobody has written to the file. A file that is shorter now is left to the read to report.

        Args:
            modified_ns: Time of the last modification that must not have changed; None is that at the opening.

        Raises:
            StoreError: If it has changed.
        """
        now = os.fstat(self.fd)
        since = self._opened.st_mtime_ns if modified_ns is None else modified_ns
        if now.st_size >= self._opened.st_size and abs(now.st_mtime_ns - since) > _SAME_TIME_NS:
            changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now.st_mtime))
            raise StoreError(
                f"[ExpertStore] {self.path.name} must stay as it was when its header was read, got one modified at "
                f"{changed}. Load the model again."
            )

    def map(self) -> memoryview:
        """Return a read-only map of the whole file. Pages are read when they are accessed."""
        with self._lock:
            if self._view is None:
                try:
                    self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:  # ValueError: the file is empty
                    raise StoreError(f'[store] {self.path} must be mappable, got {error}. Use io="pread".') from error
                self._view = memoryview(self._map)
            return self._view

    def read_ahead(self, offset: int, nbytes: int) -> None:
        """Ask the system to prefetch the pages of a range, without waiting for them."""
        view = self.map()
        begin = offset - offset % mmap.PAGESIZE
        if self._map is not None and offset + nbytes <= len(view):
            self._map.madvise(mmap.MADV_WILLNEED, begin, offset + nbytes - begin)

    def copy(self, target: memoryview, offset: int) -> int:
        """Copy from the map. Returns the bytes that the file still has; copies nothing if they are too few."""
        # Accessing a file that shrank after it was mapped kills the process (SIGBUS), so check its size right before.
        view = self.map()
        available = max(0, min(self.size(), len(view)) - offset)
        if available < len(target):
            return available
        # numpy's copy releases the GIL; a memoryview assignment doesn't.
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(view[offset : offset + len(target)], np.uint8))
        return len(target)

    def close(self) -> None:
        with self._lock:
            self._file.close()
            if self._view is not None and self._map is not None:
                with suppress(BufferError):  # views still exist: the last one unmaps
                    self._view.release()
                    self._map.close()
                self._view = self._map = None


def read_fully(fd: int, target: memoryview, offset: int) -> int:
    """Read at an offset until ``target`` is full or the file ends. Returns the number of bytes read."""
    done = 0
    while done < len(target):
        try:
            got = system.preadv(fd, [target[done:]], offset + done)
        except InterruptedError:
            continue
        if got == 0:
            break
        done += got
    return done


def read_from_disk(path: Path, target: memoryview, offset: int) -> int:
    """Read a named file like `read_fully`, after asking the system to drop the range from the page cache."""
    with path.open("rb", buffering=0) as file:
        system.avoid_page_cache(file.fileno())
        system.drop_pages(file.fileno(), offset, len(target))
        return read_fully(file.fileno(), target, offset)


def read_aligned(fd: int, buffer: mmap.mmap, target: memoryview, offset: int) -> int:
    """Read like `read_fully`, but through ``buffer`` and only at aligned offsets, lengths and addresses."""
    skip = offset % DIRECT_ALIGNMENT
    wanted = skip + len(target)  # from the aligned position at or before offset
    length = -(-wanted // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
    done = 0
    with memoryview(buffer) as view:
        while done < wanted:
            # A direct read normally ends inside a block only at end of file. If a read stops mid-block anyway, re-read
            # that block; no progress means end of file.
            begin = done - done % DIRECT_ALIGNMENT
            try:
                with view[begin:length] as rest:
                    got = system.preadv(fd, [rest], offset - skip + begin)
            except InterruptedError:
                continue
            if begin + got <= done:
                break
            done = begin + got
        available = max(0, min(done, wanted) - skip)
        if available:
            np.copyto(np.frombuffer(target[:available], np.uint8), np.frombuffer(buffer, np.uint8, available, skip))
    return available
