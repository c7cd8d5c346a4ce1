"""RankGroup: the processes that share a model, with collectives that end within a bounded time.

MLX moves the numbers (``mx.distributed``: ring, JACCL, NCCL or MPI). Its collectives wait for ever for a rank that has
gone, and can't be interrupted. So each is run by a thread that may be abandoned, while the caller waits for the result,
for news of a failure, or for the time to be up. News travels over a side channel, one TCP connection from each rank to
rank 0, authenticated by a key that MLX has carried: signs of life, "I failed, because ...", "I leave".

A group that has failed stays failed, since its ranks are out of step: every later call raises the first reason. As the
abandoned thread can't be stopped, such a process ends by ``os._exit`` with code 1 when its main thread has finished.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import secrets
import socket
import sys
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import DistributedError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 10.0
"""Seconds that a rank waits for another one."""

BACKENDS = ("ring", "jaccl", "nccl")
_GRACE = 0.5  # seconds in which results that a rank sent before it left may still arrive
_WELCOME_WORDS = 1024
_CALL = {"op": "beat"}


class RankGroup:
    """The ranks that share a model. Used by one thread at a time: the one that holds the engine's lock.

    Attributes:
        rank: This process's number.
        size: How many there are.
        timeout: Seconds that one waits for another.
    """

    def __init__(self, group: mx.distributed.Group, timeout: float = DEFAULT_TIMEOUT):
        """Connect the side channel. Collective: every rank makes its own at the same time.

        Raises:
            DistributedError: If a rank doesn't come within ``timeout``.
        """
        self._group = group
        self.rank, self.size, self.timeout = group.rank(), group.size(), timeout
        self._failure = ""
        self._closed = False
        self._lock = threading.Lock()
        self._requests: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[np.ndarray | str] = queue.SimpleQueue()
        self._links: dict[int, Connection] = {}
        self._seen: dict[int, float] = {}
        threading.Thread(target=self._collect, name="collectives", daemon=True).start()
        atexit.register(self.close)
        self._connect()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def __deepcopy__(self, memo: dict[int, object]) -> "RankGroup":
        """Return itself: a copied model shares its engine."""
        return self

    # Collectives.

    def sum(self, words: np.ndarray, *, patient: bool = False) -> np.ndarray:
        """Add up all ranks' words, modulo 2^32. Where only one rank's are not zero, that is a copy of its bits.

        Args:
            words: Shape (n,), uint32; the same n on every rank.
            patient: Whether to wait as long as all ranks show signs of life.

        Raises:
            DistributedError: If a rank has ended, failed or doesn't come in time.
        """
        self.check()
        self._requests.put(words)
        answer: np.ndarray | str | None = None
        try:
            answer = self._answers.get(timeout=None if patient else self.timeout)
        except queue.Empty:
            answer = None
        finally:
            # An interrupt among others: the ranks are out of step then.
            if answer is None:
                interrupted = sys.exception() is not None
                self.fail("was interrupted" if interrupted else f"waited {self.timeout:g} s for another rank")
        if not isinstance(answer, np.ndarray):
            self.check()
        return answer  # type: ignore[return-value]

    def broadcast(self, data: bytes | None = None, *, patient: bool = False) -> bytes:
        """Send rank 0's bytes to all.

        Args:
            data: On rank 0 the bytes, elsewhere anything.
            patient: As for `sum`.

        Raises:
            DistributedError: As for `sum`.
        """
        sent = (data or b"") if self.rank == 0 else b""
        length = int(self.sum(np.array([len(sent)], np.uint32), patient=patient)[0])
        words = np.zeros(-(-length // 4), np.uint32)
        words.view(np.uint8)[: len(sent)] = np.frombuffer(sent, np.uint8)
        return self.sum(words).tobytes()[:length] if length else b""

    def gather(self, value: int, *, patient: bool = False) -> list[int]:
        """Collect a number of 32 bits from each rank."""
        words = np.zeros(self.size, np.uint32)
        words[self.rank] = value
        return [int(word) for word in self.sum(words, patient=patient)]

    # Failures.

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
        """Leave the group. The process is ended at once where a collective hangs: Python would wait for it."""
        if self._closed:
            return
        self._closed = True
        self._tell({"op": "leave"})
        self._requests.put(None)
        if self._failure:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _break(self, reason: str) -> None:
        with self._lock:
            if self._failure or self._closed:
                return
            self._failure = reason
        logger.warning("[rank %d] %s", self.rank, reason)
        self._answers.put(reason)
        self._tell({"op": "fail", "reason": reason})

    # The thread of collectives.

    def _collect(self) -> None:
        while (words := self._requests.get()) is not None:
            try:
                total = mx.distributed.all_sum(mx.array(words), group=self._group)
                mx.eval(total)  # without Python's lock, which np.array would hold while it waits
                answer: np.ndarray | str = np.array(total)
            except RuntimeError as error:
                self._break(f"rank {self.rank} can't reach the others: {error}")
                return
            self._answers.put(answer)

    # The side channel.

    def _connect(self) -> None:
        welcome: dict[str, Any] = {}
        listener = None
        if self.rank == 0:
            key = secrets.token_bytes(32)
            listener = Listener(("", 0), backlog=self.size, authkey=key)
            welcome = {"port": listener.address[1], "hosts": _own_addresses(), "key": key.hex()}  # type: ignore[index]
        words = np.zeros(_WELCOME_WORDS, np.uint32)
        text = json.dumps(welcome).encode() if welcome else b""
        words.view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
        welcome = json.loads(self.sum(words).tobytes().rstrip(b"\0"))
        if listener is None:
            self._links[0] = self._call(welcome["hosts"], welcome["port"], bytes.fromhex(welcome["key"]))
            self._tell({"op": "hello", "rank": self.rank})
        else:
            accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            accepting.start()
            accepting.join(self.timeout)
            if accepting.is_alive():
                self.fail(f"was called by {len(self._links)} of {self.size - 1} ranks within {self.timeout:g} s")
                self.check()
        self._seen = dict.fromkeys(self._links, time.monotonic())

    def _accept(self, listener: Listener) -> None:
        while len(self._links) < self.size - 1:
            # Whoever doesn't know the key, and a rank that only looked whether the port answers, are passed over.
            with contextlib.suppress(OSError, EOFError, ValueError, KeyError):
                link = listener.accept()
                self._links[int(json.loads(link.recv_bytes())["rank"])] = link
        listener.close()

    def _call(self, hosts: list[str], port: int, key: bytes) -> Connection:
        for host in hosts:
            with contextlib.suppress(OSError, EOFError):
                socket.create_connection((host, port), timeout=1).close()
                return Client((host, port), authkey=key)
        self.fail(f"can't reach rank 0 at {', '.join(hosts)}, port {port}")
        self.check()
        raise AssertionError

    def _tell(self, message: dict[str, Any], but: int = -1) -> None:
        text = json.dumps(message).encode()
        for rank, link in list(self._links.items()):
            if rank != but:
                with contextlib.suppress(OSError):
                    link.send_bytes(text)

    def _watch(self) -> None:
        beat = min(max(self.timeout / 4, 0.05), 1.0)
        told = 0.0
        while not (self._failure or self._closed):
            if time.monotonic() - told >= beat:
                self._tell(_CALL)
                told = time.monotonic()
            for link in wait(list(self._links.values()), timeout=beat):
                rank = next(r for r, candidate in self._links.items() if candidate is link)
                self._hear(rank, link)  # type: ignore[arg-type]
            for rank, seen in self._seen.items():
                if time.monotonic() - seen > self.timeout:
                    self._break(f"rank {rank} has shown no sign of life for {self.timeout:g} s")

    def _hear(self, rank: int, link: Connection) -> None:
        try:
            message = json.loads(link.recv_bytes())
        except (OSError, EOFError):
            message = {"op": "leave", "died": True}
        self._seen[rank] = time.monotonic()
        if message["op"] == "fail":
            self._break(str(message["reason"]))
        elif message["op"] == "leave":
            time.sleep(_GRACE)
            self._break(f"rank {rank} has {'died' if message.get('died') else 'left'}")


def _own_addresses() -> list[str]:
    """Return this machine's addresses, those that other machines may reach first."""
    found = []
    with contextlib.suppress(OSError):
        found = [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet is sent: it only chooses the route's address
        found.append(str(probe.getsockname()[0]))
    return sorted({*found, "127.0.0.1"}, key=lambda address: (address.startswith("127."), address))


_joined: list[RankGroup] = []


def join_ranks(timeout: float = DEFAULT_TIMEOUT) -> RankGroup | None:
    """Return the group of ranks that this process was started in, by ``mlx.launch`` for one; None if it is alone.

    Raises:
        DistributedError: If the group has failed, or a rank doesn't come in time.
    """
    if not _joined:
        for backend in BACKENDS:
            group = mx.distributed.init(backend=backend) if mx.distributed.is_available(backend) else None
            if group is not None and group.size() > 1:
                _joined.append(RankGroup(group, timeout))
                break
        else:
            return None
    _joined[0].check()
    _joined[0].timeout = timeout
    return _joined[0]
