"""RankGroup: the processes that share a model, with collectives that end within a bounded time.

MLX transfers the numbers (``mx.distributed``: ring, JACCL, NCCL or MPI). Its collectives wait forever for a rank that
hangs, and can't be interrupted. Therefore each runs on a thread that may be abandoned, while the caller waits for the
result, for news of a failure, or for a timeout. News travels over a side channel (rank_links.py): signs of life
and of progress, failures with their reason, departures, and the commands of a rank that leads.

A group that has failed stays failed, since its ranks are out of step: every later call raises the first reason. As an
abandoned thread can't be stopped, a process that has one ends by ``os._exit`` with code 1 when its main thread has
finished.

MLX's ring polls the socket while it waits for a message, which occupies a core. Ranks that share a host would take the
cores from each other, so they meet on the side channel before each collective.
"""

import atexit
import contextlib
import faulthandler
import logging
import math
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import DistributedError
from .rank_links import RankLinks
from .ring_meeting import meet_on_ring

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 10.0
"""Seconds that a rank waits for another one that makes no progress."""

START_SECONDS = 60.0
"""Seconds in which all ranks must have started."""

CONNECT_SECONDS = 6.0
"""Seconds in which MLX must have connected a ring whose ranks have met."""

END = "end"
"""Command after which ranks no longer follow."""

BACKENDS = ("ring", "jaccl", "nccl")
_GRACE = 0.5  # seconds in which results that a rank sent before it died may still arrive
_LEAVE_GRACE = 2.0  # the same for a rank that left


