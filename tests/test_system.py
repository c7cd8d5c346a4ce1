"""macOS's branches, tested on any system: stand-ins record how its calls were made."""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from flash_moe_mlx import machine, system
from flash_moe_mlx.config import StreamingConfig
from flash_moe_mlx.machine import physical_memory_bytes
from flash_moe_mlx.packing.workspace import Workspace
from flash_moe_mlx.runtime import loading
from flash_moe_mlx.storage import io_choice
from flash_moe_mlx.storage.disk_probe import FASTEST_DISK, DiskProbe, probe_disk
from flash_moe_mlx.storage.file_io import ReadOnlyFile, read_from_disk, read_fully

F_NOCACHE, F_FULLFSYNC = 48, 51  # macOS's numbers
PAGE = 16384  # Apple silicon's


class Fcntl:
    """macOS's fcntl module. Commands that the system refuses raise ``refusal``."""

    F_NOCACHE, F_FULLFSYNC = F_NOCACHE, F_FULLFSYNC
    LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.refusal: OSError | None = None

    def fcntl(self, fd: int, command: int, argument: int = 0) -> int:
        os.fstat(fd)  # it must be open
        self.calls.append(command)
        if self.refusal is not None and command == F_FULLFSYNC:
            raise self.refusal
        return 0


class Libc:
    """macOS's library: maps are this system's own, and `msync` notes what it was asked to forget."""

    def __init__(self) -> None:
        self.real = system._libc()
        self.dropped: list[int] = []
        self.qos: list[tuple[int, int]] = []
        self.maps = 0
        self.refuses = False

    def mmap(self, address: Any, nbytes: int, *how: int) -> int:
        *_, offset = how
        assert offset % mmap.PAGESIZE == 0
        self.maps += 1
        return self.real.mmap(address, nbytes, *how)

    def msync(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 2 and address % mmap.PAGESIZE == 0
        self.dropped.append(nbytes)
        return -1 if self.refuses else self.real.msync(address, nbytes, flags)

    def munmap(self, address: int, nbytes: int) -> int:
        self.maps -= 1
        return self.real.munmap(address, nbytes)

    def pthread_set_qos_class_self_np(self, qos: int, priority: int) -> int:
        self.qos.append((qos, priority))
        return 0


class Mac:
    """The stand-ins."""

    def __init__(self) -> None:
        self.fcntl, self.libc = Fcntl(), Libc()


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    """A Mac, as far as the library can tell."""
    stand_ins = Mac()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(system, "fcntl", stand_ins.fcntl)
    monkeypatch.setattr(system, "_libc", lambda: stand_ins.libc)
    for name in ("posix_fadvise", "O_DIRECT"):
        monkeypatch.delattr(os, name, raising=False)
    return stand_ins


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(5 * PAGE + 123))
    return path


def test_direct_files_set_nocache(mac: Mac, path: Path):
    for direct, calls in ((False, []), (True, [F_NOCACHE])):
        ReadOnlyFile(path, direct=direct).close()
        assert mac.fcntl.calls == calls


def test_a_file_that_refuses_is_closed(mac: Mac, path: Path, monkeypatch: pytest.MonkeyPatch):
    before = len(os.listdir("/dev/fd"))

    def refuse(fd: int, command: int, argument: int) -> int:
        raise OSError(errno.ENOTTY, "refused")

    monkeypatch.setattr(mac.fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="refused"):
        system.open_direct(path, os.O_RDONLY)
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(
    ("offset", "nbytes", "dropped"),
    [(0, None, 5 * PAGE + 123), (PAGE, PAGE, PAGE), (100, 50, 150), (5 * PAGE, 10 * PAGE, 123), (6 * PAGE, 10, None)],
)
def test_pages_are_dropped_by_msync(mac: Mac, path: Path, offset: int, nbytes: int | None, dropped: int | None):
    """Maps begin at a page; their lengths end with the range or the file."""
    with path.open("rb") as file:
        assert system.drop_pages(file.fileno(), offset, nbytes) == (dropped is not None)
    assert mac.libc.maps == 0
    assert mac.libc.dropped == ([] if dropped is None else [dropped])


