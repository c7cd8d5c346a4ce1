"""Access control by Host header and API key, and counts of the answers.

Every decision uses the ASGI scope as the server parsed it, never a URL rebuilt from client-controlled headers: before
1.0.1, Starlette took a request's path from its Host header.
"""

import hmac
import re
from collections import Counter

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_error import ApiError, anthropic_error
from .config import ServerConfig
from .pages import PAGES

OPEN_PATHS = (*PAGES, "/health")
"""Paths that need no API key: the pages, which contain no data themselves, and the health check."""

# RFC 9112 section 3.2, without percent-encoding and user names, which API clients don't send.
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")


class Guard:
    """Admits permitted requests and counts the answers. CORS stays off, so other origins get nothing."""

    def __init__(self, app: ASGIApp, config: ServerConfig, counts: Counter[tuple[str, int]]):
        self._app = app
        self._config = config
        self._allowed_hosts = config.allowed_hosts and {host.lower() for host in config.allowed_hosts}
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before accepting, so the client sees 403
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Clients can invent any number of other paths, and each would be counted for ever.
                known = "endpoint" in scope and not scope.get("path_params")
                self._counts[scope["path"] if known else "other", message["status"]] += 1
            await send(message)

        refused = self._refused(scope)
        await (self._app if refused is None else refusal(refused, scope["path"]))(scope, receive, counted)

    def _refused(self, scope: Scope) -> ApiError | None:
        if not scope["path"].startswith("/"):  # absolute-form, authority-form, "*": for proxies
            return ApiError(
                400, f"the request target must be a path, got {scope['path'][:80]!r}.", code="invalid_target"
            )
        hosts = headers(scope, b"host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            got = repr(hosts[0][:80].decode("latin-1")) if len(hosts) == 1 else f"{len(hosts)} of them"
            return ApiError(400, f"the Host header must be one name and port, got {got}.", code="invalid_host")
        name = match[1].decode("ascii").lower()
        if self._allowed_hosts is not None and name not in self._allowed_hosts:
            return ApiError(403, f"the Host header must name this server, got {name[:80]!r}.", code="host_not_allowed")
        if self._config.api_key is None or _is_open(scope) or self._has_key(scope, self._config.api_key):
            return None
        return ApiError(
            401, "the API key must be sent as a bearer token or x-api-key, got another or none.", code="invalid_api_key"
        )

    def _has_key(self, scope: Scope, expected: str) -> bool:
        sent, plain = headers(scope, b"authorization"), headers(scope, b"x-api-key")
        scheme, _, key = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(b" \t"), expected.encode()):
            return True
        # Anthropic's clients have a header of their own for it.
        named = scope["path"].startswith(("/v1/messages", "/v1/models"))
        return named and not sent and len(plain) == 1 and hmac.compare_digest(plain[0].strip(b" \t"), expected.encode())


def headers(scope: Scope, name: bytes) -> list[bytes]:
    """Return the values of every header with this lower-case name."""
    return [value for key, value in scope["headers"] if key.lower() == name]


def _is_open(scope: Scope) -> bool:
    """Return whether the request reads an open path, spelled exactly as listed."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    raw = scope.get("raw_path")
    spelled = raw is None or raw.partition(b"?")[0] == scope["path"].encode()
    return path in OPEN_PATHS and spelled and scope["method"] in ("GET", "HEAD")


def refusal(error: ApiError, path: str = "") -> Response:
    """Return the HTTP response for an error, in the shape of the API that the path belongs to."""
    body = anthropic_error(error) if path.startswith("/v1/messages") else error.body
    return JSONResponse(body, error.status, headers=error.headers)
