"""Who may come in: requests that are spelled to look like others, sent byte by byte as no client library would."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import Request

from flash_moe_mlx import RequestError
from flash_moe_mlx.server.config import ServerConfig
from flash_moe_mlx.server.guard import Guard

from ..support.serving import demo

pytestmark = pytest.mark.xdist_group("server_guard")

KEY = "a key ✓"
BODY = json.dumps({"prompt": "Hi", "max_tokens": 1}).encode()
KEYED = b"Authorization: Bearer " + KEY.encode() + b"\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with demo(api_key=KEY, allowed_hosts=("localhost", "127.0.0.1", "[::1]", "Proxy.example")) as running:
        host, port = running.removeprefix("http://").split(":")
        yield host, int(port)


def send(address: tuple[str, int], data: bytes) -> tuple[int, bytes]:
    """Status and rest of the answer to bytes on a connection of their own."""
    with socket.create_connection(address, timeout=120) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), rest


def request(target: bytes = b"/v1/completions", head: bytes = b"Host: localhost\r\n", method: bytes = b"POST") -> bytes:
    head += b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n" % len(BODY)
    return method + b" " + target + b" HTTP/1.1\r\n" + head + b"\r\n" + BODY


# Each made the guard of an earlier version, with Starlette before 1.0.1, see an open path or an allowed host, or might.
HOSTS = [
    b"localhost:/health?", b"127.0.0.1:/?", b"localhost/health?", b"localhost/health#", b"localhost:80/",
    b"localhost:/", b"localhost:80:80", b"localhost@evil.example", b"evil.example@localhost", b"localhost,evil.example",
    b"localhost evil.example", b"[::1]:/health?", b"[::1]/", b"::1", b"[localhost]", b"", b"local%68ost", b"\xff",
    b"localhost:8x", b"http://localhost/health", b"localhost\\health?", b"a" * 300,
]  # fmt: skip


@pytest.mark.parametrize("key", [b"", KEYED], ids=["no key", "key"])
@pytest.mark.parametrize("host", HOSTS, ids=repr)
def test_a_host_header_is_a_name_and_a_port(address: tuple[str, int], host: bytes, key: bytes):
    status, _ = send(address, request(head=b"Host: " + host + b"\r\n" + key))
    assert status in (400, 403)


@pytest.mark.parametrize(
    "head",
    [
        b"Host: localhost\r\nHost: evil.example\r\n",
        b"Host: localhost\r\nHost: localhost\r\n",
        b"",
        b"Host: evil.example\r\nX-Forwarded-Host: localhost\r\n",
        b"Host: evil.example\r\nForwarded: host=localhost\r\n",
    ],
)
def test_hosts_are_one_and_ours(address: tuple[str, int], head: bytes):
    assert send(address, request(head=head + KEYED))[0] in (400, 403)


OPEN = [b"/health", b"/", b"/chat"]
TARGETS = [
    b"/v1/completions", b"/v1/completions?/health", b"/v1/completions#/health", b"//health", b"/health/", b"/%68ealth",
    b"/health/../v1/completions", b"/v1/../health", b"/./", b"/HEALTH", b"/health;", b"/health%00", b"/health%3f",
    b"/health%2f", b"/%2e", b"/v1/models/%2fhealth", b"/stats", b"/stats/", b"/metrics", b"/v1/models", b"/none",
    b"http://localhost/health", b"http://evil.example/", b"http:/health", b"*",
]  # fmt: skip


@pytest.mark.parametrize("method", [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"get", b"BREW"])
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_without_the_key_every_path_is_closed(address: tuple[str, int], target: bytes, method: bytes):
    status, rest = send(address, request(target, method=method))
    assert status in (400, 401)
    assert b"choices" not in rest and b"flash_moe" not in rest


@pytest.mark.parametrize(
    "head",
    [
        b"X-Original-URL: /health\r\n", b"X-Rewrite-URL: /health\r\n", b"X-Forwarded-For: 127.0.0.1\r\n",
        b"X-Forwarded-Prefix: /health\r\n", b"X-Forwarded-Path: /health\r\n", b"X-HTTP-Method-Override: GET\r\n",
        b"Authorization: Basic " + KEY.encode() + b"\r\n", b"Authorization: Bearer\r\n", b"Authorization: Bearer \r\n",
        KEYED + b"Authorization: Bearer other\r\n", KEYED * 2, KEYED[:-2] + b"x\r\n",
        b"X-Api-Key: " + KEY.encode() + b"\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
    ],
)  # fmt: skip
def test_no_other_header_lets_in(address: tuple[str, int], head: bytes):
    assert send(address, request(head=b"Host: localhost\r\n" + head))[0] in (400, 401)


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:8080", b"127.0.0.1", b"[::1]:1", b"proxy.EXAMPLE"], ids=repr
)
def test_the_key_and_a_name_of_ours_let_in(address: tuple[str, int], host: bytes):
    status, rest = send(address, request(head=b"Host: " + host + b"\r\n" + KEYED))
    assert status == 200 and b"choices" in rest


@pytest.mark.parametrize("target", OPEN, ids=repr)
def test_open_paths_are_read_without_a_key(address: tuple[str, int], target: bytes):
    assert send(address, request(target, method=b"GET"))[0] == 200
    assert send(address, request(target + b"?x", method=b"HEAD"))[0] in (200, 405)
    assert send(address, request(target, method=b"POST"))[0] == 401


def test_pipelined_requests_are_judged_one_by_one(address: tuple[str, int]):
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(address, timeout=120) as connection:
        connection.sendall(health + request(b"/stats", method=b"GET"))
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.count(b"HTTP/1.1 200") == 1 and answer.count(b"HTTP/1.1 401") == 1


def scope(**changes: Any) -> dict[str, Any]:
    return {
        "type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "root_path": "",
        "query_string": b"", "headers": [(b"host", b"localhost")], **changes,
    }  # fmt: skip


def refused(**changes: Any) -> int | None:
    guard = Guard(None, ServerConfig("demo", api_key="secret"), None)  # type: ignore[arg-type]
    error = guard._refused(scope(**changes))
    return None if error is None else error.status


def test_a_mounted_application_and_servers_without_raw_paths(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Request, "__init__", lambda *_: pytest.fail("a request is rebuilt"))
    assert refused() is None
    assert refused(raw_path=None) is None
    assert refused(root_path="/llm", path="/llm/health", raw_path=b"/llm/health") is None
    assert refused(root_path="/health", path="/health/stats", raw_path=b"/health/stats") == 401
    assert refused(raw_path=b"/%68ealth") == 401
    assert refused(headers=[(b"Host", b"localhost"), (b"host", b"evil.example")]) == 400
    named = (b"host", b"localhost")
    assert refused(path="/stats", raw_path=b"/stats", headers=[named, (b"Authorization", b"bearer secret")]) is None


def test_websockets_are_refused():
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(None, ServerConfig("demo"), None)  # type: ignore[arg-type]
    asyncio.run(guard({"type": "websocket"}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_id": ""}, {"model_id": "a\udcff"}, {"model_id": "a\x1b[2J"}, {"api_key": ""}, {"api_key": " a"},
        {"api_key": "a\n"}, {"api_key": "\udcff"}, {"allowed_hosts": ("a:80",)}, {"allowed_hosts": ("http://a",)},
        {"allowed_hosts": ("::1",)}, {"allowed_hosts": ("",)},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_no_request_could_meet(arguments: dict[str, Any]):
    with pytest.raises(RequestError):
        ServerConfig(**{"model_id": "demo", **arguments})
