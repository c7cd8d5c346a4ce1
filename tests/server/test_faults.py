"""Faults: clients that leave, a full queue, reads that fail, bodies of every kind. The server keeps running."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

import flash_moe_mlx
from flash_moe_mlx import StoreError

from ..support.faulty_models import replace_store
from ..support.models import chat_config, make_converted, smallest_limit
from ..support.serving import client, post, served, stats, wait_until
from ..support.stores import FaultyStore

pytestmark = pytest.mark.xdist_group("server_faults")

LAYERS = 12
READ_SECONDS = 1.0
PASS_SECONDS = LAYERS * READ_SECONDS
"""A forward pass with every layer's reads delayed. A client that leaves is noticed long before its end."""
PROMPT = [5, 6, 7, 8]
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FaultyStore]]:
    """Twelve layers with the fewest slots that work, so that nearly every step reads; a queue of one."""
    directory = make_converted(tmp_path_factory.mktemp("model"), config=chat_config(num_hidden_layers=LAYERS), bits=4)
    limit = smallest_limit(directory) + 2_000_000
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit=limit)
    engine = model.streaming
    store = replace_store(engine)
    store.engine, store.tokenizer = engine, tokenizer
    with engine, served(model, tokenizer, max_queue=1, max_body_bytes=20_000) as address:
        yield address, store


@pytest.fixture
def address(served_model: tuple[str, FaultyStore]) -> Iterator[str]:
    """The server, whose reads are quick and good before and after."""
    yield served_model[0]
    served_model[1].delay = 0.0
    served_model[1].fault = lambda layer, expert: None
    wait_until(lambda: not busy(served_model[0]))


@pytest.fixture
def store(served_model: tuple[str, FaultyStore], address: str) -> FaultyStore:
    return served_model[1]


def busy(address: str) -> int:
    figures = stats(address)
    return figures["running_requests"] + figures["queued_requests"]


def ask(address: str, **options: Any) -> httpx.Response:
    return post(address, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3, **options})


def leave_when(address: str, body: dict[str, Any], ready: Any) -> None:
    """Send a request by hand, and close the connection once it is time."""
    host, port = address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(ready)
        time.sleep(READ_SECONDS / 2)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_client_that_leaves_frees_the_engine_in_the_middle_of_a_pass(
    address: str, store: FaultyStore, phase: str, stream: bool
):
    before = ask(address).json()["choices"][0]["text"]
    in_decode = phase == "decode"
    store.delay = 0.02 if in_decode else READ_SECONDS
    generated = stats(address)["generated_tokens_total"]

    def is_under_way() -> bool:
        if in_decode and stats(address)["generated_tokens_total"] <= generated:
            return False
        store.delay = READ_SECONDS
        return bool(busy(address))

    leave_when(
        address, {"prompt": PROMPT[:1] if in_decode else PROMPT * 20, "max_tokens": 500, "stream": stream}, is_under_way
    )
    generated = stats(address)["generated_tokens_total"]
    freed = wait_until(lambda: not busy(address))
    print(f"freed {freed:.2f} s after the client left, of a forward pass of {PASS_SECONDS:.0f} s")
    assert freed < PASS_SECONDS / 2
    assert stats(address)["generated_tokens_total"] == generated
    store.delay = 0.0
    assert ask(address).json()["choices"][0]["text"] == before


def test_a_client_that_leaves_the_queue_frees_its_place(address: str, store: FaultyStore):
    store.delay = READ_SECONDS
    first = threading.Thread(target=ask, args=(address,), kwargs={"max_tokens": 1})
    first.start()
    wait_until(lambda: stats(address)["running_requests"])
    leave_when(address, {"prompt": PROMPT}, lambda: stats(address)["queued_requests"])
    assert wait_until(lambda: not stats(address)["queued_requests"]) < PASS_SECONDS / 2
    store.delay = 0.0
    first.join(60)


def test_a_full_queue_is_429(address: str, store: FaultyStore):
    store.delay = READ_SECONDS
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(address, max_tokens=1))) for _ in range(2)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda count=count: busy(address) == count)
    refused = ask(address)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    with pytest.raises(openai.RateLimitError):
        client(address).completions.create(model="demo", prompt=PROMPT)
    store.delay = 0.0
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert ask(address).status_code == 200


