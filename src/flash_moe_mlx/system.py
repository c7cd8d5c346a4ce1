"""Calls that macOS and Linux name or do differently: the only module that asks which of the two it runs on.

Everything here is small enough to be run with stand-ins: tests take the macOS branches on Linux.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

BLOCK_BYTES = 4096
"""Offsets, lengths and addresses of direct reads are multiples of this: disks with 512-byte blocks take it too."""

OPEN_FILES = 4096
"""Descriptors that a process may need: a large checkpoint has some hundred shards, and each is open twice."""

MAX_MB_PER_BUFFER = "1000"
"""What MLX_MAX_MB_PER_BUFFER is set to: a decoded layer of a 397B model has some 300 Mi elements of inputs."""

MMAP_THRESHOLD_BYTES = 8 << 20
"""Allocations from this size on have pages of their own, which go back to the system when they are freed.

With 1 MiB a prompt took ten times the page faults and 10 % longer (experiments/LOG.md).
"""

TRIM_THRESHOLD_BYTES = 16 << 20
"""Free bytes at the end of the heap that are kept for the next allocation."""

ARENAS = 2
"""Heaps that threads share: the main thread's, and one for all that begin after ``load``."""

TRIM_SECONDS = 5.0
"""Time between two searches of the heap for free pages; one takes about 0.6 ms for 140 MB."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_next_trim = 0.0
_MS_INVALIDATE = 2  # both systems' value
_QOS_USER_INITIATED = 0x19  # sys/qos.h: work that somebody waits for


def is_macos() -> bool:
    """Tell whether this is macOS."""
    return sys.platform == "darwin"


def macos_version() -> tuple[int, ...]:
    """Return macOS's version, such as (15, 1); empty elsewhere."""
    import platform

    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit()) if is_macos() else ()


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
    )  # fmt: skip
    library.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library


# --- memory ---


@cache
def return_freed_buffers() -> bool:
    """Bound the freed memory that this process's heap keeps. Called by ``load``; later calls do nothing.

    MLX takes a CPU's arrays from malloc. glibc raises its threshold for separate pages to the largest buffer that was
    freed, up to 32 MB, and from then on keeps such buffers in its arenas, up to eight for each core: generations on
    new threads held 2.7 times the memory limit. Setting the threshold keeps it fixed; fewer arenas keep less of what
    is smaller. Both hold for the whole process, so that threads share two locks where they allocate much at once.

    Returns:
        Whether the C library is glibc; others are left as they are.
    """
    if not hasattr(_libc(), "gnu_get_libc_version"):
        return False
    _libc().mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    _libc().mallopt(_M_ARENA_MAX, ARENAS)
    return bool(_libc().mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))


def trim_heap() -> None:
    """Give free pages between allocations back too, where the heap is bounded. Called before a prompt's chunk.

    Small buffers of many sizes leave holes, and their number grows for hours. Does nothing within `TRIM_SECONDS` of the
    last time.
    """
    global _next_trim
    if time.monotonic() < _next_trim:
        return
    _next_trim = time.monotonic() + TRIM_SECONDS
    if return_freed_buffers():
        _libc().malloc_trim(TRIM_THRESHOLD_BYTES // 8)


def installed_memory_bytes() -> int:
    """Return the memory of this machine in bytes.

    Pythons built with an old macOS SDK don't know the name of the figure; MLX does there.
    """
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except ValueError:
        import mlx.core as mx

        return int(mx.device_info()["memory_size"])


def lift_command_buffer_size() -> None:
    """Have MLX end a GPU's command buffers by their number of operations, and not at each layer's expert slots.

    MLX ends one once its inputs exceed 40 to 50 Mi elements, and counts a layer's slots whole although a kernel reads K
    records of them: four to five command buffers per layer on Metal, and as many CUDA graphs. A prompt's large
    intermediate arrays still end theirs. MLX reads the variable once, when it first uses the GPU; one that the user has
    set stays.
    """
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", MAX_MB_PER_BUFFER)


# --- files ---


def open_direct(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file whose reads and writes go past the page cache: O_DIRECT, or F_NOCACHE on macOS.

    F_NOCACHE still copies pages that are in memory: see `drop_pages`.

    Raises:
        OSError: As ``os.open``; with EINVAL where the file system has no direct reads.
    """
    opened = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    try:
        avoid_page_cache(opened)
    except OSError:
        os.close(opened)
        raise
    return opened


def avoid_page_cache(fd: int) -> None:
    """Let what is read or written from now on leave no pages in memory, where an open file can be told so (macOS)."""
    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def direct_write_alignment() -> int:
    """Return what offset, length and address of a direct write are multiples of."""
    # XNU's cluster_write takes the direct path where the offset is at a page's beginning: 16 KiB on Apple silicon.
    return mmap.PAGESIZE if is_macos() else BLOCK_BYTES


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Read at a position into one buffer after the other. Returns bytes read, which may be fewer than asked for."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    data = os.pread(fd, len(buffers[0]), offset)  # Pythons built for a macOS older than 11
    buffers[0][: len(data)] = data
    return len(data)


def can_drop_pages() -> bool:
    """Tell whether `drop_pages` does anything here."""
    return hasattr(os, "posix_fadvise") or is_macos()


def drop_pages(fd: int, offset: int = 0, nbytes: int | None = None) -> bool:
    """Ask the system to forget what it has of a file's range in memory, so that the next read is the disk's.

    Pages that were written and have not reached the disk stay: `full_sync` first.

    Args:
        fd: An open file.
        offset: First byte of the range.
        nbytes: Bytes of the range; None is all that follow.

    Returns:
        Whether the system took the request.
    """
    size = os.fstat(fd).st_size
    end = size if nbytes is None else min(offset + nbytes, size)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, max(end - offset, 0), os.POSIX_FADV_DONTNEED)
        return True
    if not is_macos() or end <= offset:
        return False
    # Not the mmap module: CPython begins a map with F_FULLFSYNC on macOS, milliseconds each.
    begin = offset - offset % mmap.PAGESIZE
    libc = _libc()
    address = libc.mmap(None, end - begin, mmap.PROT_READ, mmap.MAP_SHARED, fd, begin)
    if address in (None, ctypes.c_void_p(-1).value):
        return False
    try:
        return bool(libc.msync(address, end - begin, _MS_INVALIDATE) == 0)
    finally:
        libc.munmap(address, end - begin)


def full_sync(fd: int) -> None:
    """Wait until a file's bytes have reached the disk, and not only its cache where the system tells them apart."""
    command = getattr(fcntl, "F_FULLFSYNC", None)  # macOS
    if command is None:
        os.fsync(fd)
        return
    try:
        fcntl.fcntl(fd, command)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            raise
        os.fsync(fd)  # SMB, NFS and some exFAT disks have nothing stronger


def raise_file_limit(wanted: int = OPEN_FILES) -> int:
    """Let this process open more files at once, as far as the system allows; macOS's shells start with 256.

    Returns:
        The limit now.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(OSError, ValueError):  # macOS bounds it a second time, by kern.maxfilesperproc
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
    return soft


# --- threads and processes ---


def expect_waiters() -> None:
    """Tell the scheduler that somebody waits for this thread: on macOS it gets performance cores and unthrottled I/O.

    A process that was put in the background as a whole (``taskpolicy -b``, launchd's Background) stays there.
    """
    if is_macos():
        _libc().pthread_set_qos_class_self_np(_QOS_USER_INITIATED, 0)


def kill_group(leader: int) -> None:
    """End a process group by its leader's number. One that has ended already is none to end."""
    # macOS answers EPERM and not ESRCH for a group of which only zombies are left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
