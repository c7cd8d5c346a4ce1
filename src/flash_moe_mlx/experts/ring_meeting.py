"""Meeting of a ring's ranks before MLX connects them, so that a rank that dies meanwhile ends the others at once.

MLX connects a ring with Python's lock held: it waits for the left neighbour without a limit, and tries to reach the
right one for 31 seconds, which no signal shortens. Therefore the ranks first connect to each other at the same
addresses. Rank 0 sends "here" around the ring, and each rank passes it on once it has both neighbours. When it is back,
"go" travels in both directions, and each rank leaves. A rank whose connection ends before "go" has died: "fail" then
travels in both directions.

A rank that has called its right neighbour never gives up before the meeting ends, so that it can't be taken for dead.
"""

import json
import os
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..errors import DistributedError

Addresses = Sequence[tuple[str, int]]

_POLL_SECONDS = 0.1
_LONGEST_LINE = 1 << 16
_CALL_SECONDS = 1.0  # for one attempt to connect
_TELL_SECONDS = 2.0
"""Seconds in which a rank that gives up still tells neighbours that arrive: they would take it for one that is late."""

_LAST_RANK_SECONDS = 0.02
"""MLX's last rank connects first, and waits a second if rank 0 isn't listening by then."""


def meet_on_ring(seconds: float) -> bool:
    """Wait until all ranks are here, if this process is to be part of MLX's ring.

    Args:
        seconds: Seconds that all ranks have to come.

    Returns:
        Whether this process is part of a ring.

    Raises:
        DistributedError: If a rank dies or doesn't come.
    """
    if (found := _own_place()) is None:
        return False
    Meeting(*found, seconds).run()
    return True


def _own_place() -> tuple[int, Addresses] | None:
    """Return this process's rank and all addresses, or None if MLX has no ring to connect."""
    hostfile, rank = os.environ.get("MLX_HOSTFILE", ""), os.environ.get("MLX_RANK", "")
    try:
        with open(hostfile) as file:
            hosts = [str(addresses[0]).rpartition(":") for addresses in json.load(file)]
        addresses = [(host, int(port)) for host, _, port in hosts]
        own = int(rank)
    except (OSError, ValueError, LookupError, TypeError):
        return None  # MLX says what is wrong with them, if they are there
    return (own, addresses) if 0 <= own < len(addresses) and len(addresses) > 1 else None


