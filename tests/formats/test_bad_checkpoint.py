"""Bad checkpoints through load and load_model: each a typed error that says what to do, with nothing left behind."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flash_moe_mlx import (
    CheckpointError,
    CorruptError,
    FlashMoEError,
    MissingTensorError,
    UnsupportedModelError,
    load,
    load_model,
)

from ..support.checkpoints import text_config
from ..support.models import make_small
from ..support.refusals import assert_refused

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
NORM = "language_model.model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


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
NF4 = {"mode": "nf4", "bits": 4, "group_size": 64}
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
    "unknown mode": (lambda d: edit_config(d, quantization=NF4), UnsupportedModelError, "nf4"),
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


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (None, CheckpointError), ("", CorruptError), ("{oops", CorruptError), ("{}", CheckpointError),
        ("[]", CorruptError), (LFS_POINTER, CorruptError),
    ],
)  # fmt: skip
def test_bad_tokenizer(text: str | None, kind: type[FlashMoEError], copy: Path):
    (copy / "tokenizer.json").unlink()
    if text is not None:
        (copy / "tokenizer.json").write_text(text)
    assert_refused(lambda: load(copy, memory_limit="1GB"), kind, "tokenizer")
    load_model(copy, memory_limit="1GB").streaming.close()