def test_a_refusal_to_drop_pages_is_told(mac: Mac, path: Path):
    mac.libc.refuses = True
    with path.open("rb") as file:
        assert not system.drop_pages(file.fileno())
    assert mac.libc.maps == 0
    mac.libc.mmap = lambda *_: ctypes.c_void_p(-1).value  # MAP_FAILED
    with path.open("rb") as file:
        assert not system.drop_pages(file.fileno())


def test_second_reads_are_the_disks(mac: Mac, path: Path):
    target = memoryview(bytearray(1000))
    assert read_from_disk(path, target, 2 * PAGE) == 1000
    assert target == path.read_bytes()[2 * PAGE : 2 * PAGE + 1000]
    assert mac.fcntl.calls == [F_NOCACHE]
    assert mac.libc.dropped == [1000]


def test_probes_read_what_was_dropped(mac: Mac, path: Path):
    assert system.can_drop_pages()
    probe_disk([path], PAGE, seconds=0.0, num_threads=1)
    assert mac.libc.dropped == [5 * PAGE + 123]
    assert mac.libc.maps == 0


def test_other_systems_are_asked_by_fadvise(path: Path):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("needs posix_fadvise")
    with path.open("rb") as file:
        assert system.drop_pages(file.fileno())
    assert system.can_drop_pages()


def test_full_sync_is_stronger_than_fsync(mac: Mac, path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with path.open("rb") as file:
        system.full_sync(file.fileno())
        assert mac.fcntl.calls == [F_FULLFSYNC] and synced == []
        mac.fcntl.refusal = OSError(errno.ENOTSUP, "an SMB share")
        system.full_sync(file.fileno())
        assert synced == [file.fileno()]
        mac.fcntl.refusal = OSError(errno.EIO, "a broken disk")
        with pytest.raises(OSError, match="broken"):
            system.full_sync(file.fileno())


def test_packing_writes_past_the_cache_where_a_page_allows(mac: Mac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mmap, "PAGESIZE", PAGE)
    workspace = Workspace(tmp_path / "out")
    workspace.claim(restart=False)
    workspace.create({"a": 4 * PAGE})
    data = bytearray(os.urandom(2 * PAGE))
    with mmap.mmap(-1, 4 * PAGE) as buffer:
        start = -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE
        buffer[start : start + 2 * PAGE] = data
        with memoryview(buffer) as view, view[start : start + 2 * PAGE] as aligned:
            workspace.write("a", aligned, 4096)  # a block's beginning and no page's
            assert F_NOCACHE not in mac.fcntl.calls
            workspace.write("a", aligned, PAGE)
            assert mac.fcntl.calls.count(F_NOCACHE) == 1
    assert workspace.path_of("a").read_bytes()[PAGE : 3 * PAGE] == data
    workspace.close()


def test_reads_without_preadv(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    target = memoryview(bytearray(3 * PAGE))
    with path.open("rb") as file:
        assert read_fully(file.fileno(), target, 77) == len(target)
    assert target == path.read_bytes()[77 : 77 + len(target)]


def test_memory_is_mlxs_figure_where_python_has_none(monkeypatch: pytest.MonkeyPatch):
    def sysconf(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 48 << 30})
    assert physical_memory_bytes() == 48 << 30


def test_the_default_limit_is_that_of_the_working_set(monkeypatch: pytest.MonkeyPatch):
    """What MLX says of a Mac's GPU reaches ``load``'s limit and its explanation."""
    monkeypatch.setattr(machine, "usable_memory_bytes", lambda: 48 << 30)
    for info, limit, reason in (
        ({}, 0.7 * (48 << 30), "70% of 51.54 GB"),
        ({"max_recommended_working_set_size": 38 * 10**9}, 0.9 * 38 * 10**9, "90% of the 38.00 GB that Metal"),
    ):
        monkeypatch.setattr(mx, "device_info", lambda: info)  # noqa: B023  called at once
        assert loading.choose_limits(StreamingConfig()) == (int(limit) - machine.PROCESS_OVERHEAD_BYTES, None)
        assert loading.limit_reason().startswith(reason)


def test_io_threads_say_that_somebody_waits(mac: Mac):
    system.expect_waiters()
    assert mac.libc.qos == [(0x19, 0)]


def test_cores_and_peak_memory_are_counted_as_macos_does(mac: Mac, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 14)
    assert system.usable_cores() == 14
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5_000_000))
    assert system.peak_resident_bytes() == 5_000_000
    monkeypatch.setattr(sys, "platform", "linux")
    assert system.peak_resident_bytes() == 5_000_000 * 1024


