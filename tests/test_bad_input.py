"""Bad input to load and generate: each a typed error that says what to do, with nothing left behind."""

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.errors import HfHubHTTPError

import flash_moe_mlx
from flash_moe_mlx import (
    CheckpointError,
    CorruptError,
    FlashMoEError,
    MemoryLimitError,
    MissingTensorError,
    RequestError,
    StoreError,
    UnsupportedModelError,
    generate,
    load,
    load_model,
    loading,
    stream_generate,
)

from .support.checkpoints import make_checkpoint, text_config
from .support.models import EOS, VOCABULARY, held, write_tokenizer

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
NORM = "language_model.model.layers.0.input_layernorm.weight"
MESSAGE = r"(?s)\[[^\]]+\] .+, got .+\. [A-Z].+[.\"]\Z"
"""`[where] what must hold, got what. What to do.`"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with an index, 4 bits, and a tokenizer."""
    directory = tmp_path_factory.mktemp("good") / "model"
    make_checkpoint(directory, bits=4, shards=3, config=text_config(vocab_size=VOCABULARY, eos_token_id=EOS))
    write_tokenizer(directory)
    return directory


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def loaded(good: Path) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = load(good, memory_limit="1GB", max_context=64)
    with model.streaming:
        yield model, tokenizer


def assert_refused(call: Callable[[], object], kind: type[FlashMoEError], words: str) -> None:
    """A typed error with a message in the house's form; no thread, no file and no weight left behind."""
    mx.synchronize()
    before, active = held(), mx.get_active_memory()
    try:  # not pytest.raises: it would keep what the frames hold
        call()
    except FlashMoEError as error:
        got, message = type(error), str(error)
    else:
        pytest.fail("nothing was raised")
    assert got is kind, message
    assert re.search(words, message), message
    assert re.match(MESSAGE, message), f"not in the house's form: {message}"
    assert held() == before
    assert mx.get_active_memory() <= active + 4096


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(directory: Path, **changes: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= changes
    (directory / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a shard's header; the data stays as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_tensors(directory: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Rewrite the checkpoint as one shard without an index, with other tensors."""
    tensors: dict[str, mx.array] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= mx.load(str(path))
    mx.eval(tensors)
    for path in [*directory.glob("*.safetensors"), directory / INDEX]:
        path.unlink()
    change(tensors)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "mlx"})


def overlap(header: dict[str, Any]) -> None:
    first, second = [entry for name, entry in header.items() if name != "__metadata__"][:2]
    begin = first["data_offsets"][0]
    second["data_offsets"] = [begin, begin + second["data_offsets"][1] - second["data_offsets"][0]]


def out_of_range(header: dict[str, Any]) -> None:
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    entry["data_offsets"] = [offset + (1 << 40) for offset in entry["data_offsets"]]


def truncate(path: Path, nbytes: int) -> None:
    os.truncate(path, nbytes if nbytes >= 0 else path.stat().st_size + nbytes)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"
MXFP4 = {"mode": "mxfp4", "bits": 4, "group_size": 32}
Damage = Callable[[Path], Any]
CHECKPOINTS: dict[str, tuple[Damage, type[FlashMoEError], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), MissingTensorError, "config.json"),
    "empty config": (lambda d: (d / "config.json").write_text(""), CorruptError, "config.json"),
    "invalid JSON": (lambda d: (d / "config.json").write_text('{"model_type": '), CorruptError, "config.json"),
    "config no object": (lambda d: (d / "config.json").write_text("[1]"), CorruptError, "config.json"),
    "unknown model_type": (lambda d: edit_config(d, model_type="mamba9"), UnsupportedModelError, "mamba9"),
    "no model_type": (lambda d: edit_config(d, model_type=None), UnsupportedModelError, "None"),
    "missing dimension": (
        lambda d: edit_config(d, text_config=text_config(hidden_size=None)), CorruptError, "hidden_size"),
    "negative dimension": (
        lambda d: edit_config(d, text_config=text_config(head_dim=-1)), CorruptError, "head_dim"),
    "more experts": (lambda d: edit_config(d, text_config=text_config(num_experts=9)), CorruptError, "9 experts"),
    "K over E": (
        lambda d: edit_config(d, text_config=text_config(num_experts_per_tok=9)), CorruptError, "num_experts_per_tok"),
    "missing shard": (lambda d: (d / SECOND).unlink(), MissingTensorError, SECOND),
    "no shards": (lambda d: [p.unlink() for p in d.glob("model*")], MissingTensorError, "safetensors"),
    "shard cut short": (lambda d: truncate(d / SECOND, -1), CorruptError, "truncated by 1 bytes"),
    "shard cut in its header": (lambda d: truncate(d / SECOND, 100), CorruptError, "truncated"),
    "empty shard": (lambda d: truncate(d / SECOND, 0), CorruptError, "empty"),
    "LFS pointer": (lambda d: (d / SECOND).write_text(LFS_POINTER), CorruptError, "git lfs pull"),
    "index of an absent tensor": (lambda d: edit_index(d, **{"absent.weight": SECOND}), MissingTensorError, "absent"),
    "index of an absent shard": (
        lambda d: edit_index(d, **{NORM: "model-00009-of-00003.safetensors"}), MissingTensorError, "00009"),
    "index that leaves": (lambda d: edit_index(d, **{NORM: "../x.safetensors"}), CorruptError, "names of .safetensors"),
    "overlapping offsets": (lambda d: edit_header(d / SECOND, overlap), CorruptError, "overlap"),
    "offsets out of range": (lambda d: edit_header(d / SECOND, out_of_range), CorruptError, SECOND),
    "mxfp4": (lambda d: edit_config(d, quantization=MXFP4), UnsupportedModelError, "mxfp4"),
    "dense tensor missing": (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), MissingTensorError, NORM),
    "dense tensor of another shape": (
        lambda d: edit_tensors(d, lambda t: t.update({NORM: mx.ones(3)})), CorruptError, NORM),
    "dense tensor nobody knows": (
        lambda d: edit_tensors(d, lambda t: t.update({"language_model.model.odd.weight": mx.ones(3)})),
        UnsupportedModelError, "odd"),
    "expert tensor missing": (
        lambda d: edit_tensors(d, lambda t: t.pop("language_model.model.layers.1.mlp.switch_mlp.up_proj.weight")),
        MissingTensorError, "layers.1.mlp.switch_mlp.up_proj"),
    "a layer without experts": (
        lambda d: edit_tensors(d, lambda t: [t.pop(n) for n in list(t) if "layers.2.mlp.switch_mlp" in n]),
        MissingTensorError, "layer 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case: str, copy: Path):
    damage, kind, words = CHECKPOINTS[case]
    damage(copy)
    assert_refused(lambda: load(copy, memory_limit="1GB"), kind, words)
    assert_refused(lambda: load_model(str(copy), memory_limit="1GB"), kind, words)


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


@pytest.mark.parametrize("text", [None, "", "{oops", "{}", "[]", LFS_POINTER])
def test_bad_tokenizer(text: str | None, copy: Path):
    (copy / "tokenizer.json").unlink()
    if text is not None:
        (copy / "tokenizer.json").write_text(text)
    assert_refused(lambda: load(copy, memory_limit="1GB"), CheckpointError, "tokenizer")
    load_model(copy, memory_limit="1GB").streaming.close()


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
