"""Bodies that anybody may send: strict JSON, within bounds of size, time, memory and number of values."""

import asyncio
import json
import time
import tracemalloc
from typing import Any

import pytest
from starlette.requests import Request

from flash_moe_mlx.server.api_error import ApiError
from flash_moe_mlx.server.body import FREE_BYTES, BodyBudget, parse_body, read_body
from flash_moe_mlx.server.strict_json import MAX_DEPTH, parse_json

REFUSED = {
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": [-Infinity]}',
    "1e400": b'{"ignored": 1e400}',
    "-1e400": b"[-1e400]",
    "10**5000": b"[1" + b"0" * 5000 + b"]",
    "a name twice": b'{"a": 1, "a": 2}',
    "a name twice, within": b'[{"a": 1, "\\u0061": 2}]',
    "half a pair": b'["\\ud800"]',
    "half a pair in a name": b'{"\\udfff": 1}',
    "pairs the wrong way round": b'["\\ude00\\ud83d"]',
    "no UTF-8": b'["\xff"]',
    "surrogates in UTF-8": b'["\xed\xa0\x80"]',
    "a BOM": b"\xef\xbb\xbf[]",
    "UTF-16": "[1]".encode("utf-16"),
    "UTF-32": "[1]".encode("utf-32"),
    "NUL": b"[\x00]",
    "a control character": b'["\x1b"]',
    "nothing": b"",
    "space": b"  ",
    "two documents": b"{}{}",
    "a comment": b"{} // x",
    "single quotes": b"{'a': 1}",
    "a comma too many": b"[1,]",
    "deep lists": b"[" * 4_000_000,
    "deep objects": b'{"a":' * 600_000,
    "deeper than allowed": b"[" * 65 + b"]" * 65,
    "an open string": b'["' + b'\\"' * 1_000_000,
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_is_no_strict_json_is_refused_at_once(body: bytes):
    started = time.monotonic()
    with pytest.raises(ApiError) as refused:
        parse_body(body, 100_000)
    assert refused.value.status == 400
    assert time.monotonic() - started < 30  # a parser that goes back and forth takes hours
    assert len(json.dumps(refused.value.body, allow_nan=False)) < 500


def test_what_is_json_is_taken():
    value = {"a": [1, -2.5, 1e308, "é\U0001f600\u3000\ufeff", None, True, {"": {}}], 'b\\"': '[{,"\\'}
    for ascii_only in (True, False):
        assert parse_body(json.dumps(value, ensure_ascii=ascii_only).encode(), 100) == value
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(deep)) == deep


@pytest.mark.parametrize(
    "unit", [b"{},", b"[],", b'{"":0},', b"[[]],", b'"ab",', b"1.5,", b"12345678901,", b'{"a":{"b":[]}},'], ids=repr
)
def test_memory_follows_the_number_of_values_allowed(unit: bytes):
    body = b"[" + unit * (4_000_000 // len(unit)) + b"0]"
    tracemalloc.start()
    with pytest.raises(ApiError, match="values"):
        parse_body(body, 100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(body)


def test_text_is_not_counted_as_values():
    prompt = 'if (a[0], b[1]) { return {}, []; } \\ " ' * 20_000
    assert parse_body(json.dumps({"prompt": prompt}).encode(), 3) == {"prompt": prompt}


class Slow:
    """A client that sends chunks, each after a pause."""

    def __init__(self, chunks: list[bytes], pause: float = 0.0, types: tuple[bytes, ...] = (b"application/json",)):
        self._chunks, self._pause = list(chunks), pause
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", value) for value in types]}
        self.request = Request(scope, self._receive)

    async def _receive(self) -> dict[str, Any]:
        await asyncio.sleep(self._pause)
        return {"type": "http.request", "body": self._chunks.pop(0), "more_body": bool(self._chunks)}


def read(client: Slow, budget: BodyBudget, limit: int = 1 << 20, seconds: float = 5.0) -> bytes:
    with budget.share() as share:
        return bytes(asyncio.run(read_body(client.request, limit, seconds, share)))


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (Slow([b"{}"], types=()), 415), (Slow([b"{}"], types=(b"text/plain",)), 415),
        (Slow([b"{}"], types=(b"application/json", b"text/plain")), 415), (Slow([b"x"] * 100, pause=0.01), 408),
        (Slow([b"x" * 600] * 2), 413), (Slow([b"x" * 100_000] * 1000), 413),
    ],
    ids=["no type", "another type", "two types", "slow", "large", "without end"],
)  # fmt: skip
def test_reading_is_bounded(client: Slow, status: int):
    with pytest.raises(ApiError) as refused:
        read(client, BodyBudget(1 << 20), limit=1000, seconds=0.2 if status == 408 else 30)
    assert refused.value.status == status


def test_large_bodies_share_a_budget_that_small_ones_do_not_need():
    budget = BodyBudget(300_000)
    large = b"x" * 200_000
    with budget.share() as first:
        first.resize(300_000)
        with pytest.raises(ApiError) as refused:
            read(Slow([large[:70_000], large[70_000:]]), budget)
        assert refused.value.status == 503 and refused.value.headers["Retry-After"]
        assert read(Slow([b"x" * FREE_BYTES]), budget) == b"x" * FREE_BYTES
        assert budget.used_bytes == 300_000 - FREE_BYTES
    assert budget.used_bytes == 0
    assert read(Slow([large]), budget) == large
    assert budget.used_bytes == 0
