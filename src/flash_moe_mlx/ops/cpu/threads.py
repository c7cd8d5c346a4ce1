"""Runs a kernel on all processors of this process: threads draw tasks until none is left.

Not numba's ``prange``: with OpenMP the caller waits for every thread, also for one that the system hasn't run
yet, so on a busy machine a kernel of 0.5 ms took a time slice of 8 ms; idle threads spin on cores that MLX and the
reads need; the workqueue layer aborts when two threads enter it; and it compiles twice as long. Here the caller
waits only for tasks that another thread has begun.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numba import types

from ...machine import CGROUP_ROOT, available_cores
from .jit import serial
from .memory_ir import load_i64

LOCK = threading.Lock()
"""One kernel at a time: two would only fight for the same cores."""

_SPINS = 2000

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@serial
def _wait(state, tasks):  # type: ignore[no-untyped-def]
    """Wait until ``tasks`` tasks are finished."""
    spins, finished = 0, state.ctypes.data + 8
    while load_i64(finished) < tasks:
        spins += 1
        if spins > _SPINS:
            _sched_yield()


def cgroup_cpus(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors that this process's control group and its parents (v1 and v2) grant, or None."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            if controllers:
                directory = (root / "cpu").joinpath(*parts[:depth])
                texts = [_text(directory / "cpu.cfs_quota_us"), _text(directory / "cpu.cfs_period_us")]
            else:
                texts = _text(root.joinpath(*parts[:depth]) / "cpu.max").split()
            if len(texts) == 2 and all(text.isdigit() for text in texts):
                quotas.append(int(texts[0]) / int(texts[1]))
    return min(quotas, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def num_threads() -> int:
    """Threads of a kernel: processors that this process may run on, at most its cgroup's quota rounded up."""
    threads, quota = available_cores(), cgroup_cpus()
    return max(1, threads if quota is None else min(threads, int(-(-quota // 1))))


_queues: list[SimpleQueue[tuple[Callable[..., int], tuple[Any, ...]]]] = []


def _serve(queue: "SimpleQueue[tuple[Callable[..., int], tuple[Any, ...]]]") -> None:
    while True:
        kernel, arguments = queue.get()
        kernel(*arguments)
        del kernel, arguments  # they keep arrays alive


def _start() -> None:
    while len(_queues) < num_threads() - 1:
        _queues.append(SimpleQueue())
        threading.Thread(target=_serve, args=(_queues[-1],), name="flash-moe-kernels", daemon=True).start()


def _forget_threads() -> None:
    global LOCK
    LOCK = threading.Lock()
    _queues.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # a forked child has none of its parent's threads


def run(kernel: Callable[..., int], *arguments: Any, alone: bool = False) -> None:
    """Run a kernel to its end.

    Args:
        kernel: Takes ``arguments`` and the address of its state: two int64, the next task and how many are
            finished. Draws tasks until none is left and returns how many there are.
        arguments: What it reads; addresses in them stay valid until the call returns.
        alone: In the calling thread only.
    """
    with LOCK:
        if len(_queues) < num_threads() - 1:
            _start()
        # New for each call: a thread that comes late finds this call's tasks taken, not the next one's.
        state = np.zeros(2, np.int64)
        arguments = (*arguments, state)
        finished = False
        try:
            for queue in () if alone else _queues:
                queue.put((kernel, arguments))
            _wait(state, kernel(*arguments))
            finished = True
        finally:
            # Other threads write through bare addresses: an interrupt must not free the arrays behind them.
            while not finished:
                with suppress(KeyboardInterrupt):
                    _wait(state, kernel(*arguments))
                    finished = True
