"""The files of a checkpoint: by index, by name, and, if the two disagree, by mlx-lm's rule."""

import json
from pathlib import Path

import mlx_lm.utils
import numpy as np
import pytest
from safetensors.numpy import save_file

from flash_moe_mlx import CorruptError, MissingTensorError, load_model
from flash_moe_mlx.formats.shards import INDEX_NAME, complete_by_name, read_shards

from ..support.models import make_small


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def shard(directory: Path, name: str, *tensors: str) -> Path:
    save_file({tensor: np.zeros(2, np.float32) for tensor in tensors}, directory / name)
    return directory / name


def test_shards_by_index(tmp_path: Path):
    shard(tmp_path, "model-1.safetensors", "a", "b")
    shard(tmp_path, "other.safetensors", "c")
    shard(tmp_path, "model-not-of-the-index.safetensors", "a")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "other.safetensors"})
    tensors = read_shards(tmp_path)
    assert {name: info.path.name for name, info in tensors.items()} == {
        "a": "model-1.safetensors", "b": "model-1.safetensors", "c": "other.safetensors",
    }  # fmt: skip


def test_shards_by_name(tmp_path: Path):
    shard(tmp_path, "weights.safetensors", "a")
    assert set(read_shards(tmp_path)) == {"a"}
    shard(tmp_path, "model.safetensors", "b")
    shard(tmp_path, "._model.safetensors", "c")  # what macOS leaves on foreign disks
    assert set(read_shards(tmp_path)) == {"b"}