def fail_after(store: FaultyStore, error: Exception, tokens: int) -> None:
    """Reads fail once so many more tokens have gone through the model."""
    counters = store.engine.counters
    until = counters.tokens + tokens
    store.fault = lambda layer, expert: error if counters.tokens >= until else None


@pytest.mark.parametrize(
    ("error", "told"),
    [(StoreError("[ExpertStore] the disk is gone."), "the disk is gone"), (RuntimeError("secret"), "RuntimeError")],
    ids=["typed", "untyped"],
)
def test_a_failed_step_fails_its_request_only(
    address: str, store: FaultyStore, error: Exception, told: str, caplog: pytest.LogCaptureFixture
):
    before = ask(address).json()["choices"][0]["text"]
    fail_after(store, error, 0)
    failed = ask(address)
    assert failed.status_code == 500
    body = failed.json()["error"]
    assert told in body["message"] and body["type"] == "server_error" and "secret" not in body["message"]
    with pytest.raises(openai.InternalServerError, match=told):
        client(address).completions.create(model="demo", prompt=PROMPT)
    fail_after(store, error, len(PROMPT) + 2)
    chunks = iter(client(address).completions.create(model="demo", prompt=PROMPT, max_tokens=9, stream=True))
    assert next(chunks).choices[0].finish_reason is None  # what came before the failure is sent
    with pytest.raises(openai.APIError, match=told):
        list(chunks)
    assert str(error) in caplog.text
    store.fault = lambda layer, expert: None
    assert ask(address).json()["choices"][0]["text"] == before


BODIES = {
    "empty": (b"", 400),
    "no JSON": (b"{", 400),
    "no object": (b"[]", 400),
    "no UTF-8": (b'{"prompt": "\xff"}', 400),
    "UTF-16": ('{"prompt": "Hi"}'.encode("utf-16"), 400),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', 400),
    "deep": (b"[" * 9_000, 400),
    "a long number": (b'{"prompt": "Hi", "seed": ' + b"1" * 9_000 + b"}", 400),
    "not a number": (b'{"prompt": "Hi", "temperature": NaN}', 400),
    "wrong type": (b'{"prompt": 7}', 400),
    "huge": (b'{"prompt": "' + b"a" * 9_000_000 + b'"}', 413),
    "too many tokens": (json.dumps({"prompt": "a" * 9_000}).encode(), 400),
}


@pytest.mark.parametrize(("body", "status"), BODIES.values(), ids=BODIES)
def test_bodies_that_cant_be_used(address: str, body: bytes, status: int):
    answer = post(address, COMPLETIONS, content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_a_body_in_chunks_is_bounded_too(address: str):
    answer = post(address, COMPLETIONS, content=(b" " * 1000 for _ in range(100)))
    assert answer.status_code == 413


def test_chat_needs_a_template(address: str):
    answer = post(address, body={"messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 400 and "template" in answer.json()["error"]["message"]


def test_messages_that_the_template_refuses(address: str, store: FaultyStore):
    inner = store.tokenizer._tokenizer
    inner.chat_template, store.tokenizer.has_chat_template = "{{ raise_exception('roles must alternate') }}", True
    try:
        answer = post(address, body={"messages": [{"role": "user", "content": "Hi"}]})
    finally:
        inner.chat_template, store.tokenizer.has_chat_template = None, False
    assert answer.status_code == 400 and "roles must alternate" in answer.json()["error"]["message"]


def test_other_requests_get_the_same_shape(address: str):
    for answer, status in (
        (httpx.get(f"{address}/v1/none"), 404),
        (httpx.get(f"{address}{COMPLETIONS}"), 405),
        (httpx.delete(f"{address}/v1/models"), 405),
        (post(address, COMPLETIONS, content=b"{}", headers={"Content-Type": "text/plain"}), 415),
        (httpx.get(f"{address}/health", headers={"Host": "evil.example"}), 403),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_nothing_is_said_to_other_origins(address: str):
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        httpx.options(f"{address}{COMPLETIONS}", headers=origin),
        httpx.get(f"{address}/stats", headers=origin),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
