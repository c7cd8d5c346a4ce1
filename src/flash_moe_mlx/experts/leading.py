"""Leader: rank 0 of a group whose other ranks repeat its operations instead of running the same program."""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import RLock
from typing import Any

from ..errors import RequestError
from .ranks import END, RankGroup


class Leader:
    """Announces each operation of rank 0 on model, caches and memory, so that the other ranks carry it out too.

    Attributes:
        ranks: The group.
    """

    def __init__(self, ranks: RankGroup, lock: RLock):  # type: ignore[valid-type]
        """Begin to lead. The lock is the engine's: it keeps announcements and passes in one order."""
        self.ranks = ranks
        self._lock: Any = lock
        self._numbers = count(1)
        self._dropped: deque[int] = deque()
        self._announced = 0
        ranks.is_led = True
        self._send("lead")

    def number(self, owner: object) -> int:
        """Return a new number for an object that followers have a copy of; the copy is dropped once ``owner`` is."""
        number = next(self._numbers)
        weakref.finalize(owner, self._dropped.append, number).atexit = False
        return number

    @contextmanager
    def announced(self, op: str, **fields: Any) -> Iterator[None]:
        """Let followers begin an operation, and carry it out on this rank within the context.

        Args:
            op: Name of the operation.
            **fields: Further values that followers need; JSON.

        Raises:
            DistributedError: If the group has failed.
        """
        with self._lock:
            if not self._announced:
                self._send(op, **fields)
            self._announced += 1
            try:
                yield
            finally:
                self._announced -= 1

    def check_announced(self) -> None:
        """Check that followers know of the pass that is about to begin.

        Raises:
            RequestError: If they don't.
        """
        if not self._announced:
            raise RequestError(
                "[model] must be run by generate or stream_generate if rank 0 leads the others, got a call. "
                "Run the same program on every rank to call the model itself."
            )

    def end(self) -> None:
        """Let followers leave."""
        self.ranks.is_led = False
        if not self.ranks.failed:
            self._send(END)

    def _send(self, op: str, **fields: Any) -> None:
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        self.ranks.command({"op": op, "dropped": dropped, **fields})