def test_shards_may_be_links_into_a_cache(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shard(tmp_path / "blobs", "0123abcd", "a")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123abcd")
    write_index(tmp_path / "snapshot", {"a": "model.safetensors"})
    assert read_shards(tmp_path / "snapshot")["a"].path.name == "model.safetensors"


def test_absent_shards_are_named(tmp_path: Path):
    with pytest.raises(MissingTensorError, match=r"must hold \.safetensors files"):
        read_shards(tmp_path)
    shard(tmp_path, "model-00002-of-00003.safetensors", "a")
    with pytest.raises(MissingTensorError, match=r"'model-00001-of-00003\.safetensors', 'model-00003-of-00003"):
        read_shards(tmp_path)
    write_index(tmp_path, {"a": "model-00002-of-00003.safetensors", "b": "model-00003-of-00003.safetensors"})
    with pytest.raises(MissingTensorError, match=r"none named 'model-00003-of-00003\.safetensors'\. Download"):
        read_shards(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").symlink_to("gone")
    with pytest.raises(MissingTensorError, match="'model-00003-of-00003"):
        read_shards(tmp_path)


def test_tensors_absent_or_twice(tmp_path: Path):
    shard(tmp_path, "model-1.safetensors", "a")
    shard(tmp_path, "model-2.safetensors", "b")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    with pytest.raises(MissingTensorError, match=r"'b' must be in model-1\.safetensors"):
        read_shards(tmp_path)
    shard(tmp_path, "model-2.safetensors", "a")
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(CorruptError, match=r"'a' in model-1\.safetensors and model-2\.safetensors\. Remove"):
        read_shards(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a/model.safetensors", "..", ".", "", "config.json", 5, None,
     "C:model.safetensors", "a\\model.safetensors", "a\0.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors",
     ["model.safetensors"], "model.safetensors/", "model.safetensors\n"],
    ids=ascii,
)  # fmt: skip
def test_index_stays_inside_the_directory(tmp_path: Path, name: object):
    inside = tmp_path / "inside"
    (inside / "a").mkdir(parents=True)
    for directory in (tmp_path, inside, inside / "a"):
        shard(directory, "model.safetensors", "x")
    write_index(inside, {"x": name})
    with pytest.raises(CorruptError, match="weight_map must hold names of"):
        read_shards(inside)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "valid JSON"),
        (b"[]", "JSON object"),
        (b"{}", "weight_map must map"),
        (b'{"weight_map": []}', "weight_map must map"),
        (b'{"weight_map": {}}', "weight_map must map"),
        (b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' twice"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_index(tmp_path: Path, index: bytes, message: str):
    shard(tmp_path, "model.safetensors", "a")
    (tmp_path / INDEX_NAME).write_bytes(index)
    with pytest.raises(CorruptError, match=message):
        read_shards(tmp_path)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two whole shards, with the tensors a and b."""
    shard(tmp_path, FIRST, "a")
    shard(tmp_path, SECOND, "b")
    return tmp_path


LEFT_OVER = {
    "of more files": {"a": "model-00001-of-00013.safetensors", "b": "model-00013-of-00013.safetensors"},
    "of one file": {"a": "model.safetensors", "b": "model.safetensors"},
    "of the same files, otherwise divided": {"a": SECOND, "b": FIRST},
    "of the same files, other names": {"x.gate_up_proj": FIRST, "x.down_proj": SECOND},
    "of another stem": {"a": "pytorch-00001-of-00002.safetensors"},
}


@pytest.mark.parametrize("index", LEFT_OVER.values(), ids=LEFT_OVER)
def test_an_index_of_another_build_beside_whole_shards(two: Path, index: dict[str, str]):
    write_index(two, index)
    assert {name: info.path.name for name, info in read_shards(two).items()} == {"a": FIRST, "b": SECOND}


@pytest.mark.parametrize(
    "name",
    ["model.visual.blocks.0.attn.qkv.weight", "vision_tower.x.weight", "mtp.fc.weight", "model.mtp.layers.0.x.weight",
     "multi_modal_projector.linear_1.weight", "model.vision_model.x.weight", "audio_tower.conv.weight",
     "visual.x.bias"],
)  # fmt: skip
@pytest.mark.parametrize("file", [FIRST, "mtp.safetensors", "model-00009-of-00009.safetensors"])
def test_tensors_that_a_conversion_dropped(two: Path, name: str, file: str):
    write_index(two, {"a": FIRST, "b": SECOND, name: file})
    assert set(read_shards(two)) == {"a", "b"}


def test_an_index_of_another_build_beside_one_whole_file(tmp_path: Path):
    shard(tmp_path, "model.safetensors", "a")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert set(read_shards(tmp_path)) == {"a"}


def test_unfinished_downloads_are_still_told_apart(two: Path):
    """By the files' own numbering, the index's where it is the same, and tensors that an index of this build has."""
    write_index(two, {"a": FIRST, "b": SECOND, "visual.c": "model-00003-of-00003.safetensors"})
    (two / SECOND).unlink()
    with pytest.raises(MissingTensorError, match=SECOND):
        read_shards(two)
    write_index(two, {"a": "model-00001-of-00013.safetensors"})
    with pytest.raises(MissingTensorError, match="model-00001-of-00013"):
        read_shards(two)
    (two / INDEX_NAME).unlink()
    with pytest.raises(MissingTensorError, match=SECOND):
        read_shards(two)
    shard(two, SECOND, "b")
    write_index(two, {"a": FIRST, "b": SECOND, "c": SECOND})
    with pytest.raises(MissingTensorError, match="'c' must be in"):
        read_shards(two)
    write_index(two, {"a": FIRST, "b": "model-00003-of-00002.safetensors"})
    with pytest.raises(MissingTensorError, match="model-00003-of-00002"):
        read_shards(two)


@pytest.mark.parametrize(
    ("names", "complete"),
    [
        ([FIRST, SECOND], True),
        (["model.safetensors"], True),
        (["model.safetensors", "mtp.safetensors"], True),
        ([FIRST], False),
        ([FIRST, SECOND, "model.safetensors"], False),
        ([FIRST, SECOND, "model-00001-of-00003.safetensors"], False),
        (["model-1.safetensors"], False),
        (["weights.safetensors"], False),
        ([], False),
    ],
)
def test_complete_by_name(names: list[str], complete: bool):
    assert bool(complete_by_name(names)) is complete


def test_what_mlx_lm_loads_beside_an_old_index_loads_here(tmp_path: Path):
    directory = make_small(tmp_path / "model")
    index = json.loads((directory / INDEX_NAME).read_text())
    names = list(index["weight_map"])
    index["weight_map"] = {name: f"model-{1 + i % 13:05}-of-00013.safetensors" for i, name in enumerate(names)}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    mlx_lm.utils.load_model(directory, lazy=True)
    load_model(directory, memory_limit="1GB", max_context=64).streaming.close()
