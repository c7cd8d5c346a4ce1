"""Generation: one request on its way through the server, from its place in the queue to the last part of its answer."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

from ..chat.ids import CallIds
from ..runtime.constraint import Constraint
from .parts import AnswerPart
from .schema import GenerationRequest


@dataclass(frozen=True)
class Finished:
    """The end of an answer, with its usage.

    Attributes:
        reason: "stop", "length" or "tool_calls".
        stop: The stop string that ended it, if one did.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    stop: str | None = None


class ClientLeft(Exception):
    """The client left before its answer began."""


@dataclass(frozen=True)
class Prompt:
    """A request's prompt as tokens, and what was prepared with it.

    Attributes:
        tokens: The tokens.
        snapshot_at: Points worth keeping in the prefix cache; None is the end.
        ids: Ids for the answer's tool calls.
        constraint: Keeps the answer to a grammar.
    """

    tokens: list[int]
    snapshot_at: list[int] | None
    ids: CallIds
    constraint: Constraint | None


class Generation:
    """One request's generation: an asynchronous iterator over its answer's parts, of which `Finished` is the last.

    If `Finished` does not come, `error` says why.

    Attributes:
        request: The request, without its messages and prompt, once `Worker.start` has read it.
        streams: Whether its answer is a stream, from then on.
        prompt_tokens: Tokens of its prompt, from then on.
    """

    request: GenerationRequest
    streams = False
    prompt_tokens = 0

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.arrived = time.perf_counter()
        self.cancelled = threading.Event()
        self.future: Future[Finished | None] | None = None
        self.loop = loop
        self._parts: asyncio.Queue[AnswerPart | Finished | None] = asyncio.Queue()

    def put(self, part: AnswerPart | Finished | None) -> None:
        """Pass on a part, or None at the end, from any thread."""
        self.loop.call_soon_threadsafe(self._parts.put_nowait, part)

    def cancel(self) -> None:
        """End the generation: immediately if it waits, else before the next layer's reads. Later calls do nothing."""
        self.cancelled.set()
        if self.future is not None:
            self.future.cancel()

    async def __aiter__(self) -> AsyncIterator[AnswerPart | Finished]:
        while (part := await self._parts.get()) is not None:
            yield part

    def error(self) -> BaseException | None:
        """Return the error that ended it early; `CancelledError` if it was cancelled. Call this at the end."""
        if self.future is None or self.cancelled.is_set():
            return CancelledError()
        return self.future.exception()
