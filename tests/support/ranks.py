"""Processes that share a model over MLX's ring on this machine, forked from one that has imported everything."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ring import rank_environments

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    """How one rank ended: exit status, its results (one entry per load), and the seconds until it had ended."""

    status: int
    results: list[dict[str, Any]]
    stderr: str
    seconds: float


class Ranks:
    """A process that forks ranks. One run at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank_child"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def run(
        self,
        count: int,
        directory: Path,
        scratch: Path,
        what: dict[str, Any],
        timeout: float = 240,
        ended_by: int | None = None,
        during: Callable[[list[int], list[Path]], None] | None = None,
    ) -> list[Ended]:
        """Run a child as each rank and wait for all. If one doesn't end in time, it is killed and the test fails.

        Args:
            count: Number of ranks.
            directory: The checkpoint.
            scratch: Directory for files of the run.
            what: See rank_child.py.
            timeout: Seconds until all must have ended.
            ended_by: Rank that can't end by itself: it is killed once the others have ended.
            during: Called with the ranks' process ids, and the files that they write their messages to.
        """
        outputs = [scratch / f"rank-{time.monotonic_ns()}-{rank}" for rank in range(count)]
        run = {
            "directory": str(directory),
            "what": {"loads": [{}], **what},
            "environments": rank_environments(count, scratch),
            "outputs": list(map(str, outputs)),
        }
        started = time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(run) + "\n")
        pids: list[int] = json.loads(self._lines.get(timeout=300))["pids"]
        ended: dict[int, tuple[int, float]] = {}
        try:
            if during is not None:
                during(pids, [Path(f"{output}.err") for output in outputs])
            while len(ended) < count:
                if ended_by is not None and set(pids) - set(ended) == {pids[ended_by]}:
                    os.kill(pids[ended_by], signal.SIGKILL)
                line = json.loads(self._lines.get(timeout=max(timeout - (time.monotonic() - started), 0.1)))
                ended[line["pid"]] = line["status"], time.monotonic() - started
        except queue.Empty:
            left = [rank for rank, pid in enumerate(pids) if pid not in ended]
            said = [Path(f"{outputs[rank]}.err").read_text() for rank in left]
            raise AssertionError(f"ranks {left} did not end within {timeout} s: {said}") from None
        finally:
            for pid in set(pids) - set(ended):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._lines.get(timeout=300)
        return [self._ended(output, *ended[pid]) for output, pid in zip(outputs, pids, strict=True)]

    @staticmethod
    def _ended(output: Path, status: int, seconds: float) -> Ended:
        text = output.read_text() if output.exists() else ""
        return Ended(status, json.loads(text or "[]"), Path(f"{output}.err").read_text(), seconds)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(300)


@contextmanager
def ranks_running() -> Iterator[Ranks]:
    """Start a process that forks ranks, and end it."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()
