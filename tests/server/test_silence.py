"""No stream is silent for long, whatever takes the time. A phase lasts until the client has seen signs of life."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from flash_moe_mlx.server import app, worker

from ..support.chat_models import QWEN3_NEXT
from ..support.scripted import Script, scripted

pytestmark = pytest.mark.xdist_group("clients")  # they share one model

GAP_SECONDS = 5.0
"""Longest time without a byte. The interval is shorter here than it is, so that a loaded machine keeps the bound."""

FIELDS = {"model": "demo", "stream": True, "max_tokens": 500}
ASK = [{"role": "user", "content": "Edit a file."}]
SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}}}
FUNCTION = {"type": "function", "function": {"name": "apply_patch", "parameters": SCHEMA}}
CUSTOM = {"type": "custom", "name": "apply_patch", "description": "Edit."}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Edit a file.", **FIELDS},
    "/v1/chat/completions": {"messages": ASK, "tools": [FUNCTION], **FIELDS},
    "/v1/messages": {"messages": ASK, "tools": [{"name": "apply_patch", "input_schema": SCHEMA}], **FIELDS},
    "/v1/responses": {"model": "demo", "stream": True, "input": ASK, "tools": [CUSTOM]},
}
ALIVE = (b": keep-alive", b"event: ping")


@pytest.fixture(scope="module")
def serve() -> Iterator[tuple[Any, Script]]:
    with pytest.MonkeyPatch.context() as patch, scripted(patch) as serving:
        yield serving


class Client:
    """A client that measures the time between bytes; one gap too long is an error."""

    def __init__(self, response: httpx.Response):
        self._chunks = response.iter_raw()
        self._last = time.monotonic()
        self.said = b""
        self.longest = 0.0

    def read(self, enough: Callable[[bytes], bool]) -> None:
        """Read until what is read is enough, or all."""
        before = len(self.said)
        for chunk in self._chunks:
            now = time.monotonic()
            self.longest, self._last = max(self.longest, now - self._last), now
            self.said += chunk
            if enough(self.said[before:]):
                return

    def see_life(self) -> None:
        """Read two signs of life."""
        self.read(lambda said: sum(map(said.count, ALIVE)) >= 2)


def test_the_interval_leaves_room():
    """A part that isn't sent may come just before the interval ends, and begins another."""
    assert 2 * app.KEEP_ALIVE_SECONDS < GAP_SECONDS


@pytest.mark.parametrize("route", ROUTES)
def test_no_gap_in_a_stream(serve: Any, monkeypatch: pytest.MonkeyPatch, route: str):
    """Preparation (schemas), the queue, the prompt, and a call of which nothing can be sent before its end."""
    start, script = serve
    pace = 0.02 if route == "/v1/responses" else 0.0
    monkeypatch.setattr(app, "KEEP_ALIVE_SECONDS", 0.05 + 10 * pace)
    prepare = worker.constraint_for
    prepared, held, prompt_read = (threading.Event() for _ in range(3))

    def slowly(*args: Any, **kwargs: Any) -> Any:
        assert prepared.wait(60)
        return prepare(*args, **kwargs)

    call = json.dumps({"name": "apply_patch", "arguments": {"input": "x" * 30}})
    script.play(QWEN3_NEXT.tokenizer, "ok", f"<tool_call>\n{call}\n</tool_call>")
    script.gates = [held, prompt_read]
    with (
        start(QWEN3_NEXT.tokenizer) as address,
        ThreadPoolExecutor(1) as pool,
        httpx.Client(timeout=GAP_SECONDS) as api,
    ):
        url = address + "/v1/completions"
        other = pool.submit(httpx.post, url, json={"model": "demo", "prompt": "Hi", "max_tokens": 9}, timeout=60)
        try:
            while script.gates[0:1] == [held]:
                time.sleep(0.01)
            monkeypatch.setattr(worker, "constraint_for", slowly)
            monkeypatch.setattr(script, "seconds", pace)
            with api.stream("POST", address + route, json=ROUTES[route]) as response:
                assert response.status_code == 200
                client = Client(response)
                for phase in (prepared, held, prompt_read):
                    client.see_life()
                    phase.set()
                before = len(client.said)
                client.read(lambda said: False)
        finally:
            for phase in (prepared, held, prompt_read):
                phase.set()
        assert other.result().status_code == 200
    assert client.longest < GAP_SECONDS
    last = client.said[before:]
    if route == "/v1/responses":  # the text in free form comes at the end
        begun, told = last.index(b"response.output_item.added"), last.index(b"custom_tool_call_input.delta")
        assert ALIVE[0] in last[begun:told]
    assert (
        b"message_stop" if route == "/v1/messages" else b"[DONE]" if "completions" in route else b"completed"
    ) in last


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_refused_after_a_long_preparation_ends_the_stream(
    serve: Any, monkeypatch: pytest.MonkeyPatch, route: str
):
    start, _ = serve
    monkeypatch.setattr(app, "KEEP_ALIVE_SECONDS", 0.05)
    prepared = threading.Event()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        assert prepared.wait(60)
        raise worker.ApiError(400, "tools must be simpler.", param="tools")

    monkeypatch.setattr(worker, "constraint_for", refuse)
    with start(QWEN3_NEXT.tokenizer) as address, httpx.Client(timeout=GAP_SECONDS) as api:
        try:
            with api.stream("POST", address + route, json=ROUTES[route]) as response:
                assert response.status_code == 200
                client = Client(response)
                client.see_life()
                prepared.set()
                client.read(lambda said: False)
        finally:
            prepared.set()
    assert b"tools must be simpler." in client.said and b"error" in client.said
