"""The Starlette application: routes, their guards, and complete or streamed answers."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..errors import FlashMoEError
from . import anthropic_format, metrics, responses_request
from .answer_format import AnswerFormat
from .anthropic_format import MessagesFormat
from .anthropic_request import parse_messages
from .api_error import ApiError, failed_generation
from .body import BodyBudget, parse_body, read_body
from .config import ServerConfig
from .generation import ClientLeft, Finished, Generation
from .guard import Guard, headers, refusal
from .openai_format import KEEP_ALIVE, ChatFormat, CompletionFormat, OpenAIStream
from .pages import PAGES, page
from .parts import AnswerPart
from .response_store import ResponseStore
from .responses_format import ResponseFormat
from .responses_request import parse_response
from .schema import GenerationRequest, parse_chat, parse_completion
from .worker import Worker

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 2.0
"""Longest silence in a stream: clients give up after some minutes without a byte, proxies after a few seconds."""

CLIENT_LEFT = 499  # nginx's code for a client that closed the connection; nobody receives it

BODIES_AT_ONCE = 4
"""Total size of the large bodies held in memory at once; the first 64 KiB of each body are not counted."""

VALUES = 100_000
"""Maximum number of JSON values in a body: room for 128 tools with a hundred parameters each."""


def create_app(model: Any, tokenizer: Any, config: ServerConfig) -> Starlette:
    """Create the server of one model, as an ASGI application. Its lifespan ends the worker, but not the model.

    Args:
        model: The model that :func:`flash_moe_mlx.load` returned.
        tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
        config: The server's settings.

    Raises:
        MemoryLimitError: If the memory limit can't spare the requested prefix cache.
    """
    return _Server(model, tokenizer, config).app


class _Server:
    """Routes in front of one worker."""

    def __init__(self, model: Any, tokenizer: Any, config: ServerConfig):
        self._model = model
        self._config = config
        self._created = int(time.time())
        # Ids beyond the logits would be written outside the array, and a tokenizer may know more ids than the model.
        logits = getattr(getattr(model, "config", getattr(model, "args", None)), "vocab_size", None)
        self._vocabulary = min(len(tokenizer), logits or len(tokenizer))
        self._worker = Worker(
            model,
            tokenizer,
            max_queue=config.max_queue,
            max_concurrent=config.max_concurrent,
            prefix_cache=None if config.kv_bits is not None else config.prefix_cache,
            prefix_directory=config.prefix_directory,
            prefix_directory_bytes=config.prefix_directory_bytes,
            template_arguments=config.template_arguments,
            kv_cache={
                "kv_bits": config.kv_bits,
                "kv_group_size": config.kv_group_size,
                "quantized_kv_start": config.quantized_kv_start,
            },
        )
        self._bodies = BodyBudget(BODIES_AT_ONCE * config.max_body_bytes)
        self._max_values = VALUES + 4 * model.streaming.max_context  # a prompt may be token ids
        self._responses = ResponseStore(4 * config.max_body_bytes)
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completion, methods=["POST"]),
                Route("/v1/messages", self._messages, methods=["POST"]),
                Route("/v1/messages/count_tokens", self._count, methods=["POST"]),
                Route("/v1/responses", self._response, methods=["POST"]),
                Route("/v1/responses/{name}", self._response_named, methods=["GET", "DELETE"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model_named),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/stats", self._stats),
                *(Route(path, page(name)) for path, name in PAGES.items()),
            ],
            exception_handlers={
                ApiError: lambda request, error: _refused(request, error),
                FlashMoEError: lambda request, error: _refused(request, failed_generation(error)),
                HTTPException: lambda request, error: _refused(
                    request, ApiError(error.status_code, f"{error.detail}.")
                ),
                ClientDisconnect: lambda request, error: Response(status_code=CLIENT_LEFT),
                ClientLeft: lambda request, error: Response(status_code=CLIENT_LEFT),
                Exception: lambda request, error: _refused(request, failed_generation(error)),  # Starlette logs it too
            },
            lifespan=self._lifespan,
        )
        # Redirects would point to a URL built from the Host header.
        self.app.router.redirect_slashes = False
        self.app.add_middleware(Guard, config=config, counts=self._worker.metrics.requests)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._worker.close()

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, parse_chat, partial(OpenAIStream, ChatFormat))

    async def _completion(self, request: Request) -> Response:
        return await self._generate(request, parse_completion, partial(OpenAIStream, CompletionFormat))

    async def _messages(self, request: Request) -> Response:
        return await self._generate(request, parse_messages, MessagesFormat)

    async def _response(self, request: Request) -> Response:
        parse = partial(parse_response, store=self._responses)
        return await self._generate(request, parse, partial(ResponseFormat, self._responses))

    async def _response_named(self, request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "DELETE":
            if not self._responses.delete(name):
                raise responses_request.not_stored("the id")
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise ApiError(400, "stream must be false for a stored response. Leave it out.", param="stream")
        if (kept := self._responses.response(name)) is None:
            raise responses_request.not_stored("the id")
        return JSONResponse(kept)

    async def _count(self, request: Request) -> Response:
        async with self._read(request, parse_messages) as (generation, read):
            return JSONResponse({"input_tokens": await self._worker.count(generation, read)})

    async def _generate(
        self,
        request: Request,
        parse: Callable[..., GenerationRequest],
        make: Callable[[str, Generation], AnswerFormat],
    ) -> Response:
        async with self._read(request, parse) as (generation, read):
            starting = asyncio.ensure_future(self._worker.start(generation, read))
            starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever waits for it or not
            while not starting.done() and not generation.streams:
                await asyncio.wait((starting,), timeout=KEEP_ALIVE_SECONDS)
            if starting.done():
                await starting
        begin = partial(make, self._config.model_id, generation)
        if generation.streams:
            return _EventStream(generation, begin, starting)
        answer = begin()
        parts: list[AnswerPart] = []
        async with _ended_with(generation), _cancelled_when_left(generation, request.receive):
            async for part in generation:
                if isinstance(part, Finished):
                    return JSONResponse(answer.whole(parts, part))
                parts.append(part)
            if (error := _failure(generation)) is not None:
                raise error
        return Response(status_code=CLIENT_LEFT)

    @asynccontextmanager
    async def _read(
        self, request: Request, parse: Callable[..., GenerationRequest]
    ) -> AsyncIterator[tuple[Generation, Callable[[], GenerationRequest]]]:
        """Read a request's body, and provide an admitted generation and the function that parses its request."""
        with self._bodies.share() as share:
            body = await read_body(request, self._config.max_body_bytes, self._config.body_seconds, share)
            generation = self._worker.admit()

            def read() -> GenerationRequest:
                # Histories may hold text that other servers cut in the middle of a character.
                value = parse_body(body, self._max_values, mend=parse is not parse_completion)
                body.clear()
                return parse(value, self._config.model_id, self._vocabulary, self._config.sampling)

            async with _cancelled_when_left(generation, request.receive):
                yield generation, read

    async def _models(self, request: Request) -> Response:
        if _is_anthropic(request):
            return JSONResponse(anthropic_format.model_list(self._description()))
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model_named(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._config.model_id:
            raise ApiError(
                404, f"model must be {self._config.model_id!r}, got {name!r}.", param="model", code="model_not_found"
            )
        description = self._description()
        return JSONResponse(anthropic_format.model(description) if _is_anthropic(request) else description)

    def _description(self) -> dict[str, Any]:
        sampling = self._config.sampling
        return {
            "id": self._config.model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "flash_moe_mlx",
            "max_model_len": self._model.streaming.max_context,
            "default_sampling": {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")},
        }

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        text = metrics.prometheus(self._worker.metrics, self._model, self._worker)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _stats(self, request: Request) -> Response:
        figures = metrics.values(self._worker.metrics, self._model, self._worker)
        return JSONResponse({"model": self._config.model_id, **figures})


def _refused(request: Request, error: ApiError) -> Response:
    return refusal(error, request.scope["path"])


def _is_anthropic(request: Request) -> bool:
    """Return whether the client speaks Anthropic's API, on routes that both have."""
    return bool(headers(request.scope, b"anthropic-version"))


class _EventStream(Response):
    """An answer as server-sent events; an error after the start is sent as the last event."""

    def __init__(self, generation: Generation, begin: Callable[[], AnswerFormat], starting: "asyncio.Future[None]"):
        """Begin an answer.

        Args:
            generation: The generation, whose request was read.
            begin: Begins the answer in its API's form, once the prompt is known.
            starting: Its start, which may take longer than clients are to hear nothing.
        """
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._generation = generation
        self._begin = begin
        self._starting = starting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _ended_with(self._generation), _cancelled_when_left(self._generation, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _chunks(self) -> AsyncIterator[bytes]:
        while not (await asyncio.wait((self._starting,), timeout=KEEP_ALIVE_SECONDS))[0]:
            yield KEEP_ALIVE
        answer = self._begin()
        if (failure := self._starting.exception()) is not None:
            if not isinstance(failure, ClientLeft):
                yield answer.failed(_told(failure))
            return
        yield answer.start()
        said = time.monotonic()
        async for part in _with_silence(self._generation, KEEP_ALIVE_SECONDS):
            if isinstance(part, Finished):
                yield answer.end(part)
                return
            chunk = answer.silence() if part is None else answer.part(part)
            if not chunk and time.monotonic() - said >= KEEP_ALIVE_SECONDS:  # not every part is sent
                chunk = answer.silence()
            if chunk:
                said = time.monotonic()
                yield chunk
        if (error := _failure(self._generation)) is not None:
            yield answer.failed(error)


async def _with_silence(generation: Generation, seconds: float) -> AsyncIterator[AnswerPart | Finished | None]:
    """Yield a generation's parts, and None whenever there was none for a while, as prompts and calls take time."""
    parts = aiter(generation)
    while True:
        waiting = asyncio.ensure_future(anext(parts, _END))
        try:
            while not (await asyncio.wait((waiting,), timeout=seconds))[0]:
                yield None
            part = await waiting
        finally:
            waiting.cancel()
        if isinstance(part, _End):
            return
        yield part


class _End:
    """Marks the end of a generation's parts."""


_END = _End()


def _failure(generation: Generation) -> ApiError | None:
    """Return the error to send for a generation that did not finish; None if the client ended it."""
    error = generation.error()
    return None if error is None or isinstance(error, CancelledError) else _told(error)


def _told(error: BaseException) -> ApiError:
    """Return the error to send in a stream that has begun; the server's own are logged."""
    told = failed_generation(error)
    if told.status >= 500:
        logger.error("a generation failed", exc_info=error)
    return told


@asynccontextmanager
async def _cancelled_when_left(generation: Generation, receive: Receive) -> AsyncIterator[None]:
    """End the generation if the client leaves, or an exception is raised, within the context."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watching = asyncio.ensure_future(watch())
    failed = True
    try:
        yield
        failed = False
    finally:
        watching.cancel()
        if failed:
            generation.cancel()


@asynccontextmanager
async def _ended_with(generation: Generation) -> AsyncIterator[None]:
    """End the generation when leaving the context."""
    try:
        yield
    finally:
        generation.cancel()
