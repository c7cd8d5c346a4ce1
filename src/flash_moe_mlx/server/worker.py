"""Worker: the single thread that generates, and the bounded queue in front of it.

Requests come from the event loop. Parts of answers return to it through one `asyncio.Queue` per request, so that a slow
client delays nobody else. A second thread parses bodies, and renders and encodes prompts, one at a time: memory holds
one parsed body, however many wait. Between these stages, clients that have left are noticed.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..chat.answer import ThinkingBudget
from ..chat.dialect import dialect_of
from ..chat.ids import CallIds
from ..chat.prompt import chat_prompt
from ..chat.text import token_table
from ..errors import MemoryLimitError
from ..runtime.constraint import Constraint
from ..runtime.generation import GenerationResponse, stream_generate
from ..runtime.prefix_cache import PrefixCache
from ..runtime.prompt_text import PromptTooLongError, check_conversation, check_length
from ..stats import StreamingStats
from .api_error import ApiError
from .metrics import Metrics
from .parts import AnswerParser, AnswerPart, Progress
from .sampling import processors_for, sampler_for, token_logprob
from .schema import GenerationRequest
from .structured import constraint_for

logger = logging.getLogger(__name__)


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
class _Prompt:
    tokens: list[int]
    snapshot_at: list[int] | None
    ids: CallIds
    constraint: Constraint | None


class Generation:
    """One request's generation: an asynchronous iterator over its answer's parts, of which `Finished` is the last.

    If `Finished` does not come, `error` says why.

    Attributes:
        request: The request, without its messages and prompt, once `Worker.start` has read it.
        prompt_tokens: Tokens of its prompt, from then on.
    """

    request: GenerationRequest
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


class Worker:
    """Generates for one request at a time. `close` it when done.

    Attributes:
        metrics: Counters that the worker updates.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_queue: int,
        prefix_cache: int | str | None = "auto",
        prefix_directory: str | None = None,
        prefix_directory_bytes: int | str = "10GB",
        template_arguments: Mapping[str, Any] | None = None,
        kv_cache: Mapping[str, Any] | None = None,
    ):
        """Reserve memory for the prefix cache and start the threads.

        Args:
            model: The model that :func:`flash_moe_mlx.load` returned.
            tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
            max_queue: Maximum number of waiting requests, not counting the running one.
            prefix_cache: Size of the prefix cache. "auto" is three conversations of max_context tokens, but at most a
                quarter of the expert slots' memory; None keeps no cache.
            prefix_directory: Directory in which the prefix cache's states outlive the process; None for none.
            prefix_directory_bytes: Maximum total size of its files.
            template_arguments: Variables of the chat template for requests that don't set them.
            kv_cache: The arguments of :func:`stream_generate` that quantise the KV cache.

        Raises:
            MemoryLimitError: If the memory limit can't spare the requested size.
            RequestError: If the directory can't be used.
        """
        self.metrics = Metrics()
        self._model = model
        self._tokenizer = tokenizer
        self._max_queue = max_queue
        self._template_arguments = dict(template_arguments or {})
        self._kv_cache = dict(kv_cache or {})
        self._prefix_cache = _make_prefix_cache(
            model,
            prefix_cache,
            partial(PrefixCache, directory=prefix_directory, max_directory_bytes=prefix_directory_bytes),
        )
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="flash-moe-prompt")
        self._generations = ThreadPoolExecutor(1, thread_name_prefix="flash-moe-serve")
        self._admitted: set[Generation] = set()
        self._current: Generation | None = None

    @property
    def running(self) -> int:
        """Number of running generations: 0 or 1."""
        return int(self._current is not None)

    @property
    def queued(self) -> int:
        """Number of waiting requests."""
        return max(0, len(self._admitted) - self.running)

    @property
    def stats(self) -> StreamingStats:
        """The engine's statistics."""
        return self._model.streaming.stats()

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of the states in the prefix cache."""
        return 0 if self._prefix_cache is None else self._prefix_cache.nbytes

    def admit(self) -> Generation:
        """Reserve a place in the queue. `start` it next, or `Generation.cancel` it if you stop before its end.

        Raises:
            ApiError: 429 if the queue is full.
        """
        if len(self._admitted) > self._max_queue:
            raise ApiError(429, f"the queue must have room, got {len(self._admitted)} requests. Try again soon.")
        generation = Generation(asyncio.get_running_loop())
        self._admitted.add(generation)
        return generation

    async def start(self, generation: Generation, read: Callable[[], GenerationRequest]) -> None:
        """Read an admitted request, prepare its prompt, and queue it. Iterate over the generation afterwards.

        Args:
            generation: The generation that `admit` returned.
            read: Function that parses the request, called on the prompts' thread unless the client has left.

        Raises:
            ApiError: Errors of ``read``; 400 if the prompt is too long or the chat template refuses it.
            ClientLeft: If it was cancelled in the meantime.
        """
        loop = generation.loop
        try:
            prompt = await loop.run_in_executor(self._prompts, self._prepare, generation, read)
            if generation.cancelled.is_set():
                raise ClientLeft
            generation.prompt_tokens = len(prompt.tokens)
            generation.future = self._generations.submit(self._run, generation, prompt)
        finally:
            if generation.future is None:
                self._admitted.discard(generation)

        def ended(future: Future[Finished | None]) -> None:
            # Free the queue slot first: the client may send its next request immediately.
            loop.call_soon_threadsafe(self._admitted.discard, generation)
            if not future.cancelled() and future.exception() is None:
                generation.put(future.result())
            generation.put(None)

        generation.future.add_done_callback(ended)

    async def count(self, generation: Generation, read: Callable[[], GenerationRequest]) -> int:
        """Return the number of tokens of an admitted request's prompt, and let its place go. Raises as `start`."""
        try:
            prompt = await generation.loop.run_in_executor(self._prompts, self._prepare, generation, read)
        finally:
            self._admitted.discard(generation)
        return len(prompt.tokens)

    async def close(self) -> None:
        """End every generation, wait for the threads, and return the prefix cache's memory."""
        for generation in list(self._admitted):
            generation.cancel()
        # Release each thread's MLX state while the thread lives: at process exit it would be too late.
        cleared = self._generations.submit(mx.clear_streams)
        await asyncio.wrap_future(cleared)
        self._prompts.shutdown()
        self._generations.shutdown()
        if self._prefix_cache is not None:
            self._prefix_cache.close()

    def _prepare(self, generation: Generation, read: Callable[[], GenerationRequest]) -> _Prompt:
        """Parse the request, and render and encode its prompt. Runs on the prompts' thread."""
        _check_wanted(generation)
        request = read()
        # Keep only the tokens: messages may be megabytes each, and the queue may hold many.
        generation.request = replace(request, messages=None if request.messages is None else [], prompt="")
        _check_wanted(generation)
        try:
            tokens, snapshot_at = self._encode(request)
        except PromptTooLongError as error:
            raise self._too_long(request, str(error)) from None
        # Raised by text that is not Unicode (lone surrogates), and by objects nested too deeply for Python.
        except (UnicodeError, RecursionError) as error:
            raise ApiError(400, f"the prompt must be text that can be encoded, got {type(error).__name__}.") from error
        limit = self._model.streaming.max_context
        if not 0 < len(tokens) <= limit:
            raise self._too_long(
                request,
                f"the prompt must have 1 to {limit} tokens, got {len(tokens)}. Shorten it, or serve with a larger "
                "--max-context.",
            )
        ids = CallIds() if request.messages is None else CallIds.for_conversation(self._tokenizer, request.messages)
        _check_wanted(generation)
        constraint = constraint_for(
            self._tokenizer,
            tokens,
            self._model.vocabulary_size,
            grammar=request.grammar,
            tools=request.tools,
            call_required=request.call_required,
        )
        return _Prompt(tokens, snapshot_at, ids, constraint)

    def _too_long(self, request: GenerationRequest, message: str) -> ApiError:
        param = "prompt" if request.messages is None else "messages"
        return ApiError(400, message, param=param, code="context_length_exceeded")

    def _encode(self, request: GenerationRequest) -> tuple[list[int], list[int] | None]:
        tokenizer, limit = self._tokenizer, self._model.streaming.max_context
        if request.messages is None:
            if not isinstance(request.prompt, str):
                return request.prompt, None
            check_length(tokenizer, request.prompt, limit)
            begun = tokenizer.bos_token is not None and request.prompt.startswith(tokenizer.bos_token)
            return tokenizer.encode(request.prompt, add_special_tokens=not begun), None
        if not tokenizer.has_chat_template:
            raise ApiError(400, "this model must have a chat template, got none. Use /v1/completions.")
        check_conversation(tokenizer, request.messages, request.tools, limit)
        arguments = {**self._template_arguments, **request.template_arguments, "max_context": limit}
        if request.tools is not None:
            arguments["tools"] = request.tools
        if not request.call_required:
            return chat_prompt(tokenizer, request.messages, **arguments)
        dialect = dialect_of(tokenizer)
        if not dialect.has_calls:
            raise ApiError(400, "tool_choice must be auto or none: this model's chat template has no tools.")
        tokens, points = chat_prompt(tokenizer, request.messages, **arguments | {"enable_thinking": False})
        return [*tokens, *tokenizer.encode(dialect.call_beginning, add_special_tokens=False)], points

    def _run(self, generation: Generation, prompt: _Prompt) -> Finished | None:
        """Generate an answer. Runs on the worker's thread."""
        self._current = generation
        try:
            with self._model.streaming.cancellable(generation.cancelled):
                return self._generate(generation, prompt)
        finally:
            self._current = None

    def _generate(self, generation: Generation, prompt: _Prompt) -> Finished | None:
        request, tokenizer = generation.request, self._tokenizer
        parser = AnswerParser(tokenizer, prompt.tokens, request, prompt.ids)
        table = token_table(tokenizer)
        limit = self._model.streaming.max_context
        responses = stream_generate(
            self._model,
            tokenizer,
            prompt.tokens,
            -1 if request.max_tokens is None else request.max_tokens,
            sampler=sampler_for(request.sampling, len(tokenizer)),
            logits_processors=[
                *processors_for(request.sampling, len(prompt.tokens), limit),
                *_budget(tokenizer, prompt.tokens, request.thinking_budget),
                *([] if prompt.constraint is None else [prompt.constraint]),
            ],
            prompt_progress_callback=_reporter(generation) if request.progress else None,
            prefix_cache=self._prefix_cache,
            snapshot_at=prompt.snapshot_at,
            progress=False,
            **self._kv_cache,
        )
        with closing(responses):
            for response in self._counted(responses, generation):
                logprob = None
                pieces = parser.read(response.token, response.finish_reason)
                if request.top_logprobs is not None and response.token not in tokenizer.eos_token_ids:
                    logprob = token_logprob(response, parser.text, table, request.top_logprobs)
                for part in parser.feed(pieces, logprob, last=response.finish_reason is not None):
                    generation.put(part)
                if response.finish_reason or parser.stopped:
                    break
                if generation.cancelled.is_set():
                    return None
        cut = response.finish_reason == "length" and not parser.stopped
        reason = "length" if cut else "tool_calls" if parser.calls else "stop"
        usage = response.prompt_tokens, response.generation_tokens, response.cached_tokens
        return Finished(reason, *usage, stop=parser.stop)

    def _counted(self, responses: Iterator[GenerationResponse], generation: Generation) -> Iterator[GenerationResponse]:
        last = None
        for response in responses:
            now = time.perf_counter()
            if last is None:
                self.metrics.first_token(response, generation.arrived)
            self.metrics.token(response, 0.0 if last is None else now - last)
            last = now
            yield response


