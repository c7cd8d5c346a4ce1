"""Concurrency: several requests answered at once by one thread, in one batch of generations."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from ..runtime.batching import Batch, Caught, Member, Outcome
from ..runtime.generation import Answer
from .delivery import Delivery
from .generation import Finished, Generation, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    generation: Generation
    prompt: Prompt
    future: Future[Finished | None]


@dataclass(frozen=True)
class _Running:
    generation: Generation
    delivery: Delivery
    future: Future[Finished | None]
    length: int  # tokens that its states will hold in the end


class Concurrency:
    """Answers up to a number of requests at once, in order of arrival, as a task of an executor of one thread.

    A request begins once its states and those of all that run, at their full length, fit into the memory limit.
    """

    def __init__(
        self,
        model: Any,
        max_concurrent: int,
        executor: Executor,
        begin: Callable[[Generation, Prompt], tuple[Answer, Delivery]],
    ):
        """Start without requests.

        Args:
            model: The model that :func:`flash_moe_mlx.load` returned.
            max_concurrent: Maximum number of requests to answer at once.
            executor: Executor of one thread.
            begin: Function that begins an answer, called on that thread.
        """
        self._model = model
        self._engine = model.streaming
        self._max_concurrent = max_concurrent
        self._executor = executor
        self._begin = begin
        self._batch = Batch(model)
        self._lock = threading.Lock()  # of what waits, and of whether the task runs
        self._waiting: deque[_Waiting] = deque()
        self._busy = False
        self._running: dict[Member, _Running] = {}

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""
        return len(self._running)

    def submit(self, generation: Generation, prompt: Prompt) -> Future[Finished | None]:
        """Queue a request. Cancel the future, or the generation, to take it back."""
        future: Future[Finished | None] = Future()
        with self._lock:
            self._waiting.append(_Waiting(generation, prompt, future))
            begin, self._busy = not self._busy, True
        if begin:
            self._executor.submit(self._run)
        return future

    def _run(self) -> None:
        """Answer requests until none is left. A fault in here ends all of them, so that no client waits for ever."""
        caught = Caught()
        with caught:
            self._answer()
        if caught.error is not None:
            logger.error("answering several requests failed", exc_info=caught.error)
            ended, self._running = self._running, {}
            self._batch = Batch(self._model)  # the old one's caches may be half merged
            for running in ended.values():
                running.future.set_exception(caught.error)
            with self._lock:
                self._busy = bool(self._waiting)
            if self._busy:
                self._executor.submit(self._run)

    def _answer(self) -> None:
        while True:
            with self._lock:
                if not self._waiting and not self._running:
                    self._busy = False
                    return
            self._admit()
            for outcome in self._batch.step():
                self._deliver(outcome)
            for member, running in list(self._running.items()):
                if running.generation.cancelled.is_set():
                    self._end(member)

    def _admit(self) -> None:
        """Begin waiting requests, the first first, as long as there is room for all that run."""
        while self._waiting and len(self._running) < self._max_concurrent:
            waiting = self._waiting[0]
            length = self._length(waiting)
            lengths = [*(running.length for running in self._running.values()), length]
            wanted = not (waiting.future.cancelled() or waiting.generation.cancelled.is_set())
            # A lone request always begins: load has promised its memory.
            if wanted and self._running and not self._engine.has_room(lengths):
                return
            self._waiting.popleft()
            if waiting.future.set_running_or_notify_cancel():
                self._start(waiting, length, wanted=wanted)

    def _start(self, waiting: _Waiting, length: int, *, wanted: bool) -> None:
        if not wanted:
            waiting.future.set_result(None)
            return
        caught = Caught()
        with caught:
            answer, delivery = self._begin(waiting.generation, waiting.prompt)
        if caught.error is not None:
            waiting.future.set_exception(caught.error)
            return
        member = self._batch.add(answer, waiting.generation.cancelled)
        self._running[member] = _Running(waiting.generation, delivery, waiting.future, length)

    def _length(self, waiting: _Waiting) -> int:
        limit, wanted = self._engine.max_context, waiting.generation.request.max_tokens
        prompt = len(waiting.prompt.tokens)
        return int(limit if wanted is None or wanted < 0 else min(limit, prompt + wanted))

    def _deliver(self, outcome: Outcome) -> None:
        running, finished, caught = self._running[outcome.member], None, Caught()
        with caught:
            finished = None if outcome.response is None else running.delivery.take(outcome.response)
        if finished is not None:
            self._end(outcome.member, finished)
        elif (error := caught.error or outcome.error) is not None:
            self._end(outcome.member, error=error)

    def _end(self, member: Member, finished: Finished | None = None, error: Exception | None = None) -> None:
        running = self._running.pop(member)
        self._batch.remove(member)
        if error is None:
            running.future.set_result(finished)
        else:
            running.future.set_exception(error)