class RankGroup:
    """The ranks that share a model. Used by one thread at a time: the one that holds the engine's lock.

    Attributes:
        backend: Name of MLX's backend that carries the numbers.
        rank: This process's number.
        size: Number of ranks.
        timeout: Seconds that a rank waits for another one that makes no progress.
        progress: Returns a number that changes while this rank works.
        on_failure: Called once, on another thread, when the group fails.
        allowance: Seconds added to ``timeout``, while kernels may be compiled.
        is_led: Whether one rank leads and the others follow, so that none may leave before the leader ends it.
    """

    def __init__(self, group: mx.distributed.Group, timeout: float = DEFAULT_TIMEOUT, backend: str = ""):
        """Connect the side channel. Collective: every rank makes its own at the same time.

        Args:
            group: MLX's group.
            timeout: Seconds that a rank waits for another one that makes no progress.
            backend: Name of MLX's backend.

        Raises:
            DistributedError: If a rank doesn't come within ``timeout``.
        """
        self._group = group
        self.backend = backend
        self._unguarded = False
        self.rank, self.size, self.timeout = group.rank(), group.size(), timeout
        self.progress: Callable[[], int] = lambda: 0
        self.on_failure: Callable[[], None] = lambda: None
        self.is_led = False
        self.allowance = 0.0
        self._failure = ""
        self._closed = False
        self._changed = threading.Condition()  # guards all attributes below
        self._gone: dict[int, str] = {}
        self._gone_at = 0.0
        self._answers: list[np.ndarray] = []  # none or one
        self._computing = False
        self._round = 0
        self._arrived: dict[int, int] = {}  # last reported round of each other rank
        self._seen: dict[int, float] = {}
        self._worked: dict[int, int] = {}
        self._moved = time.monotonic()
        self._commands: deque[dict[str, Any]] = deque()
        self._requests: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._links: RankLinks | None = None
        threading.Thread(target=self._collect, name="collectives", daemon=True).start()
        atexit.register(self.close)
        try:
            self._links = RankLinks(self.rank, self.size, timeout, self.sum)
        except (ConnectionError, EOFError) as error:
            self.fail(str(error))
            self.check()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def __deepcopy__(self, memo: dict[int, object]) -> "RankGroup":
        """Return itself: a copied model shares its engine."""
        return self

    # Collectives.

    def sum(self, words: np.ndarray, *, patient: bool = False) -> np.ndarray:
        """Add up all ranks' words, modulo 2^32. If only one rank's words are not zero, the sum has their bits.

        Args:
            words: This rank's words. Shape (n,), uint32; n is the same on every rank.
            patient: Whether to wait as long as all ranks show signs of life.

        Raises:
            DistributedError: If a rank has ended, failed or makes no progress for too long.
        """
        self.check()
        if self._links is not None and self._links.share_a_host:
            self._meet(patient)
        self._requests.put(words)
        self._await(lambda: bool(self._answers), patient)
        return self._answers.pop()

    @property
    def sums_on_gpu(self) -> bool:
        """Whether the numbers go from GPU to GPU, so that `sum_on_gpu` is of use."""
        return self.backend == "nccl"

    def sum_on_gpu(self, outputs: mx.array) -> mx.array:
        """Return the sum of all ranks' float32 outputs, lazily. Each is zero on all ranks but one, whose bits stay.

        Nobody waits for a lazy sum with a time limit: once one has been asked for, a failure of the group ends the
        process.
        """
        return self.words_on_gpu(outputs.view(mx.uint32)).view(mx.float32)

    def words_on_gpu(self, words: mx.array) -> mx.array:
        """Return the sum of all ranks' words, uint32, lazily. Unguarded as `sum_on_gpu`."""
        self._unguarded = True
        return mx.distributed.all_sum(words, group=self._group)

    def broadcast(self, data: bytes | None = None, *, patient: bool = False) -> bytes:
        """Send rank 0's bytes to all.

        Args:
            data: The bytes on rank 0; ignored elsewhere.
            patient: Whether to wait as long as all ranks show signs of life.

        Raises:
            DistributedError: If a rank has ended, failed or makes no progress for too long.
        """
        sent = (data or b"") if self.rank == 0 else b""
        length = int(self.sum(np.array([len(sent)], np.uint32), patient=patient)[0])
        words = np.zeros(-(-length // 4), np.uint32)
        words.view(np.uint8)[: len(sent)] = np.frombuffer(sent, np.uint8)
        return self.sum(words).tobytes()[:length] if length else b""

    def gather(self, value: int, *, patient: bool = False) -> list[int]:
        """Collect a number of 32 bits from each rank. Raises as `sum`."""
        words = np.zeros(self.size, np.uint32)
        words[self.rank] = value
        return [int(word) for word in self.sum(words, patient=patient)]

    # Commands.

    def command(self, message: dict[str, Any]) -> None:
        """Send a command of rank 0 to the ranks that follow.

        Raises:
            DistributedError: If the group has failed.
        """
        self.check()
        assert self._links is not None
        self._links.send({"op": "command", "command": message})

    def next_command(self) -> dict[str, Any]:
        """Return the next command of rank 0, however long it takes.

        Raises:
            DistributedError: If the group fails.
        """
        self._await(lambda: bool(self._commands), patient=True)
        return self._commands.popleft()

    # Failures.

    @property
    def failed(self) -> bool:
        """Whether the group has failed."""
        return bool(self._failure)

    def check(self) -> None:
        """Raise the reason if the group has failed.

        Raises:
            DistributedError: If it has.
        """
        if self._failure:
            raise DistributedError(
                f"[rank {self.rank} of {self.size}] all ranks must compute together, got: {self._failure}. "
                "Start all of them again."
            )

    def fail(self, reason: str) -> None:
        """Tell all ranks that this one can't compute with them any more. Does nothing the second time."""
        self._break(f"rank {self.rank} {reason}")

    def close(self) -> None:
        """Leave the group. If a collective hangs, the process ends at once: Python would wait for its thread."""
        if self._closed:
            return
        self._closed = True
        self._tell({"op": "leave", "rank": self.rank})
        self._requests.put(None)
        if self._computing:
            _exit()

    def _break(self, reason: str) -> None:
        with self._changed:
            if self._failure or self._closed:
                return
            self._failure = reason
            self._changed.notify_all()
        logger.warning("[rank %d] %s", self.rank, reason)
        self._tell({"op": "fail", "reason": reason})
        self.on_failure()
        if self._unguarded:
            time.sleep(_GRACE)  # the message may leave
            _exit()

    def _tell(self, message: dict[str, Any], but: int = -1) -> None:
        if self._links is not None:
            self._links.send(message, but)

    # Waiting.

    def _await(self, ready: Callable[[], bool], patient: bool) -> None:
        """Wait for a condition while the others live and make progress; otherwise fail the group."""
        started, done = time.monotonic(), False
        try:
            with self._changed:
                while not (done := ready()) and not self._failure:
                    limit = math.inf if patient else max(started, self._moved) + self.timeout + self.allowance
                    if self._gone:
                        limit = max(started, self._gone_at) + _LEAVE_GRACE
                    if (left := limit - time.monotonic()) <= 0:
                        break
                    self._changed.wait(None if patient and not self._gone else left)
        finally:
            if not done:
                # An interrupt, for example: the ranks are out of step then.
                late = f"waited {self.timeout:g} s for another"
                late = next((f"saw that {how}" for how in self._gone.values()), late)
                self.fail("was interrupted" if sys.exception() is not None else late)
        self.check()

    def _meet(self, patient: bool) -> None:
        self._round += 1
        self._tell({"op": "at", "round": self._round})
        if self.rank == 0:
            self._await(lambda: all(self._arrived.get(r, 0) >= self._round for r in range(1, self.size)), patient)
            self._tell({"op": "at", "round": self._round})
        else:
            self._await(lambda: self._arrived.get(0, 0) >= self._round, patient)

    # The thread of collectives.

    def _collect(self) -> None:
        while (words := self._requests.get()) is not None:
            self._computing = True
            try:
                total = mx.distributed.all_sum(mx.array(words), group=self._group)
                mx.eval(total)  # without Python's lock, which np.array would hold while it waits
                answer = np.array(total)
            except RuntimeError as error:
                self._break(f"rank {self.rank} can't reach the others: {error}")
                return
            self._computing = False
            with self._changed:
                self._answers.append(answer)
                self._changed.notify_all()

    # The thread of the side channel.

    def _watch(self) -> None:
        assert self._links is not None
        beat = min(max(self.timeout / 4, 0.05), 1.0)
        told = 0.0
        self._seen = dict.fromkeys(self._links.ranks, time.monotonic())
        while not (self._failure or self._closed):
            if time.monotonic() - told >= beat:
                # Rank 0 tells each of all others; its own number must not come back to it.
                others = sum(self._worked.values()) if self.rank == 0 else 0
                self._tell({"op": "beat", "worked": self.progress() + others})
                told = time.monotonic()
            for rank in self._links.ready(beat):
                self._hear(rank)
            for rank in self._links.ranks:
                if time.monotonic() - self._seen[rank] > self.timeout:
                    self._break(f"rank {rank} has shown no sign of life for {self.timeout:g} s")

    def _hear(self, rank: int) -> None:
        assert self._links is not None
        try:
            message = self._links.receive(rank)
        except (OSError, EOFError):
            self._links.drop(rank)
            if rank not in self._gone:
                time.sleep(_GRACE)
                self._break(f"rank {rank} has died")
            return
        self._seen[rank] = time.monotonic()
        with self._changed:
            match message["op"]:
                case "beat":
                    if self._worked.get(rank) != message["worked"]:
                        self._worked[rank] = message["worked"]
                        self._moved = time.monotonic()
                case "at":
                    self._arrived[rank] = message["round"]
                case "command":
                    self._commands.append(message["command"])
                    self.is_led = message["command"]["op"] != END
                case "leave":
                    self._gone[int(message["rank"])] = f"rank {message['rank']} has left"
                    self._gone_at = time.monotonic()
            self._changed.notify_all()
        if message["op"] == "fail":
            self._break(str(message["reason"]))
        elif message["op"] == "leave":
            self._tell(message, but=rank)
            if self.is_led:
                self._break(self._gone[int(message["rank"])])


def _exit() -> None:
    """End the process at once, with code 1: a thread of it waits for another rank forever."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


_joined: list[RankGroup] = []


def join_ranks(timeout: float = DEFAULT_TIMEOUT) -> RankGroup | None:
    """Return the group of ranks that this process was started in, by ``mlx.launch`` for one; None if it is alone.

    Raises:
        DistributedError: If the group has failed, or a rank doesn't come in time.
    """
    if not _joined:
        for backend in BACKENDS:
            group = _initialise(backend) if mx.distributed.is_available(backend) else None
            if group is not None and group.size() > 1:
                _joined.append(RankGroup(group, timeout, backend))
                break
        else:
            return None
    _joined[0].check()
    _joined[0].timeout = timeout
    return _joined[0]


def _initialise(backend: str) -> mx.distributed.Group:
    seconds = START_SECONDS
    try:
        if backend != "ring" or not meet_on_ring(START_SECONDS):
            with _alarm(seconds):
                return mx.distributed.init(backend=backend)
        seconds = CONNECT_SECONDS
        with _alarm(seconds), _last_resort(seconds + 1):
            return mx.distributed.init(backend=backend)
    except RuntimeError as error:
        raise DistributedError(
            f"[ranks] all ranks must start within {seconds:g} s, got {error}. Start all of them again, and check "
            "hosts and ports."
        ) from error


@contextmanager
def _last_resort(seconds: float) -> Iterator[None]:
    """End the process with code 1 if MLX, which holds Python's lock, still tries to reach a rank after so long."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Interrupt a system call that MLX waits in with Python's lock held, such as accept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(TypeError):  # a handler that wasn't installed by Python
            signal.signal(signal.SIGALRM, before)
