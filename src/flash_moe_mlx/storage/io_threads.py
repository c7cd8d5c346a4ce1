"""Threads for reads, and a latch to wait on, that work on after an interrupt at any moment.

Not concurrent.futures or threading.Event: those are Python code around a lock, and a Ctrl-C that comes once the lock
is taken, but before the block that would release it, leaves it locked: the next who needs it waits for ever. Here each
step that another thread may wait for is a single call into C, and may be taken again.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from ..errors import StoreError
from ..system import expect_waiters

_POLL_SECONDS = 0.05
"""How late a waiter is at most, where an interrupt came between the two steps of opening a latch."""

_Jobs = SimpleQueue[Callable[[], None] | None]


class Latch:
    """Closed until it is opened, once and for good."""

    def __init__(self) -> None:
        self._is_open = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def is_open(self) -> bool:
        return self._is_open

    def open(self) -> None:
        """May be called again."""
        self._is_open = True
        self._release()

    def wait(self) -> None:
        """Return once it is open."""
        while not self._is_open:
            if self._gate.acquire(timeout=_POLL_SECONDS):
                self._release()  # for the next who waits

    def _release(self) -> None:
        with suppress(RuntimeError):  # nobody holds it: it has been open before
            self._gate.release()


class IOThreads:
    """Threads that run jobs in the order of submission. They start with the first job."""

    def __init__(self, num_threads: int, name: str):
        self._num_threads = num_threads
        self._name = name
        self._lock = threading.Lock()
        self._jobs: _Jobs = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Also when nobody holds this any more, and at the interpreter's end: no read may outlive what it writes to.
        self._stop = weakref.finalize(self, _stop, self._jobs, self._threads)

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job run. It must not raise.

        Raises:
            StoreError: If the threads have ended, with `close` or the interpreter.
        """
        if not self._stop.alive:
            raise StoreError("[ExpertStore] must be open, got one whose threads have ended. Open a new store.")
        if len(self._threads) < self._num_threads:
            self._start()
        self._jobs.put(job)

    def close(self) -> None:
        """End the threads when all jobs are done. May be called again."""
        self._stop()
        _join(self._threads)

    def _start(self) -> None:
        with self._lock:
            while len(self._threads) < self._num_threads:
                name = f"{self._name}_{len(self._threads)}"
                # Daemons: the interpreter's end would wait for the others before it calls what ends them.
                thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)


def _serve(jobs: _Jobs) -> None:
    expect_waiters()
    while (job := jobs.get()) is not None:
        job()
        del job  # it keeps buffers alive
    jobs.put(None)  # for the next thread


def _stop(jobs: _Jobs, threads: list[threading.Thread]) -> None:
    jobs.put(None)
    _join(threads)


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        if thread is not threading.current_thread():  # the last reference may go on one of them
            thread.join()
