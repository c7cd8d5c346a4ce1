"""The threat model's lines (docs/security.md) that no other test shows, and that every test it names exists."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import flash_moe_mlx
from flash_moe_mlx import PrefixCache, RequestError, RoutingTrace, chat_prompt
from flash_moe_mlx.errors import CheckpointError
from flash_moe_mlx.server.response_store import ResponseStore

from .support.serving import post, served

ROOT = Path(__file__).parents[1]
DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
SECRET = "the password is swordfish"


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    model, tokenizer = flash_moe_mlx.load(DEMO, memory_limit="1GB", max_context=512)
    with model.streaming:
        yield model, tokenizer


@pytest.fixture(scope="module")
def address(loaded: Any) -> Iterator[str]:
    with served(*loaded, prefix_cache=None) as address:
        yield address


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_every_line_names_a_test():
    for line in (ROOT / "docs" / "security.md").read_text().splitlines():
        if line.startswith("| ") and " can't | because | test |" not in line:
            assert "::test_" in line, line


PIPES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "experts.json", "model.safetensors.index.json", "added_tokens.json"]  # fmt: skip


@pytest.mark.parametrize("name", PIPES)
def test_pipes_in_a_checkpoint_are_refused(name: str, tmp_path: Path):
    for path in DEMO.iterdir():
        if path.name != name and path.is_file():
            (tmp_path / path.name).symlink_to(path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="must be a file, got something else"):
        flash_moe_mlx.load(tmp_path)


@pytest.mark.parametrize(
    "template",
    ["{% include '/etc/passwd' %}", "{% import '/etc/passwd' as a %}{{ a }}", "{% extends '/etc/passwd' %}",
     "{{ self.__init__.__globals__ }}x{{ cycler.__init__.__globals__.os.popen('id').read() }}",
     "{{ ''.__class__.__base__.__subclasses__()[0].x }}", "{{ lipsum.__globals__['os'].environ.x }}"],
)  # fmt: skip
def test_templates_reach_no_file(template: str, loaded: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loaded[1]._tokenizer, "chat_template", template)
    with pytest.raises(RequestError, match=r"\[messages\]"):
        chat_prompt(loaded[1], [{"role": "user", "content": "hi"}])


def test_pages_of_other_origins_drive_nothing(address: str):
    """What a browser sends without asking first (simple requests) is refused, and its question is answered with no."""
    body = '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}'
    origin = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
                 "text/plain; application/json"):  # fmt: skip
        answer = post(address, content=body, headers={**origin, "Content-Type": kind})
        assert answer.status_code == 415, kind
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = httpx.options(f"{address}/v1/chat/completions", headers=asked)
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_conversations_are_found_by_random_ids_only(address: str):
    kept = post(address, "/v1/responses", {"input": SECRET, "max_output_tokens": 16}).json()["id"]
    assert re.fullmatch(r"resp_[0-9a-f]{32}", kept)
    for path in ("/v1/responses", "/v1/responses/", "/v1/responses/resp_", "/v1/responses/*", "/v1/responses/%2e%2e"):
        answer = httpx.get(f"{address}{path}")
        assert answer.status_code in (404, 405) and "swordfish" not in answer.text
    body = {"input": "Go on.", "previous_response_id": "resp_" + "0" * 32}
    assert post(address, "/v1/responses", body).status_code == 404
    store = ResponseStore()
    store.put("resp_a", [{"role": "user", "content": SECRET}], {})
    assert store.get("resp_") is None and store.get("") is None


def test_figures_hold_no_words(address: str):
    post(address, body={"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2})
    for path in ("/stats", "/metrics", "/health", "/v1/models"):
        assert "swordfish" not in httpx.get(f"{address}{path}").text
    refused = post(address, body={"messages": [{"role": "user", "content": SECRET}], "n": 2})
    assert refused.status_code == 400 and "swordfish" not in refused.text


@pytest.mark.parametrize("where", ["file:///etc/passwd", "http://127.0.0.1:9/x.json", "../../etc/passwd"])
def test_schemas_fetch_nothing(where: str, address: str):
    schema = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": where}}}}
    answer = post(address, body={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **schema})
    assert answer.status_code == 400 and "root:" not in answer.text


def test_pipes_in_a_prefix_directory_are_ignored(tmp_path: Path, loaded: Any):
    with PrefixCache(loaded[0], "1MB", tmp_path) as cache:
        experts: Any = cache._files._experts_path
    experts.unlink(missing_ok=True)
    os.mkfifo(experts)
    os.mkfifo(tmp_path / "prefix-0.safetensors")
    (tmp_path / "prefix-1.safetensors").symlink_to("/dev/zero")
    (tmp_path / "prefix-2.safetensors").symlink_to(tmp_path / "prefix-2.safetensors")
    with PrefixCache(loaded[0], "1MB", tmp_path) as cache:
        assert len(cache) == 0


class Payload:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of a trace has run",))


def test_traces_unpickle_nothing(tmp_path: Path):
    arrays: dict[str, Any] = dict.fromkeys(("experts", "phase", "layers", "num_experts"), np.array([Payload()], object))
    np.savez(tmp_path / "trace.npz", **arrays)
    with pytest.raises(RequestError, match="trace"):
        RoutingTrace.read(tmp_path / "trace.npz")
