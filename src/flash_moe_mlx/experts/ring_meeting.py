"""Meeting of a ring's ranks before MLX connects them, so that one that dies meanwhile is noticed at once.

MLX connects a ring with Python's lock held: it waits for its left neighbour without a limit, and tries to reach the
right one for 31 seconds, which no signal shortens. Therefore the ranks first meet at the same addresses. Each connects
to the next, and once all have, they start MLX's connections at the same time. Only a rank that dies within the
milliseconds that these take, or the second for which MLX waits if a neighbour is not ready, keeps the others waiting.
"""

import json
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import DistributedError

_VARIABLES = ("MLX_HOSTFILE", "MLX_RANK")  # by which MLX finds its ring
_POLL_SECONDS = 0.1
_ANSWER_SECONDS = 1.0
_TELL_SECONDS = 2.0
_LAST_RANK_SECONDS = 0.02
"""The last rank connects first, and MLX waits a second if rank 0 isn't listening by then."""

_CLOSED, _GO = 1, 2
"""Rounds of the ring: all listeners are closed, so that MLX can open its own; then MLX begins."""


@contextmanager
def meeting_on_ring(seconds: float) -> Iterator[bool]:
    """Wait until all ranks are here, if this process is to be part of a ring. MLX's ring is connected in the context.

    Args:
        seconds: Seconds that all ranks have to come.

    Yields:
        Whether this process is part of a ring.

    Raises:
        DistributedError: If a rank dies or doesn't come.
    """
    if (found := _own_place()) is None:
        yield False
        return
    meeting = _Meeting(*found, seconds)
    try:
        meeting.run()
        yield True
    finally:
        meeting.close()  # not before MLX's ring is there: to the others it would look like a death


def _own_place() -> tuple[int, Sequence[tuple[str, int]]] | None:
    """Return this process's rank and all addresses, or None if MLX has no ring to connect."""
    hostfile, rank = (os.environ.get(name, "") for name in _VARIABLES)
    try:
        with open(hostfile) as file:
            hosts = [str(addresses[0]).rpartition(":") for addresses in json.load(file)]
        addresses = [(host, int(port)) for host, _, port in hosts]
        own = int(rank)
    except (OSError, ValueError, LookupError, TypeError):
        return None  # MLX says what is wrong with them, if they are there
    return (own, addresses) if 0 <= own < len(addresses) and len(addresses) > 1 else None


class _Peer:
    """A connection to a neighbour, over which lines of JSON travel."""

    def __init__(self, end: socket.socket):
        self._end = end
        self._data = b""
        self._early: list[Any] = []  # that came with the first message

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: Any) -> None:
        with suppress(OSError):  # whoever is gone will be missed by its own neighbours
            self._end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """Return messages that have arrived, perhaps none yet; None if the connection has ended."""
        if self._early:
            early, self._early = self._early, []
            return early
        try:
            data = self._end.recv(4096)
            *lines, self._data = (self._data + data).split(b"\n")
            return [json.loads(line) for line in lines] if data else None
        except (OSError, ValueError):
            return None

    def first(self) -> Any:
        """Return the first message, or None if none comes in time."""
        self._end.settimeout(_ANSWER_SECONDS)
        received: list[Any] | None = []
        while received == []:
            received = self.receive()
        first, *self._early = received or [None]
        return first

    def close(self) -> None:
        self._end.close()


class _Meeting:
    """One rank's part of a meeting."""

    def __init__(self, rank: int, addresses: Sequence[tuple[str, int]], seconds: float):
        self._rank, self._addresses, self._seconds = rank, addresses, seconds
        size = len(addresses)
        self._names = {"left": (rank - 1) % size, "right": (rank + 1) % size}
        self._peers: dict[str, _Peer] = {}
        self._rounds = [_CLOSED] if rank == 0 else []  # to pass on, once there is somebody to pass them to
        self._done = False
        try:
            self._listener: socket.socket | None = socket.create_server(addresses[rank], backlog=len(addresses))
        except OSError as error:
            host, port = addresses[rank]
            raise DistributedError(
                f"[rank {rank} of {size}] its address must be free and this machine's, got {error} for {host}:{port}. "
                "Check hosts and ports."
            ) from error

    def run(self) -> None:
        """Meet. Raises DistributedError if a rank dies or doesn't come."""
        deadline = time.monotonic() + self._seconds
        while not self._done:
            if time.monotonic() > deadline:
                absent = next((n for side, n in self._names.items() if side not in self._peers), None)
                who = "a rank" if absent is None else f"rank {absent}"
                self._fail(f"{who} has not started within {self._seconds:g} s")
            if "right" not in self._peers:
                self._call()
            self._listen(_POLL_SECONDS)
            if self._rounds and len(self._peers) == 2:
                self._pass_on()
        if self._rank == len(self._addresses) - 1:
            self._listen(_LAST_RANK_SECONDS)

    def _listen(self, seconds: float) -> None:
        ends: list[Any] = [end for end in (self._listener, *self._peers.values()) if end is not None]
        ready, _, _ = select.select(ends, [], [], seconds)
        if self._listener in ready:
            self._answer()
        for side, peer in list(self._peers.items()):
            if peer in ready:
                self._hear(side, peer)

    def close(self) -> None:
        """Close all connections."""
        for end in (self._listener, *self._peers.values()):
            if end is not None:
                end.close()

    def _call(self) -> None:
        """Try to reach the next rank. Another program, such as MLX, may be listening there: it must answer as we do."""
        try:
            peer = _Peer(socket.create_connection(self._addresses[self._names["right"]], timeout=_ANSWER_SECONDS))
        except OSError:
            return
        peer.send({"rank": self._rank})
        # Two ranks call each other at the same time, and each must answer while it waits for an answer.
        until = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < until:
            ends: list[Any] = [peer, self._listener] if self._listener else [peer]
            ready, _, _ = select.select(ends, [], [], _POLL_SECONDS)
            if self._listener in ready:
                self._answer()
            if peer in ready:
                if peer.first() == {"rank": self._names["right"]}:
                    self._peers["right"] = peer
                    return
                break
        peer.close()

    def _answer(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            peer = _Peer(self._listener.accept()[0])
            if "left" not in self._peers and peer.first() == {"rank": self._names["left"]}:
                peer.send({"rank": self._rank})
                self._peers["left"] = peer
            else:
                peer.close()

    def _hear(self, side: str, peer: _Peer) -> None:
        messages = peer.receive()
        if messages is None:
            self._fail(f"rank {self._names[side]} has died")
        for message in messages or ():
            if "fail" in message:
                self._fail(str(message["fail"]))
            if self._rank > 0:
                self._rounds.append(message["round"])
            elif message["round"] == _CLOSED:
                self._rounds.append(_GO)
            else:
                self._done = True

    def _pass_on(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for number in self._rounds:
            self._peers["right"].send({"round": number})
            self._done = number == _GO and self._rank > 0
        self._rounds.clear()

    def _fail(self, reason: str) -> None:
        told: set[str] = set()
        until = time.monotonic() + _TELL_SECONDS
        while True:
            for side in self._peers.keys() - told:
                self._peers[side].send({"fail": reason})
                told.add(side)
            if len(told) == 2 or self._listener is None or time.monotonic() > until:
                break
            # A neighbour that is about to connect would take this rank for one that hasn't started.
            if "right" not in self._peers:
                self._call()
            if select.select([self._listener], [], [], _POLL_SECONDS)[0]:
                self._answer()
        raise DistributedError(
            f"[rank {self._rank} of {len(self._addresses)}] all ranks must start together, got: {reason}. "
            "Start all of them again, and check hosts and ports."
        )