def test_forks_are_not_looked_for_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(system, "PROCESS_STATUS", tmp_path / "stat")
    assert not system.was_forked()
    for flags, forked in ((0x400040, True), (0x400000, False)):
        (tmp_path / "stat").write_text(f"7 (a name) R 1 7 7 0 -1 {flags} 5 5")
        assert system.was_forked() == forked


@pytest.mark.parametrize("answer", [ProcessLookupError, PermissionError])
def test_a_group_of_zombies_is_none_to_end(monkeypatch: pytest.MonkeyPatch, answer: type[OSError]):
    def killpg(leader: int, number: int) -> None:
        assert (leader, number) == (123, signal.SIGKILL)
        raise answer

    monkeypatch.setattr(os, "killpg", killpg)
    system.kill_group(123)


def test_the_file_limit_is_raised_and_never_lowered(monkeypatch: pytest.MonkeyPatch):
    limits = [256, resource.RLIM_INFINITY]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), list(new)))
    assert system.raise_file_limit(4096) == 4096
    assert limits == [4096, resource.RLIM_INFINITY]
    assert system.raise_file_limit(300) == 4096
    limits[:] = [256, 1024]
    assert system.raise_file_limit(4096) == 1024

    def refuse(_: int, new: tuple[int, int]) -> None:
        raise ValueError("kern.maxfilesperproc")

    limits[:] = [256, resource.RLIM_INFINITY]
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert system.raise_file_limit(4096) == 256


