"""Batch: several generations at once. Decode steps of all of them, and one prompt's chunk at a time in between.

mlx_lm's caches of batches are used, but not its BatchGenerator: that computes one token ahead, turns a lone sequence's
caches into a batch's, which CPU programs of single tokens can't read, and loses all sequences when one fails.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import mlx.core as mx

from ..experts.thread_streams import borrow_stream
from .generation import Answer, GenerationResponse
from .merged_caches import MergedCaches
from .pace import Pace

TURN_SECONDS = 10.0
"""Longest turn of an answer, where answers decode in turn and experts have to be read.

Answers that use different experts take them from each other: two of them that alternate token by token read 1.5 to 1.6
times what they read one after the other, and in turns of 64 tokens 1.2 to 1.3 times (experiment 132).
"""

WAITING_SHARE = 0.05
"""Share of a token's time that has to be spent waiting for reads for the turn to last: else it is one token."""


class Caught(AbstractContextManager[None]):
    """Context that keeps the error of one answer, whatever it is, so that the others continue.

    Attributes:
        error: The error, if there was one.
    """

    error: Exception | None = None

    def __enter__(self) -> None:
        self.error = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


@dataclass(eq=False)
class Member:
    """One answer of a batch.

    Attributes:
        answer: The generation.
        cancelled: Ends the answer's own passes early once it is set.
    """

    answer: Answer
    cancelled: threading.Event = field(default_factory=threading.Event)
    random_state: int | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a pass for one answer: its next token, or the error that ended it."""

    member: Member
    response: GenerationResponse | None = None
    error: Exception | None = None


class Batch:
    """Answers generated at once, on one thread. Call :meth:`step` as long as there are any."""

    def __init__(self, model: Any, *, together: bool | None = None):
        """Start without answers.

        Args:
            model: The model that :func:`flash_moe_mlx.load` returned.
            together: Whether decode steps run in one pass for all answers; None chooses the quicker way.
        """
        self._model = model
        self._together = together
        self._pace = Pace()
        self._members: list[Member] = []
        self._merged = MergedCaches(model)
        self._drawing: Member | None = None  # whose random numbers MLX's generator holds
        self._owed = 0.0  # seconds of decoding until the next chunk of a prompt
        self._turn: Member | None = None  # whose turn has begun
        self._turn_seconds = 0.0

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._members)

    def add(self, answer: Answer, cancelled: threading.Event | None = None) -> Member:
        """Add an answer; the event ends its own passes early."""
        member = Member(answer, threading.Event() if cancelled is None else cancelled)
        self._members.append(member)
        return member

    def remove(self, member: Member) -> None:
        """End an answer. The others don't notice. Does nothing if it has ended."""
        if member not in self._members:
            return
        self._members.remove(member)
        self._drawing = None if self._drawing is member else self._drawing
        self._turn = None if self._turn is member else self._turn
        member.answer.passes.close()
        self._merged.leave([member.answer.steps], for_good=True)
        member.answer.steps.take_back([])  # frees its states now, whoever holds the answer

    def step(self) -> list[Outcome]:
        """Run a decode step of every answer that has begun, or of the one whose turn it is, or a chunk of a prompt.

        While answers and prompts wait for each other, both get the same time.

        Returns:
            The tokens that were generated, and the errors. Answers that have ended are no longer in the batch.
        """
        if not self._members:
            return []
        borrow_stream()
        deciding = [member for member in self._members if not member.answer.steps.reading]
        prompts = [member for member in self._members if member.answer.steps.reading]
        started = time.perf_counter()
        if prompts and (self._owed <= 0 or not deciding):
            outcomes = self._advance(prompts[0])
            self._put_last(prompts[0])  # another prompt's chunk is next
            self._owed = time.perf_counter() - started
        else:
            outcomes = self._decode(deciding)
            self._owed = max(0.0, self._owed - (time.perf_counter() - started)) if prompts else 0.0
        return outcomes

    def _decode(self, members: Sequence[Member]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        mergeable = [m for m in members if m.answer.steps.due is not None and self._mergeable(m)]
        size = len(mergeable)
        together = size > 1 and self._choose(size)
        counters, started = self._model.streaming.counters, time.perf_counter()
        waited = counters.read_seconds
        changed = self._gather(mergeable if together else [])
        # The turn of a token that was begun before others came is first: only then can its answer share passes.
        first = next((member for member in members if member.answer.steps.due is None), members[0])
        outcomes += self._decode_together(mergeable) if together else self._advance(first)
        seconds, waited = time.perf_counter() - started, counters.read_seconds - waited
        if size > 1 and not any(outcome.error for outcome in outcomes):
            self._pace.took(size, together, seconds, changed)
        if not together:
            self._end_turn(first, seconds, waited)
        for member in members if together else []:
            if member not in mergeable:
                outcomes += self._advance(member)
        return outcomes

    def _end_turn(self, member: Member, seconds: float, waited: float) -> None:
        """Let the next answer have its turn, if this one's is over."""
        if self._turn is not member:
            self._turn, self._turn_seconds = member, 0.0
        self._turn_seconds += seconds
        if member not in self._members:
            self._turn = None
        elif waited < WAITING_SHARE * seconds or self._turn_seconds >= TURN_SECONDS:
            self._turn = None
            self._put_last(member)

    def _put_last(self, member: Member) -> None:
        if member in self._members:
            self._members.remove(member)
            self._members.append(member)

    def _mergeable(self, member: Member) -> bool:
        steps = member.answer.steps
        return any(steps is other for other in self._merged.sequences) or steps.mergeable

    def _choose(self, size: int) -> bool:
        if self._together is not None:
            return self._together
        # Without programs of single tokens, one pass is never slower.
        return not getattr(self._model, "decodes_singly", False) or self._pace.together(size)

    def _gather(self, wanted: Sequence[Member]) -> bool:
        """Merge the caches of these answers and of no others. Returns whether anything had to be done."""
        steps = [member.answer.steps for member in wanted]
        leaving = [known for known in self._merged.sequences if known not in steps]
        joining = [new for new in steps if new not in self._merged.sequences]
        if leaving:
            self._merged.leave(leaving)
        if joining:
            self._merged.join(joining)
        return bool(leaving or joining)

    def _decode_together(self, members: Sequence[Member]) -> list[Outcome]:
        rows = {id(steps): row for row, steps in enumerate(self._merged.sequences)}
        ordered = sorted(members, key=lambda member: rows[id(member.answer.steps)])
        caught = Caught()
        cancelled = _AllSet([member.cancelled for member in ordered])
        with caught, self._model.streaming.cancellable(cancelled):
            fed = mx.stack([member.answer.steps.due for member in ordered])
            logits = self._model(fed, cache=self._merged.caches, logits_to_keep=1)[:, -1, :]
            mx.eval(logits, [cache.state for cache in self._merged.caches])
        if caught.error is not None:  # the caches may hold half a step
            self._merged.leave(self._merged.sequences, for_good=True)
            for member in ordered:
                self.remove(member)
            return [Outcome(member, error=caught.error) for member in ordered]
        outcomes = []
        for row, member in enumerate(ordered):
            member.answer.steps.expect(logits[row : row + 1])
            outcomes += self._advance(member)
        return outcomes

    def _advance(self, member: Member) -> list[Outcome]:
        """Run one answer's next pass."""
        answer, response, caught = member.answer, None, Caught()
        answer.steps.alone = len(self._members) == 1
        with caught, self._drawn_by(member), self._model.streaming.cancellable(member.cancelled):
            response = next(answer.passes)
            if response is not None and response.finish_reason is None:
                next(answer.passes)  # up to the next pass
        if caught.error is not None or (response is not None and response.finish_reason is not None):
            self.remove(member)
        if response is None and caught.error is None:
            return []
        return [Outcome(member, response, caught.error)]

    @contextmanager
    def _drawn_by(self, member: Member) -> Iterator[None]:
        """Give the answer its own random numbers: MLX's generator belongs to the thread."""
        if self._drawing is not member:
            if self._drawing is not None:
                self._drawing.random_state = _random_state()
            if member.random_state is not None:
                mx.random.seed(member.random_state)
            self._drawing = member
        yield


def _random_state() -> int:
    """Return the state of MLX's generator as the seed that sets it: a seed is the state's two words."""
    high, low = mx.random.state[0].tolist()
    return int(high) << 32 | int(low)


class _AllSet(threading.Event):
    """An event that is set once all others are."""

    def __init__(self, events: Sequence[threading.Event]):
        super().__init__()
        self._events = events

    def is_set(self) -> bool:
        return all(event.is_set() for event in self._events)
