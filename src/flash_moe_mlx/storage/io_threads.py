"""I/O threads and a latch that stay usable after a KeyboardInterrupt at any point.

concurrent.futures and threading.Event are Python code around a lock: a Ctrl-C after the lock is acquired but before
the block that releases it leaves it locked, and the next thread that needs it waits forever. Here, every step that
another thread may wait for is a single, repeatable call into C.
"""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from ..errors import StoreError
from ..system import expect_waiters
from .read_progress import ReadProgress

_POLL_SECONDS = 0.05
"""Upper bound on how late a waiter wakes if an interrupt splits `Latch.open`, or if reads hang."""

_GRACE_SECONDS = 1.0
"""Time for the other threads to end if one of them hangs in a read."""

_Jobs = SimpleQueue[Callable[[], None] | None]


class Latch:
    """A latch that is closed until it is opened once, permanently."""

    def __init__(self) -> None:
        self._is_open = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def is_open(self) -> bool:
        return self._is_open

    def open(self) -> None:
        """Open the latch. May be called again."""
        self._is_open = True
        self._release()

    def wait(self, progress: ReadProgress | None = None) -> bool:
        """Wait until the latch is open, or reads hang; return whether it is open."""
        while not self._is_open:
            if self._gate.acquire(timeout=_POLL_SECONDS):
                self._release()  # for the next waiter
            elif progress is not None and progress.is_stalled():
                return self._is_open
        return True

    def _release(self) -> None:
        with suppress(RuntimeError):  # nobody holds it: the latch was open before
            self._gate.release()


class IOThreads:
    """Threads that run jobs in order of submission. They start with the first job."""

    def __init__(self, num_threads: int, name: str, progress: ReadProgress | None = None):
        self._progress = ReadProgress() if progress is None else progress
        self._num_threads = num_threads
        self._name = name
        self._lock = threading.Lock()
        self._jobs: _Jobs = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Also when this object is dropped, and at interpreter exit: no read may outlive its buffer.
        self._stop = weakref.finalize(self, _stop, self._jobs, self._threads, self._progress)

    def submit(self, job: Callable[[], None]) -> None:
        """Submit a job, which must not raise.

        Raises:
            StoreError: If the threads have ended, by `close` or at interpreter exit.
        """
        if not self._stop.alive:
            raise StoreError("[ExpertStore] must be open, got one whose threads have ended. Open a new store.")
        if len(self._threads) < self._num_threads:
            self._start()
        self._jobs.put(job)

    def close(self) -> bool:
        """End the threads once all jobs are done. May be called again.

        Returns:
            Whether they have ended. One that hangs in a read is left to end after it.
        """
        self._stop()
        return _join(self._threads, self._progress)

    def _start(self) -> None:
        with self._lock:
            while len(self._threads) < self._num_threads:
                name = f"{self._name}_{len(self._threads)}"
                # Daemon threads: at exit, the interpreter would wait for others before running the hook that ends them.
                thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    if "can't start new thread" not in str(error):
                        raise
                    if self._threads:  # fewer than wished, because of the system's limit
                        return
                    raise StoreError(
                        f"[ExpertStore] must be able to start a thread, got {error}. End other programs."
                    ) from error
                self._threads.append(thread)


def _serve(jobs: _Jobs) -> None:
    expect_waiters()
    while (job := jobs.get()) is not None:
        job()
        del job  # the job keeps buffers alive
    jobs.put(None)  # for the next thread


def _stop(jobs: _Jobs, threads: list[threading.Thread], progress: ReadProgress) -> None:
    jobs.put(None)
    _join(threads, progress)


def _join(threads: list[threading.Thread], progress: ReadProgress) -> bool:
    enough = time.monotonic() + _GRACE_SECONDS
    for thread in threads:
        if thread is threading.current_thread():  # the last reference may be dropped on one of them
            continue
        while thread.is_alive():
            if time.monotonic() > enough and progress.is_stalled():
                return False
            thread.join(_POLL_SECONDS)
    return True
