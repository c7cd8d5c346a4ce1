"""Memory that passes and conversations need, for as long as they need it. Plain arithmetic: no MLX import."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .budget import ModelMemory

RELEASE_PASSES = 32
"""Number of smaller forward passes after which memory returns to the expert slots; alternating needs stay reserved."""


class Snapshots(Protocol):
    """Copies of states, counted in the memory limit."""

    max_bytes: int

    def clear(self) -> None: ...


@dataclass(frozen=True)
class Room:
    """Memory for states and scratch: those of one pass, and the states of other conversations.

    Attributes:
        batch: Number of sequences in the pass.
        tokens: New tokens per sequence.
        length: Tokens of context at the end of the pass.
        more_bytes: States other than those of the pass.
        nbytes: Total bytes.
    """

    batch: int
    tokens: int
    length: int
    more_bytes: int
    nbytes: int


class _Conversation(NamedTuple):
    cache: "weakref.ref[Any]"
    batch: int
    nbytes: int


class Reservations:
    """Memory taken by live conversations and passes; never less than load promised.

    A conversation is its list of caches. It counts from its first pass until the first cache is garbage-collected, even
    while nothing runs and only its caller holds it. Not thread-safe: callers hold the engine's lock, but a cache may
    be collected at any moment, on any thread.
    """

    def __init__(self, footprint: ModelMemory, batch: int, tokens: int, length: int):
        """Start from load's promise: one pass of this size, and states of this length."""
        self._footprint = footprint
        self._promised = self._room(batch, tokens, length, 0)
        self._promised_states = footprint.state_bytes(batch, length)
        self._conversations: dict[int, _Conversation] = {}  # keyed by the id of the first cache
        self._snapshots: list[weakref.ref[Snapshots]] = []
        self._recent = self._promised  # largest need since the whole of `reserved` was last needed
        self._passes = 0
        self._asked = (batch, length, self._promised_states)
        self.reserved = self._promised

    @property
    def state_bytes(self) -> int:
        """Bytes of all live conversations' states."""
        self._forget_collected()
        return sum(known.nbytes for known in self._conversations.values())

    def least(self) -> Room:
        """Return the room needed while no pass is running."""
        promised = self._promised
        more = max(0, self.state_bytes - self._promised_states)
        return self._room(promised.batch, promised.tokens, promised.length, more)

    def needed(self, batch: int, tokens: int, length: int, caches: Sequence[Any] = ()) -> Room:
        """Return the room that a pass needs, in addition to the states of all other conversations."""
        states = self._footprint.state_bytes(batch, length)
        self._asked = (batch, length, states)
        others = self.state_bytes - self._nbytes(caches)
        scratch = self._footprint.scratch_bytes(batch, tokens, length)
        needed = states + others + scratch
        promised = self._promised
        # Never less than load promised: a large batch now must not make a long prompt fail later.
        if needed <= promised.nbytes:
            return promised
        if states + scratch > promised.nbytes:
            return Room(batch, tokens, length, others, needed)
        return Room(promised.batch, promised.tokens, promised.length, needed - promised.nbytes, needed)

    def together(self, lengths: Sequence[int]) -> list[Room]:
        """Return the rooms that must fit for sequences of these lengths, to run at once, whichever pass comes next.

        Args:
            lengths: Tokens that each will hold in the end.
        """
        promised, batch, longest = self._promised, len(lengths), max(lengths)
        # Shorter sequences are padded to the longest. One's prompt may be read while the others wait.
        scratch = self._footprint.scratch_bytes(batch, 1, longest)
        reading = self._footprint.scratch_bytes(1, min(promised.tokens, longest), longest)
        nbytes = self._footprint.state_bytes(batch, longest) + max(scratch, reading)
        return [
            self._room(batch, 1, longest, max(0, reading - scratch)),
            Room(promised.batch, promised.tokens, promised.length, max(0, nbytes - promised.nbytes), nbytes),
        ]

    def change(self, needed: Room) -> Room | None:
        """Return the room to reserve instead of the current one before a pass, or None to leave it.

        A larger room is reserved at once, a smaller one only after `RELEASE_PASSES` passes that needed less.
        """
        if needed.nbytes > self.reserved.nbytes:
            return needed
        if self.reserved.nbytes == self._promised.nbytes:
            return None
        self._recent = max(self._recent, needed, key=lambda room: room.nbytes)
        self._passes += 1
        if self._passes < RELEASE_PASSES:
            return None
        recent = self._recent
        self._restart()
        return recent if recent.nbytes < self.reserved.nbytes else None

    def reserve(self, room: Room) -> None:
        """Note that the limit has been divided with this room."""
        self.reserved = room
        self._restart()

    def note(self, caches: Sequence[Any], batch: int, length: int) -> None:
        """Count a conversation's states from now on: ``batch`` sequences of ``length`` tokens."""
        if not caches:
            return
        first, key = caches[0], id(caches[0])
        *asked, nbytes = self._asked  # for the same pass: ten microseconds each time
        if asked != [batch, length]:
            nbytes = self._footprint.state_bytes(batch, length)
        known = self._conversations.get(key)
        if known is not None and known.cache() is first:
            # Buffers don't shrink when a cache is cut back, but they do when sequences leave a batch.
            nbytes = max(nbytes, known.nbytes) if known.batch == batch else nbytes
            reference = known.cache
        else:
            reference = weakref.ref(first)
        self._conversations[key] = _Conversation(reference, batch, nbytes)

    def add_snapshots(self, snapshots: Snapshots) -> None:
        """Count ``snapshots.max_bytes`` until they are removed or collected."""
        self._snapshots.append(weakref.ref(snapshots))

    def remove_snapshots(self, snapshots: Snapshots) -> bool:
        """Stop counting these snapshots. Returns whether they were counted."""
        kept = [reference for reference in self._snapshots if reference() is not snapshots]
        removed = len(kept) < len(self._snapshots)
        self._snapshots = kept
        return removed

    def forget_dropped(self) -> bool:
        """Return whether counted snapshots have been garbage-collected since the last call."""
        kept = [reference for reference in self._snapshots if reference() is not None]
        dropped = len(kept) < len(self._snapshots)
        self._snapshots = kept
        return dropped

    @property
    def snapshots(self) -> list[Snapshots]:
        """Snapshots that are counted."""
        return [snapshots for reference in self._snapshots if (snapshots := reference()) is not None]

    def _nbytes(self, caches: Sequence[Any]) -> int:
        known = self._conversations.get(id(caches[0])) if caches else None
        return known.nbytes if known is not None and known.cache() is caches[0] else 0

    def _forget_collected(self) -> None:
        # Looked for, not told by callbacks of the references: an interrupt may end a callback before it has told.
        for key in [key for key, known in self._conversations.items() if known.cache() is None]:
            del self._conversations[key]

    def _restart(self) -> None:
        self._recent, self._passes = self._promised, 0

    def _room(self, batch: int, tokens: int, length: int, more: int) -> Room:
        own = self._footprint.state_bytes(batch, length) + self._footprint.scratch_bytes(batch, tokens, length)
        return Room(batch, tokens, length, more, own + more)
