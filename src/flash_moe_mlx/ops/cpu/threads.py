"""Thread pool that runs a kernel on all processors of this process: threads draw tasks until none is left.

It replaces numba's ``prange``. With OpenMP the caller waits for every thread, even one that the system hasn't scheduled
yet, so on a busy machine a kernel of 0.5 ms took a time slice of 8 ms; idle threads spin on cores that MLX and the
reads need; the workqueue layer aborts when two threads enter it; and compilation takes twice as long. Here the caller
waits only for tasks that another thread has begun.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numba import types

from ...machine import CGROUP_ROOT
from ...system import usable_cores
from .jit import serial
from .memory_ir import load_i64

LOCK = threading.Lock()
"""Lock that lets one kernel run at a time: two would only compete for the same cores."""

ALONE_BYTES = 1 << 18
"""Kernels that read fewer bytes run on the calling thread, because waking others takes longer."""

STEP_SPINS = 30_000
"""Loads of about a nanosecond: longer than most operations of a decode step take."""

_SPINS = 2_000
"""The same at the end of a kernel, where a spinning thread slows the one that works on the other half of its core."""

_FAILED = 1 << 62
"""Number of finished tasks set when a kernel raised, so that nobody waits for more or draws another."""

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@serial
def wait_for(counter, needed, most):  # type: ignore[no-untyped-def]
    """Wait until the int64 at address ``counter`` is at least ``needed``.

    Spins ``most`` times, then yields the core: with more threads than cores, or under a quota, the thread that it waits
    for may not be running. Spins without the processor's pause instruction, which cost 5 % of decode on the tested
    virtual machine.
    """
    spins = 0
    while load_i64(counter) < needed:
        if spins < most:
            spins += 1
        else:
            _sched_yield()


@serial
def _wait(state, tasks):  # type: ignore[no-untyped-def]
    """Wait until ``tasks`` tasks are finished."""
    wait_for(state.ctypes.data + 8, tasks, _SPINS)


def cgroup_cpus(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the processors granted by this process's control group and its parents (v1 and v2), or None."""
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
    """Return the number of threads of a kernel: the usable processors, at most the cgroup's quota rounded up."""
    threads, quota = usable_cores(), cgroup_cpus()
    return max(1, threads if quota is None else min(threads, int(-(-quota // 1))))


class _Call:
    """One call of a kernel, which several threads take part in.

    Attributes:
        state: Index of the next task, and number of finished ones. Shape (2,), int64.
        inside: One entry for each thread that entered the kernel.
        left: One entry for each thread that left it.
        failures: Exceptions that kernels raised.
    """

    __slots__ = ("_arguments", "_kernel", "failures", "inside", "left", "state")

    def __init__(self, kernel: Callable[..., int], arguments: tuple[Any, ...]):
        # New for each call, so that a late thread finds this call's tasks taken, not the next call's.
        self.state = np.zeros(2, np.int64)
        self.inside: list[None] = []
        self.left: list[None] = []
        self.failures: list[BaseException] = []
        self._kernel, self._arguments = kernel, (*arguments, self.state)

    def take_part(self) -> int:
        """Draw tasks until none is left, and return their total number."""
        tasks = -1
        self.inside.append(None)
        try:
            tasks = self._kernel(*self._arguments)
        finally:
            error = sys.exc_info()[1]
            if tasks < 0 and error is not None and not isinstance(error, KeyboardInterrupt):
                self.failures.append(error)
                self.state[:] = _FAILED
            self.left.append(None)
        return tasks

    def settle(self) -> None:
        """Draw tasks, and return when no thread is writing any more."""
        if not self.failures:
            _wait(self.state, self.take_part())
        while self.failures and len(self.left) < len(self.inside):
            time.sleep(0)


_queues: list[SimpleQueue[_Call]] = []


def _serve(queue: SimpleQueue[_Call]) -> None:
    try:
        while True:
            queue.get().take_part()
    finally:  # a kernel raised, which its caller is told; the next call starts another thread
        _queues.remove(queue)


def _start() -> None:
    while len(_queues) < num_threads() - 1:
        queue: SimpleQueue[_Call] = SimpleQueue()
        _queues.append(queue)
        threading.Thread(target=_serve, args=(queue,), name="flash-moe-kernels", daemon=True).start()


def _forget_threads() -> None:
    global LOCK
    LOCK = threading.Lock()
    _queues.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # a forked child has none of its parent's threads


def run(kernel: Callable[..., int], *arguments: Any, alone: bool = False) -> None:
    """Run a kernel to its end.

    Args:
        kernel: Function of ``arguments`` and the address of its state: two int64, the next task and the number of
            finished ones. It draws tasks until none is left and returns their total number.
        arguments: Arguments of the kernel; addresses in them must stay valid until the call returns.
        alone: Whether to run in the calling thread only.

    An exception of the kernel, on any thread, is raised here once all threads have left it.
    """
    with LOCK:
        if len(_queues) < num_threads() - 1:
            _start()
        call = _Call(kernel, arguments)
        finished = False
        try:
            for queue in () if alone else _queues:
                queue.put(call)
            call.settle()
            finished = True
        finally:
            # Other threads write through bare addresses: an interrupt must not free the arrays behind them.
            while not finished:
                with suppress(KeyboardInterrupt):
                    call.settle()
                    finished = True
        for error in call.failures:
            raise error