def test_versions(mac: Mac, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.mac_ver", lambda: ("14.7.1", ("", "", ""), "arm64"))
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert system.macos_version() == (14, 7, 1)
    assert system.describe_system() == "macOS 14.7.1 arm64"
    monkeypatch.setattr(sys, "platform", "linux")
    assert system.macos_version() == ()
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.release", lambda: "6.1")
    assert system.describe_system() == "Linux 6.1 arm64"


@pytest.mark.parametrize(
    ("platform", "machine", "is_intel"),
    [("darwin", "x86_64", True), ("darwin", "arm64", False), ("linux", "x86_64", False)],
)
def test_a_python_for_intel(platform: str, machine: str, is_intel: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert system.is_intel_python() == is_intel


def probe(rate: float, direct: bool = True) -> DiskProbe:
    return DiskProbe(1, int(rate), 1.0, 8, direct)


def test_rates_of_memory_are_none_of_a_disk(mac: Mac, monkeypatch: pytest.MonkeyPatch):
    assert probe(6e9).is_plausible
    assert not probe(FASTEST_DISK + 1).is_plausible
    monkeypatch.setattr(sys, "platform", "linux")
    assert probe(FASTEST_DISK + 1).is_plausible  # O_DIRECT: an array of disks
    assert not probe(FASTEST_DISK + 1, direct=False).is_plausible


class Disk:
    """Stands in for `probe_disk`. Rates by number of threads."""

    def __init__(self, rates: dict[int, float]):
        self.rates, self.asked = rates, []

    def __call__(self, paths: object, record_bytes: int, *, seconds: float, num_threads: int) -> DiskProbe:
        self.asked.append(num_threads)
        return DiskProbe(1, int(self.rates[num_threads]), 1.0, num_threads, True)


RATES = {2: 1e9, 4: 2e9, 8: 3e9, 16: 4e9, 32: 6e9}


def threads(path: Path, remembered: Path) -> int:
    return io_choice.choose_threads([path], 1000, 1 << 40, remembered)


def test_more_threads_are_tried_on_a_mac(mac: Mac, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(io_choice, "probe_disk", disk := Disk(RATES))
    assert threads(path, tmp_path / "disks.json") == 32
    assert disk.asked == [2, 4, 8, 16, 32]
    monkeypatch.setattr(sys, "platform", "linux")
    assert threads(path, tmp_path / "linux.json") == 16


def test_threads_are_remembered_for_a_month(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    remembered, now = tmp_path / "disks.json", 1_800_000_000.0
    monkeypatch.setattr(io_choice, "probe_disk", disk := Disk(RATES))
    for day, probes in ((0, 1), (29, 1), (31, 2), (59, 2), (-400, 3)):
        monkeypatch.setattr(io_choice.time, "time", lambda: now + day * 86400)  # noqa: B023  called at once
        assert threads(path, remembered) == 16
        assert len(disk.asked) == probes * 4
    key = f"{path.stat().st_dev}:1000"
    remembered.write_text(f'{{"{key}": 8}}')  # what earlier versions wrote, without a date
    assert threads(path, remembered) == 16


def test_a_probe_of_memory_is_not_remembered(mac: Mac, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(io_choice, "probe_disk", Disk(RATES | {4: 30e9}))
    assert threads(path, tmp_path / "disks.json") == io_choice.DEFAULT_THREADS
    assert not (tmp_path / "disks.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_buffers_go_back_to_the_system():
    """In a process of its own: a heap's settings are for good. The second buffers would have stayed in the heap."""
    code = """
import ctypes
from flash_moe_mlx.system import return_freed_buffers
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if return_freed_buffers():
    size = 20 << 20
    before = resident()
    for _ in range(2):
        buffers = [libc.malloc(size) for _ in range(4)]
        above = libc.malloc(100_000)  # would keep the heap's end from being trimmed
        for buffer in buffers:
            ctypes.memset(buffer, 1, size)
            libc.free(buffer)
    assert resident() - before < size, (before, resident())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_other_c_libraries_keep_their_heaps(mac: Mac, monkeypatch: pytest.MonkeyPatch):
    """The stand-in has neither mallopt nor malloc_trim, as macOS."""
    monkeypatch.setattr(system, "return_freed_buffers", system.return_freed_buffers.__wrapped__)
    monkeypatch.setattr(system, "_next_trim", 0.0)
    assert not system.return_freed_buffers()
    system.trim_heap()


def test_the_heap_is_trimmed_now_and_then(monkeypatch: pytest.MonkeyPatch):
    trimmed, now = [], [100.0]

    class Libc:
        def malloc_trim(self, pad: int) -> None:
            trimmed.append(now[0])

    monkeypatch.setattr(system, "_libc", lambda: Libc())
    monkeypatch.setattr(system, "return_freed_buffers", lambda: True)
    monkeypatch.setattr(system, "_next_trim", 0.0)
    monkeypatch.setattr(system.time, "monotonic", lambda: now[0])
    for now[0] in (100.0, 101.0, 104.9, 105.0, 107.0, 111.0):
        system.trim_heap()
    assert trimmed == [100.0, 105.0, 111.0]
    monkeypatch.setattr(system, "return_freed_buffers", lambda: False)
    now[0] = 200.0
    system.trim_heap()
    assert len(trimmed) == 3
