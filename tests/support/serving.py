"""A server on a free port, in a thread of the test's process, so that tests reach the model that it serves."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import httpx
import openai
import uvicorn

import flash_moe_mlx
from flash_moe_mlx.server.app import create_app
from flash_moe_mlx.server.config import ServerConfig

from .models import forget_peak

STORY = [{"role": "user", "content": "Tell me a story about a small fox."}]
SUM = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Lisbon?"}]
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHAT = "/v1/chat/completions"
TIGHT: dict[str, Any] = {"memory_limit": "22MB", "max_context": 256, "prefix_cache": "3MB"}
"""The demo's arguments with room for about half of its experts, and for four copies of states."""


@contextlib.contextmanager
def served(model: Any, tokenizer: Any, **config: Any) -> Iterator[str]:
    """Serve it as "demo"; yields the address."""
    app = create_app(model, tokenizer, ServerConfig(**{"model_id": "demo", **config}))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@contextlib.contextmanager
def demo(memory_limit: str = "1GB", max_context: int = 8192, **config: Any) -> Iterator[str]:
    """Serve the embedded model; yields the address."""
    demo_path = files("flash_moe_mlx") / "demo"
    forget_peak()
    model, tokenizer = flash_moe_mlx.load(demo_path, memory_limit=memory_limit, max_context=max_context)
    with model.streaming, served(model, tokenizer, **config) as address:
        yield address


def client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


def post(address: str, path: str = CHAT, body: Any = None, **options: Any) -> httpx.Response:
    """Post a body, JSON unless ``content`` is given."""
    if "content" not in options:
        options["content"] = json.dumps(body)
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{address}{path}", headers=headers, timeout=60, **options)


def stats(address: str) -> dict[str, Any]:
    return httpx.get(f"{address}/stats").json()


def wait_until(condition: Any, seconds: float = 30.0) -> float:
    """Seconds until it holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - started
