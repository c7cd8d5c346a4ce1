"""Request bodies: read within bounds of size, time and memory, and of the number of values in them."""

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
"""Bytes that every body may hold; only what a body has beyond them is taken from the server's budget."""

_DRAINED_BYTES = 1 << 26
# Texts, and what stands before each further value. Possessive: time follows the body's length, whatever it holds.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)


class BodyBudget:
    """Memory that bodies which wait to be parsed may take together.

    Attributes:
        total_bytes: Its size.
        used_bytes: Bytes taken now.
    """

    def __init__(self, total_bytes: int):
        self.total_bytes = total_bytes
        self.used_bytes = 0

    @contextmanager
    def share(self) -> Iterator["BodyShare"]:
        """Give one body its share, and take it back at the end."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            share.resize(0)


class BodyShare:
    """Part of a `BodyBudget` that one body holds."""

    def __init__(self, budget: BodyBudget):
        self._budget = budget
        self._nbytes = 0

    def resize(self, nbytes: int) -> None:
        """Take or give back bytes.

        Raises:
            ApiError: 503 if the budget has too few.
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
        limit: Largest number of bytes.
        seconds: Time within which it must have come.
        share: Accounts for its bytes.

    Raises:
        ApiError: 415 if it is not said to be JSON, 413 beyond ``limit`` bytes, 408 if it takes too long, 503 if too
            many bodies are read at once.
    """
    # A page of another site can post a form, or plain text, to this machine; not this without asking first.
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
                    break  # read so far for the client's sake: most write the whole body before they read the answer
    except TimeoutError:
        raise ApiError(408, f"the body must come within {seconds:.0f} seconds, got {size} bytes of it.") from None
    if size > limit:
        raise ApiError(413, f"the body must have at most {limit} bytes, got more.", code="body_too_large")
    return body


def parse_body(body: bytes | bytearray, max_values: int, *, mend: bool = False) -> Any:
    """Parse a body as JSON whose every text is Unicode, and every number finite.

    Args:
        body: Bytes that anybody may have sent.
        max_values: Numbers, texts, objects and arrays that it may hold. Each takes up to 200 bytes of memory.
        mend: Read half of a surrogate pair as U+FFFD rather than refuse it.

    Raises:
        ApiError: 400 if it is anything else.
    """
    # Counted before they are made, and no further than needed. A value has a comma before it, and may be a text.
    if sum(1 for _ in islice(_TOKEN.finditer(body), 2 * max_values + 1)) > 2 * max_values:
        raise ApiError(400, f"the body must hold at most {max_values} values, got more.", code="body_too_large")
    try:
        text = body.decode()
        return parse_json(mend_pairs(text) if mend else text)
    except ValueError as error:
        raise ApiError(400, f"the body must be JSON in UTF-8, got {str(error)[:200]}.", code="invalid_json") from None
