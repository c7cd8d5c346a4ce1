"""Connections that say nothing, little, or don't listen: each ends, and none keeps others out."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from flash_moe_mlx.server.connection import BACKLOG, ConnectionLimits

from ..support.serving import wait_until

pytestmark = pytest.mark.xdist_group("server_connection")

MANY = 40
LIMITS = ConnectionLimits(max_connections=8, head_seconds=1.0, body_seconds=1.5, write_seconds=1.0)
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"


async def echo_size(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, and answer with its size, or with as many bytes as the path says; /wait takes its time."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    if scope["path"] == "/wait":
        await asyncio.sleep(4)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(int(scope["path"][1:]) if scope["path"][1:].isdigit() else 0):
        await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    settings = uvicorn.Config(
        echo_size,
        log_config=None,
        log_level="critical",
        lifespan="off",
        http=LIMITS.protocol(),
        ws="none",
        backlog=BACKLOG,
    )
    running = uvicorn.Server(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    running.address = listener.getsockname()
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    wait_until(lambda: running.started)
    yield running
    running.should_exit = True
    thread.join(30)
    listener.close()


@contextlib.contextmanager
def connected(server: uvicorn.Server, data: bytes = b"", count: int = 1) -> Iterator[list[socket.socket]]:
    """Connections that have sent some bytes."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(server.address, timeout=30)) for _ in range(count)]
        for connection in connections:
            with contextlib.suppress(OSError):  # it may have had to make room
                connection.sendall(data)
        yield connections


def ended_after(connection: socket.socket) -> float:
    """Seconds until the server has closed it."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return time.monotonic() - started


def drip(connection: socket.socket) -> float:
    """Seconds for which the server takes a byte every tenth of a second."""
    started = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - started < 20:
            connection.sendall(b"X")
            time.sleep(0.1)
    return time.monotonic() - started


def get(server: uvicorn.Server, path: str = "/") -> int:
    return httpx.get(f"http://127.0.0.1:{server.address[1]}{path}", timeout=30).status_code


@pytest.mark.parametrize(
    "data", [b"", b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", POST, POST + b"x"]
)
def test_one_that_keeps_us_waiting_is_closed(server: uvicorn.Server, data: bytes):
    with connected(server, data) as (connection,):
        assert ended_after(connection) < 10
    wait_until(lambda: not server.server_state.connections)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", POST], ids=["head", "body"])
def test_bytes_one_by_one_gain_no_time(server: uvicorn.Server, data: bytes):
    with connected(server, data) as (connection,):
        assert drip(connection) < 10


def test_one_that_does_not_read_is_closed(server: uvicorn.Server):
    with connected(server, b"GET /50 HTTP/1.1\r\nHost: a\r\n\r\n"):
        wait_until(lambda: server.server_state.tasks)
        assert wait_until(lambda: not server.server_state.connections) < 20
    wait_until(lambda: not server.server_state.tasks)


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n", POST, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_many_keep_nobody_out(server: uvicorn.Server, data: bytes):
    with connected(server, data, count=MANY):
        wait_until(lambda: all(connection.waits_for_client for connection in [*server.server_state.connections]))
        for _ in range(3):
            assert get(server) == 200
        assert len(server.server_state.connections) <= LIMITS.max_connections + 1
    wait_until(lambda: not server.server_state.connections)


def test_one_that_waits_for_us_is_kept(server: uvicorn.Server):
    answered: list[int] = []
    waiting = threading.Thread(target=lambda: answered.append(get(server, "/wait")))
    waiting.start()
    wait_until(lambda: server.server_state.tasks)
    with connected(server, count=MANY):
        assert get(server) == 200
        waiting.join(30)
    assert answered == [200]


def test_keep_alive_and_pipelining_work(server: uvicorn.Server):
    one = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    with connected(server, one * 5 + one[:20]) as (connection,):
        time.sleep(0.3)
        connection.sendall(one[20:])
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.count(b"200 OK") == 6


def test_descriptors_bound_connections(monkeypatch: pytest.MonkeyPatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 4096))
    assert LIMITS.protocol().args[0] == 8
    assert ConnectionLimits().protocol().args[0] == 50


def test_broken_requests_are_logged_a_few_times_only(server: uvicorn.Server, caplog: pytest.LogCaptureFixture):
    from flash_moe_mlx.cli.logs import BURST, RepeatFilter

    repeats = RepeatFilter()
    logger = logging.getLogger("uvicorn.error")
    shown = []
    handler = logging.Handler()
    handler.emit = shown.append  # type: ignore[method-assign]
    handler.addFilter(repeats)
    logger.addHandler(handler)
    before, logger.level = logger.level, logging.WARNING
    try:
        for _ in range(30):
            with connected(server, b"\x16\x03\x01 not HTTP\r\n\r\n") as (connection,):
                ended_after(connection)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert 0 < len(shown) <= BURST