class _Line:
    """A connection over which messages travel: lines of JSON, each a list of a word and a value."""

    def __init__(self, end: socket.socket):
        end.setblocking(False)
        self._end = end
        self._text = b""

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, word: str, value: Any = None) -> None:
        with suppress(OSError):  # the one at the other end is gone, which the next receive says
            self._end.sendall(json.dumps([word, value]).encode() + b"\n")

    def receive(self) -> list[tuple[str, Any]]:
        """Return messages that have arrived, perhaps none yet.

        Raises:
            OSError, ValueError: If the connection has ended, or carries something else.
        """
        if not (data := self._end.recv(4096)):
            raise ConnectionError
        if len(self._text) > _LONGEST_LINE:
            raise ValueError
        *lines, self._text = (self._text + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        return [(str(word), value) for word, value in messages]

    def close(self) -> None:
        self._end.close()


class Meeting:
    """One rank's part of a meeting."""

    def __init__(self, rank: int, addresses: Addresses, seconds: float):
        """Listen at the rank's address.

        Args:
            rank: This process's number.
            addresses: Host and port of each rank, in the order of the ring.
            seconds: Seconds that all ranks have to come.

        Raises:
            DistributedError: If the address can't be used.
        """
        self._rank, self._addresses, self._seconds = rank, addresses, seconds
        self._neighbours = {side: (rank + step) % len(addresses) for side, step in (("left", -1), ("right", 1))}
        self._lines: dict[str, _Line] = {}  # to neighbours that have said who they are
        self._callers: set[_Line] = set()  # that haven't said yet
        self._called: _Line | None = None  # the right neighbour, or another program at its address
        self._call_at = 0.0
        self._is_here = rank == 0  # whether all ranks to the left are
        self._is_over = False
        self._reason = ""
        try:
            self._listener: socket.socket | None = socket.create_server(addresses[rank], backlog=len(addresses))
        except OSError as error:
            host, port = addresses[rank]
            raise DistributedError(
                f"[rank {rank} of {len(addresses)}] its address must be free and this machine's, got {error} for "
                f"{host}:{port}. Check hosts and ports."
            ) from error

    def run(self) -> None:
        """Meet the others. The address is free afterwards.

        Raises:
            DistributedError: If a rank dies or doesn't come.
        """
        deadline = time.monotonic() + self._seconds
        try:
            while not self._is_over and not self._reason:
                self._step()
                if time.monotonic() > deadline:
                    late = [rank for side, rank in self._neighbours.items() if side not in self._lines]
                    who = f"rank {late[0]}" if late else "a rank"
                    self._reason = f"{who} has not started within {self._seconds:g} s"
            if self._reason:
                self._fail()
            if self._rank == len(self._addresses) - 1:
                time.sleep(_LAST_RANK_SECONDS)
        finally:
            for end in (self._listener, self._called, *self._callers, *self._lines.values()):
                if end is not None:
                    end.close()

    def _step(self) -> None:
        """Wait a moment for something to arrive, and take it. A rank that has failed only looks for its neighbours."""
        if "right" not in self._lines and self._called is None and time.monotonic() >= self._call_at:
            self._call()
        known = [] if self._reason else list(self._lines.values())
        ends: list[Any] = [end for end in (self._listener, self._called, *self._callers, *known) if end is not None]
        for end in select.select(ends, [], [], _POLL_SECONDS)[0]:
            if isinstance(end, _Line):
                self._hear(end)
            else:
                with suppress(OSError):  # the caller has left
                    self._callers.add(_Line(end.accept()[0]))
        if self._is_here and len(self._lines) == 2 and self._listener is not None and not self._reason:
            self._listener.close()  # so that MLX can listen there once "here" is back
            self._listener = None
            self._lines["right"].send("here")

    def _call(self) -> None:
        self._call_at = time.monotonic() + _POLL_SECONDS
        with suppress(OSError):
            end = socket.create_connection(self._addresses[self._neighbours["right"]], timeout=_CALL_SECONDS)
            self._called = _Line(end)
            self._called.send("rank", self._rank)

    def _hear(self, line: _Line) -> None:
        try:
            for word, value in line.receive():
                self._take(line, word, value)
        except (OSError, ValueError, TypeError):
            line.close()
            ended = [rank for side, rank in self._neighbours.items() if self._lines.get(side) is line]
            if line is self._called:
                self._called = None  # it wasn't the neighbour, or not yet: call again
            elif not ended:
                self._callers.discard(line)
            elif not self._is_over:
                self._reason = self._reason or f"rank {ended[0]} has died"

    def _take(self, line: _Line, word: str, value: Any) -> None:
        if line is self._called or line in self._callers:
            side = "right" if line is self._called else "left"
            if [word, value] != ["rank", self._neighbours[side]] or side in self._lines:
                raise ValueError("another program, or another ring's rank")
            self._lines[side] = line
            self._callers.discard(line)
            if side == "left":
                line.send("rank", self._rank)
            else:
                self._called = None
        elif word == "fail":
            self._reason = self._reason or str(value)
        elif word == "here" and self._rank > 0:
            self._is_here = True
        elif word in ("go", "here"):
            self._is_over = True
            for neighbour in self._lines.values():
                neighbour.send("go")
        else:
            raise ValueError(f"no such message: {word}")

    def _fail(self) -> None:
        """Tell the neighbours, also those that are about to arrive, and raise the reason."""
        told: set[str] = set()
        until = time.monotonic() + _TELL_SECONDS
        while True:
            for side in self._lines.keys() - told:
                self._lines[side].send("fail", self._reason)
                told.add(side)
            if len(told) == 2 or time.monotonic() > until:
                break
            self._step()
        raise DistributedError(
            f"[rank {self._rank} of {len(self._addresses)}] all ranks must start together, got: {self._reason}. "
            "Start all of them again, and check hosts and ports."
        )
