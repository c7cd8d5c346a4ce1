"""Worker: the thread that generates, and the bounded queue in front of it.

Requests come from the event loop. Parts of answers return to it through one `asyncio.Queue` per request, so that a slow
client delays nobody else. A second thread parses bodies, and renders and encodes prompts, one at a time: memory holds
one parsed body, however many wait. Between these stages, clients that have left are noticed.
"""

import asyncio
import logging
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..chat.dialect import dialect_of
from ..chat.ids import CallIds
from ..chat.prompt import chat_prompt
from ..errors import DistributedError, MemoryLimitError, RequestError
from ..runtime.generation import Answer, begin_answer, stream_generate
from ..runtime.prefix_cache import PrefixCache
from ..runtime.prompt_text import PromptTooLongError, check_conversation, check_length
from ..stats import StreamingStats
from .api_error import ApiError
from .concurrency import Concurrency
from .delivery import Delivery
from .generation import ClientLeft, Finished, Generation, Prompt
from .metrics import Metrics
from .sampling import sampler_for
from .schema import GenerationRequest
from .structured import constraint_for

logger = logging.getLogger(__name__)


class Worker:
    """Generates for one request at a time, or for several. `close` it when done.

    Attributes:
        metrics: Counters that the worker updates.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_queue: int,
        max_concurrent: int = 1,
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
            max_queue: Maximum number of waiting requests, not counting the running ones.
            max_concurrent: Maximum number of requests to answer at once.
            prefix_cache: Size of the prefix cache. "auto" is three conversations of max_context tokens, but at most a
                quarter of the expert slots' memory; None keeps no cache.
            prefix_directory: Directory in which the prefix cache's states outlive the process; None for none.
            prefix_directory_bytes: Maximum total size of its files.
            template_arguments: Variables of the chat template for requests that don't set them.
            kv_cache: The arguments of :func:`stream_generate` that quantise the KV cache.

        Raises:
            MemoryLimitError: If the memory limit can't spare the requested size.
            RequestError: If the directory can't be used, or ranks would have to answer several requests at once.
        """
        if max_concurrent > 1 and model.streaming.ranks > 1:
            raise RequestError(
                f"[max_concurrent] must be 1 where ranks share the experts, got {max_concurrent}. Leave it out."
            )
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
        self._max_concurrent = max_concurrent
        self._concurrency: Concurrency | None = None
        if max_concurrent > 1:
            self._concurrency = Concurrency(model, max_concurrent, self._generations, self._begin)

    @property
    def running(self) -> int:
        """Number of running generations."""
        return int(self._current is not None) if self._concurrency is None else self._concurrency.running

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
        if len(self._admitted) >= self._max_queue + self._max_concurrent:
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
            if self._concurrency is None:
                generation.future = self._generations.submit(self._run, generation, prompt)
            else:
                generation.future = self._concurrency.submit(generation, prompt)
        finally:
            if generation.future is None:
                self._admitted.discard(generation)

        def ended(future: Future[Finished | None]) -> None:
            # Free the queue slot first: the client may send its next request immediately.
            loop.call_soon_threadsafe(self._admitted.discard, generation)
            _forget_variables(None if future.cancelled() else future.exception(), generation.cancelled.is_set())
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
            with suppress(DistributedError):  # the ranks' reason is not the shutdown's: whoever serves asks for it
                self._prefix_cache.close()

    def _prepare(self, generation: Generation, read: Callable[[], GenerationRequest]) -> Prompt:
        """Parse the request, and render and encode its prompt. Runs on the prompts' thread."""
        _check_wanted(generation)
        request = read()
        # Keep only the tokens: messages may be megabytes each, and the queue may hold many.
        generation.request = replace(request, messages=None if request.messages is None else [], prompt="")
        generation.streams = request.stream
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
        return Prompt(tokens, snapshot_at, ids, constraint)

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

    def _run(self, generation: Generation, prompt: Prompt) -> Finished | None:
        """Generate an answer. Runs on the worker's thread."""
        self._current = generation
        try:
            with self._model.streaming.cancellable(generation.cancelled):
                return self._generate(generation, prompt)
        finally:
            self._current = None

    def _generate(self, generation: Generation, prompt: Prompt) -> Finished | None:
        delivery = Delivery(self._tokenizer, generation, prompt, self.metrics)
        with closing(
            stream_generate(*self._arguments(prompt), progress=False, **self._options(generation, delivery))
        ) as responses:
            for response in responses:
                if (finished := delivery.take(response)) is not None:
                    return finished
                if generation.cancelled.is_set():
                    return None
        return None

    def _begin(self, generation: Generation, prompt: Prompt) -> tuple[Answer, Delivery]:
        """Begin an answer that others may run beside."""
        delivery = Delivery(self._tokenizer, generation, prompt, self.metrics)
        return begin_answer(*self._arguments(prompt), **self._options(generation, delivery)), delivery

    def _arguments(self, prompt: Prompt) -> tuple[Any, Any, list[int]]:
        return self._model, self._tokenizer, prompt.tokens

    def _options(self, generation: Generation, delivery: Delivery) -> dict[str, Any]:
        return {
            "sampler": sampler_for(generation.request.sampling, len(self._tokenizer)),
            **delivery.options(self._model.streaming.max_context),
            "prefix_cache": self._prefix_cache,
            **self._kv_cache,
        }


def _forget_variables(error: BaseException | None, nobody_asks: bool) -> None:
    """Let go of what an error's frames hold: arrays of the answer, and the generation, whose future holds the error.

    Otherwise they would stay in memory until Python next looks for cycles, uncounted.

    Args:
        error: The error.
        nobody_asks: Whether to drop the traceback too: its frames know their callers, and what these hold.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        if nobody_asks:
            error.__traceback__ = None
        error = error.__cause__ or error.__context__


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
