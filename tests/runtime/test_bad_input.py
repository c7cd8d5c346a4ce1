"""Bad input to load and generate: each a typed error that says what to do, with nothing left behind."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.errors import HfHubHTTPError

import flash_moe_mlx
from flash_moe_mlx import (
    CheckpointError,
    FlashMoEError,
    MemoryLimitError,
    RequestError,
    StoreError,
    generate,
    load,
    load_model,
    stream_generate,
)
from flash_moe_mlx.runtime import loading

from ..support.models import VOCABULARY, make_small
from ..support.refusals import assert_refused


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def loaded(good: Path) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = load(good, memory_limit="1GB", max_context=64)
    with model.streaming:
        yield model, tokenizer


def test_the_undamaged_checkpoint_loads(loaded: tuple[Any, Any]):
    assert generate(*loaded, "Hello", max_tokens=4)


ARGUMENTS: dict[str, tuple[dict[str, Any], type[FlashMoEError], str]] = {
    **{
        f"memory_limit {value!r}": ({"memory_limit": value}, RequestError, "memory_limit")
        for value in ("8 bananas", "", "-8GB", "GB", 0, -1, True, 1.5, b"8GB", "nan", "0GB")
    },
    "memory_limit too small": ({"memory_limit": "1MB"}, MemoryLimitError, "must be at least"),
    **{
        f"num_experts_per_tok {value!r}": ({"num_experts_per_tok": value}, RequestError, "num_experts_per_tok")
        for value in (0, -1, 9, True, 2.0, "2")
    },
    **{
        f"max_context {value!r}": ({"max_context": value}, RequestError, "max_context")
        for value in (0, -5, True, 1e3, "64")
    },
    **{f"io {value!r}": ({"io": value}, RequestError, "io") for value in ("fast", "", None, 3, ["pread"])},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_argument(case: str, good: Path):
    arguments, kind, words = ARGUMENTS[case]
    arguments = {"memory_limit": "1GB", **arguments}
    assert_refused(lambda: load(good, **arguments), kind, words)
    assert_refused(lambda: load_model(good, **arguments), kind, words)


def test_a_refused_limit_names_one_that_works(good: Path):
    for size in (1, 10**6, 20 * 10**6):
        with pytest.raises(MemoryLimitError) as refused:
            load_model(good, memory_limit=size)
        smallest = refused.value.smallest_limit_bytes or 0
        named = str(refused.value).split('memory_limit="')[1].split('"')[0]
        for limit in (smallest, named):
            with load_model(good, memory_limit=limit).streaming as engine:
                assert engine.stats().memory_limit_bytes >= smallest
        assert_refused(lambda limit=smallest - 1: load_model(good, memory_limit=limit), MemoryLimitError, "at least")


@pytest.mark.parametrize("path", ["/no/such/path", "./model", "~nobody/model", "model", "a/b/c", "a\0b", "x" * 5000])
def test_no_such_path(path: str):
    assert_refused(lambda: load(path), CheckpointError, "must be a directory or a hub repository")
    assert_refused(lambda: load_model(Path(path)), CheckpointError, "Check the path")


def test_a_file_in_place_of_a_directory(good: Path):
    assert_refused(lambda: load(good / "config.json"), CheckpointError, "got a file")


def test_a_repository_without_network(monkeypatch: pytest.MonkeyPatch):
    """For real: a proxy where nobody listens."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    huggingface_hub.close_session()
    try:
        started = time.perf_counter()
        with pytest.raises(CheckpointError, match=r"\[load\] no-one/nothing must be .* Check name and network"):
            load("no-one/nothing")
        assert time.perf_counter() - started < 20
    finally:
        huggingface_hub.close_session()


def test_a_repository_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(lambda: load("no-one/nothing"), CheckpointError, "Check name and network")


@pytest.mark.parametrize("error", [HfHubHTTPError.__bases__[0]("reset"), HfHubHTTPError.__bases__[0](""), OSError()])
def test_a_network_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "snapshot_download", fail)
    assert_refused(lambda: load("some-one/something"), CheckpointError, "some-one/something")


@pytest.mark.parametrize("name", ["some one/some thing", "a/--b", "a/b.git"])
def test_a_name_that_no_repository_can_have(name: str):
    assert_refused(lambda: load(name), CheckpointError, "Check name and network")


REQUESTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty text": ("", {}, "prompt"),
    "no tokens": ([], {}, "prompt"),
    "empty array": (mx.array([], mx.uint32), {}, "prompt"),
    "two dimensions": (mx.array([[1, 2]]), {}, "prompt"),
    "too long": ([1] * 65, {}, "max_context = 64"),
    "not numbers": (["a"], {}, "prompt"),
    "not a prompt": (None, {}, "prompt"),
    "a token that isn't": ([1, VOCABULARY], {}, "prompt"),
    "a negative token": ([1, -1], {}, "prompt"),
    "no max_tokens": ([1], {"max_tokens": 0}, "max_tokens"),
    "max_tokens text": ([1], {"max_tokens": "4"}, "max_tokens"),
    "max_tokens below -1": ([1], {"max_tokens": -5}, "at least 1, or -1 for no limit"),
    "messages": ([{"role": "user", "content": "Hi"}], {}, r"tokenizer\.apply_chat_template\(messages"),
    "prefill_step_size 0": ([1], {"prefill_step_size": 0}, "prefill_step_size"),
    "embeddings of another length": ([1, 2], {"input_embeddings": mx.zeros((3, 64))}, "input_embeddings"),
    "embeddings of a batch": ([1, 2], {"input_embeddings": mx.zeros((1, 2, 64))}, "input_embeddings"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_bad_request(case: str, loaded: tuple[Any, Any]):
    prompt, arguments, words = REQUESTS[case]
    expected = generate(*loaded, "Hello", max_tokens=4)
    assert_refused(lambda: stream_generate(*loaded, prompt, **arguments), RequestError, words)
    assert_refused(lambda: generate(*loaded, prompt, **arguments), RequestError, words)
    assert generate(*loaded, "Hello", max_tokens=4) == expected


def test_a_context_that_ends(loaded: tuple[Any, Any]):
    model, _ = loaded
    with pytest.raises(RequestError, match="max_context = 64"):
        model(mx.ones((1, 65), mx.uint32))
    assert len(list(stream_generate(*loaded, [1] * 64, -1))) == 1


def test_every_error_is_exported():
    for kind in (CheckpointError, MemoryLimitError, RequestError, StoreError):
        assert issubclass(kind, flash_moe_mlx.FlashMoEError)
    assert issubclass(RequestError, ValueError)
