"""Reading of request bodies, with bounds on size, time, memory and the number of values."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from starlette.requests import Request

from ..chat.calls import mend_pairs
from .api_error import ApiError
from .guard import headers
from .strict_json import parse_json

FREE_BYTES = 1 << 16
"""Bytes allowed to every body; only bytes beyond these are taken from the server's budget."""

_DRAINED_BYTES = 1 << 26
# Texts, and the character before each further value. Possessive, so that time is linear in the body's length.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)


class BodyBudget:
    """Total memory for bodies that wait to be parsed.

    Attributes:
        total_bytes: Size of the budget.
        used_bytes: Bytes currently in use.
    """

    def __init__(self, total_bytes: int):
        self.total_bytes = total_bytes
        self.used_bytes = 0

    @contextmanager
    def share(self) -> Iterator["BodyShare"]:
        """Provide one body's share within the context, and release it at the end."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            share.resize(0)


class BodyShare:
    """The part of a `BodyBudget` that one body uses."""

    def __init__(self, budget: BodyBudget):
        self._budget = budget
        self._nbytes = 0

    def resize(self, nbytes: int) -> None:
        """Change the number of bytes taken from the budget.

        Raises:
            ApiError: 503 if the budget has too few bytes left.
        """
        wanted = max(0, nbytes - FREE_BYTES)
        if self._budget.used_bytes + wanted - self._nbytes > self._budget.total_bytes:
            raise ApiError(503, "the server must have room for the body, got too many at once. Try again soon.")
        self._budget.used_bytes += wanted - self._nbytes
        self._nbytes = wanted


async def read_body(request: Request, limit: int, seconds: float, share: BodyShare) -> bytearray:
    """Read a request's body.

    Args:
        request: The request.
        limit: Maximum number of bytes.
        seconds: Time within which the whole body must arrive.
        share: Share that accounts for the body's bytes.

    Raises:
        ApiError: 415 if it is not declared as JSON, 413 beyond ``limit`` bytes, 408 if it takes too long, 503 if too
            many bodies are being read at once.
    """
    # Another site's page can post a form or plain text to this machine, but not JSON without a CORS preflight.
    types = headers(request.scope, b"content-type")
    if len(types) != 1 or types[0].partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "Content-Type must be application/json.")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    share.resize(size)
                    body += chunk
                elif size > max(limit, _DRAINED_BYTES):
                    break  # excess bytes are read because most clients write the whole body before they read
    except TimeoutError:
        raise ApiError(408, f"the body must come within {seconds:.0f} seconds, got {size} bytes of it.") from None
    if size > limit:
        raise ApiError(413, f"the body must have at most {limit} bytes, got more.", code="body_too_large")
    return body


def parse_body(body: bytes | bytearray, max_values: int, *, mend: bool = False) -> Any:
    """Parse a body as JSON, with only Unicode texts and finite numbers.

    Args:
        body: Untrusted bytes.
        max_values: Maximum number of numbers, texts, objects and arrays. Each takes up to 200 bytes of memory.
        mend: Whether to read an unpaired surrogate as U+FFFD instead of refusing it.

    Raises:
        ApiError: 400 for any other input.
    """
    # Count values before building them, stopping at the limit. A value follows a comma, and may be a text.
    if sum(1 for _ in islice(_TOKEN.finditer(body), 2 * max_values + 1)) > 2 * max_values:
        raise ApiError(400, f"the body must hold at most {max_values} values, got more.", code="body_too_large")
    try:
        text = body.decode()
        return parse_json(mend_pairs(text) if mend else text)
    except ValueError as error:
        raise ApiError(400, f"the body must be JSON in UTF-8, got {str(error)[:200]}.", code="invalid_json") from None
