"""System calls that differ between macOS and Linux: the only module that checks which of the two it runs on.

Each function is small enough to test with stand-ins: tests run the macOS branches on Linux.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4096
"""Alignment of offsets, lengths and addresses of direct reads; also valid for disks with 512-byte blocks."""

OPEN_FILES = 4096
"""File descriptors that a process may need: a large checkpoint has a few hundred shards, each opened twice."""

MMAP_THRESHOLD_BYTES = 8 << 20
"""Allocations from this size on have pages of their own, which go back to the system when they are freed.

With 1 MiB a prompt took ten times the page faults and 10 % longer (experiments/LOG.md).
"""

TRIM_THRESHOLD_BYTES = 16 << 20
"""Free bytes kept at the end of the heap for the next allocation."""

ARENAS = 2
"""Number of heaps that threads share: the main thread's, and one for all threads started after ``load``."""

TRIM_SECONDS = 5.0
"""Minimum time between two trims of the heap; one takes about 0.6 ms for 140 MB."""

PROCESS_STATUS = Path("/proc/self/stat")
"""Linux's description of this process."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_next_trim = 0.0
_MS_INVALIDATE = 2  # the same value on both systems
_PF_FORKNOEXEC = 0x40  # linux/sched.h
_QOS_USER_INITIATED = 0x19  # sys/qos.h: work that a user is waiting for


def is_macos() -> bool:
    """Return whether this is macOS."""
    return sys.platform == "darwin"


def macos_version() -> tuple[int, ...]:
    """Return the macOS version, such as (15, 1); empty on other systems."""
    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit()) if is_macos() else ()


def describe_system() -> str:
    """Return the system's name and version and the machine's kind, such as "macOS 15.1 arm64"."""
    version = ".".join(map(str, macos_version()))
    return f"{f'macOS {version}' if version else f'{platform.system()} {platform.release()}'} {platform.machine()}"


def is_intel_python() -> bool:
    """Return whether this Python is one for Intel Macs, perhaps under Rosetta; MLX has no wheels for it."""
    return is_macos() and platform.machine() != "arm64"


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
    """Limit how much freed memory this process's heap keeps. Called by ``load``; later calls do nothing.

    MLX takes a CPU's arrays from malloc. glibc raises its threshold for separate pages to the largest buffer that was
    freed, up to 32 MB, and from then on keeps such buffers in its arenas, up to eight for each core: generations on
    new threads held 2.7 times the memory limit. Setting the threshold keeps it fixed; fewer arenas keep less of what
    is smaller. Both hold for the whole process, so that threads share two locks where they allocate much at once.

    Returns:
        Whether the C library is glibc; with others nothing is changed.
    """
    if not hasattr(_libc(), "gnu_get_libc_version"):
        return False
    _libc().mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    _libc().mallopt(_M_ARENA_MAX, ARENAS)
    return bool(_libc().mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))


def trim_heap() -> None:
    """Return free pages between allocations to the system, if the heap is limited. Called before each prompt chunk.

    Small buffers of many sizes leave holes, whose number grows for hours. Does nothing within `TRIM_SECONDS` of the
    previous trim.
    """
    global _next_trim
    if time.monotonic() < _next_trim:
        return
    _next_trim = time.monotonic() + TRIM_SECONDS
    if return_freed_buffers():
        _libc().malloc_trim(TRIM_THRESHOLD_BYTES // 8)


def installed_memory_bytes() -> int:
    """Return the memory of this machine in bytes.

    Python builds with an old macOS SDK lack this sysconf name; MLX reports the size there.
    """
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except ValueError:
        import mlx.core as mx

        return int(mx.device_info()["memory_size"])


def recommended_working_set_bytes() -> int | None:
    """Return the memory that Metal recommends as the maximum for this GPU, or None on other backends."""
    import mlx.core as mx

    nbytes = mx.device_info().get("max_recommended_working_set_size")
    return int(nbytes) if nbytes else None


def peak_resident_bytes() -> int:
    """Return the largest amount of memory that this process has had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if is_macos() else peak * 1024  # Linux counts kibibytes


# --- files ---


def open_direct(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file for reads and writes that bypass the page cache: O_DIRECT, or F_NOCACHE on macOS.

    F_NOCACHE still copies pages that are in memory: see `drop_pages`.

    Raises:
        OSError: From ``os.open``; with EINVAL if the file system doesn't support direct I/O.
    """
    opened = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    try:
        avoid_page_cache(opened)
    except OSError:
        os.close(opened)
        raise
    return opened


def avoid_page_cache(fd: int) -> None:
    """Keep later reads and writes of an open file out of the page cache, where the system supports it (macOS)."""
    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def direct_write_alignment() -> int:
    """Return the alignment of offset, length and address that direct writes need."""
    # XNU's cluster_write takes the direct path only if the offset is page-aligned: 16 KiB on Apple silicon.
    return mmap.PAGESIZE if is_macos() else BLOCK_BYTES


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Read at a position into one buffer after another. Returns the bytes read, which may be fewer than asked."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    data = os.pread(fd, len(buffers[0]), offset)  # Python builds for macOS before 11
    buffers[0][: len(data)] = data
    return len(data)


def can_drop_pages() -> bool:
    """Return whether `drop_pages` works on this system."""
    return hasattr(os, "posix_fadvise") or is_macos()


def drop_pages(fd: int, offset: int = 0, nbytes: int | None = None) -> bool:
    """Ask the system to drop a file range from the page cache, so that the next read comes from the disk.

    Dirty pages stay; call `full_sync` first.

    Args:
        fd: An open file.
        offset: First byte of the range.
        nbytes: Length of the range; None for the rest of the file.

    Returns:
        Whether the system accepted the request.
    """
    size = os.fstat(fd).st_size
    end = size if nbytes is None else min(offset + nbytes, size)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, max(end - offset, 0), os.POSIX_FADV_DONTNEED)
        return True
    if not is_macos() or end <= offset:
        return False
    # Not the mmap module: on macOS, CPython issues F_FULLFSYNC for each new map, which takes milliseconds.
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
    """Wait until a file's bytes have reached the disk, not just its cache if the system distinguishes them."""
    command = getattr(fcntl, "F_FULLFSYNC", None)  # macOS
    if command is None:
        os.fsync(fd)
        return
    try:
        fcntl.fcntl(fd, command)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            raise
        os.fsync(fd)  # SMB, NFS and some exFAT disks offer nothing stronger


def raise_file_limit(wanted: int = OPEN_FILES) -> int:
    """Raise this process's limit of open files as far as the system allows; macOS shells start with 256.

    Returns:
        The new limit.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(OSError, ValueError):  # macOS has a second limit, kern.maxfilesperproc
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
    return soft


# --- threads and processes ---


def expect_waiters() -> None:
    """Tell the scheduler that a user is waiting for this thread; on macOS it gets performance cores and full I/O speed.

    A process that runs in the background as a whole (``taskpolicy -b``, launchd's Background) stays there.
    """
    if is_macos():
        _libc().pthread_set_qos_class_self_np(_QOS_USER_INITIATED, 0)


def usable_cores() -> int:
    """Return the number of cores that this process may use; macOS binds no process to cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def was_forked() -> bool:
    """Return whether Linux reports this process as a fork that hasn't exec'd since; other systems don't say."""
    try:
        fields = PROCESS_STATUS.read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _PF_FORKNOEXEC)


def kill_group(leader: int) -> None:
    """Kill a process group by its leader's pid. Does nothing if the group has already ended."""
    # macOS returns EPERM instead of ESRCH for a group that has only zombies left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
