"""Who may come in: API key, Host header, size and type of bodies. Counts the answers."""

import hmac
import json
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_error import ApiError
from .config import ServerConfig

OPEN_PATHS = ("/", "/health")
"""What needs no API key: the status page, which holds no data of its own, and whether the server runs."""

_DRAINED_BYTES = 1 << 26


class Guard:
    """Lets in who may, and counts the answers. Nothing is said to other origins: CORS stays off."""

    def __init__(self, app: ASGIApp, config: ServerConfig, counts: Counter[tuple[str, int]]):
        self._app = app
        self._config = config
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Anybody can make up other paths, and each would be counted for ever.
                known = "endpoint" in scope and not scope.get("path_params")
                self._counts[scope["path"] if known else "other", message["status"]] += 1
            await send(message)

        refused = self._refused(request)
        await (self._app if refused is None else refusal(refused))(scope, receive, counted)

    def _refused(self, request: Request) -> ApiError | None:
        config = self._config
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if config.allowed_hosts is not None and name.lower() not in config.allowed_hosts:
            return ApiError(403, f"the Host header must name this server, got {host[:80]!r}.", code="host_not_allowed")
        if config.api_key is None or request.url.path in OPEN_PATHS:
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Starlette reads headers as Latin-1; a key's other letters are sent in UTF-8.
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), config.api_key.encode()):
            return None
        return ApiError(401, "the API key must be sent as a bearer token, got another or none.", code="invalid_api_key")


def refusal(error: ApiError) -> Response:
    """The HTTP response that says it."""
    return JSONResponse(error.body, error.status, headers=error.headers)


async def json_body(request: Request, limit: int) -> Any:
    """A request's body.

    Raises:
        ApiError: 413 beyond ``limit`` bytes, 415 if it is not said to be JSON, 400 if it is none.
    """
    # A page of another site can post a form, or plain text, to this machine; not this without asking first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type must be application/json.")
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
        elif size > max(limit, _DRAINED_BYTES):
            break  # read so far for the client's sake: most write the whole body before they read the answer
    if size > limit:
        raise ApiError(413, f"the body must have at most {limit} bytes, got more.", code="body_too_large")
    try:
        value = json.loads(body.decode())
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON in UTF-8, got {str(error)[:200]}.", code="invalid_json") from None
    return value
