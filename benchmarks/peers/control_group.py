"""A memory control group (cgroup v1) around one child, and what it was seen to use. Needs root."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path("/sys/fs/cgroup/memory")
GIB = 1 << 30


def drop_caches() -> None:
    """Write back, then drop the page cache: of the whole machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@contextlib.contextmanager
def read_ahead(path: Path, kib: int | None) -> Iterator[int]:
    """Set the read-ahead of the disk that holds a file, and set it back. Yields what is in force, in KiB.

    A page fault in a mapped file reads this much, needed or not: what an engine that faults its weights in gets from a
    disk depends on it more than on anything else. Linux's own default is 128; some images set megabytes.
    """
    number = path.stat().st_dev
    setting = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/read_ahead_kb")
    before = setting.read_text()
    if kib is not None:
        setting.write_text(str(kib))
    try:
        yield int(setting.read_text())
    finally:
        setting.write_text(before)


class ControlGroup:
    """A group with a limit, empty at first. Page cache counts where it was first touched: drop caches before.

    Attributes:
        most_rss_bytes: Most anonymous memory that was seen (memory.stat's total_rss).
    """

    def __init__(self, name: str, limit_bytes: int | None):
        self.path = ROOT / name
        self.path.mkdir(exist_ok=True)
        (self.path / "memory.limit_in_bytes").write_text(str(limit_bytes or -1))
        self.most_rss_bytes = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def start(self, words: list[str], environment: dict[str, str], errors: IO[str]) -> subprocess.Popen[str]:
        """Start a child that is in the group from its first instruction; it writes its errors into a file."""
        join = f'echo $$ > "{self.path}/cgroup.procs"; exec "$@"'
        return subprocess.Popen(
            ["bash", "-c", join, "bash", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )

    def killed(self) -> int:
        """Return how many processes were killed for memory."""
        lines = (self.path / "memory.oom_control").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def close(self) -> None:
        self._done.set()
        self._watcher.join()
        with contextlib.suppress(OSError):  # a process that is just ending keeps it for a moment: the next run takes it
            self.path.rmdir()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            for line in (self.path / "memory.stat").read_text().splitlines():
                if line.startswith("total_rss "):
                    self.most_rss_bytes = max(self.most_rss_bytes, int(line.split()[1]))


@contextlib.contextmanager
def control_group(name: str, limit_bytes: int | None) -> Iterator[ControlGroup]:
    group = ControlGroup(name, limit_bytes)
    try:
        yield group
    finally:
        group.close()