def _budget(tokenizer: Any, prompt: list[int], tokens: int | None) -> list[ThinkingBudget]:
    return [] if tokens is None else [ThinkingBudget(tokenizer, prompt, tokens)]


def _reporter(generation: Generation) -> Callable[[int, int], None]:
    """Return what passes on how much of the prompt was read; what was read at the first call, the prefix cache had."""
    began, first = time.perf_counter(), [-1]

    def report(processed: int, total: int) -> None:
        if first[0] < 0:
            first[0] = processed
        generation.put(Progress(total, processed, first[0], time.perf_counter() - began))

    return report


def _check_wanted(generation: Generation) -> None:
    if generation.cancelled.is_set():
        raise ClientLeft


def _make_prefix_cache(
    model: Any, size: int | str | None, make: Callable[[Any, int | str], PrefixCache]
) -> PrefixCache | None:
    if size is None:
        return None
    if size != "auto":
        return make(model, size)
    engine = model.streaming
    slot_bytes = engine.stats().slot_bytes
    for nbytes in (3 * engine.state_bytes, max(1, slot_bytes // 4)):
        try:
            cache = make(model, nbytes)
        except MemoryLimitError:
            continue
        if nbytes <= slot_bytes // 4 or engine.stats().slot_bytes >= slot_bytes * 3 // 4:
            return cache
        cache.close()
    logger.warning("no prefix cache: the memory limit has no room for one, so that every prompt is read in full")
    return None
