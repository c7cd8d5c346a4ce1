"""The packed format's own files: what is written, what is read back, and every broken one refused, with its reason."""

import json
import random
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors
from hypothesis import given, settings

from flash_moe_mlx import pack
from flash_moe_mlx.errors import CheckpointError, CorruptError, MissingTensorError, UnsupportedModelError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.expert_layout import Quantization, RecordLayout
from flash_moe_mlx.formats.packed_format import (
    MANIFEST_NAME,
    PAGE_BYTES,
    Manifest,
    PackedLayer,
    StoredFile,
    parse_manifest,
    read_layer,
)
from flash_moe_mlx.formats.safetensors_header import read_header, read_metadata

from ..support.checkpoints import make_checkpoint, text_config


def layer(number: int = 0, experts: int = 3) -> PackedLayer:
    shapes = {
        ("gate_proj", "weight"): ("U32", (32, 8)), ("gate_proj", "scales"): ("BF16", (32, 1)),
        ("gate_proj", "biases"): ("BF16", (32, 1)), ("up_proj", "weight"): ("F16", (32, 64)),
        ("down_proj", "weight"): ("BF16", (64, 32)), ("down_proj", "bias"): ("BF16", (64,)),
    }  # fmt: skip
    quantizations = {"gate_proj": Quantization(4, 64), "up_proj": None, "down_proj": None}
    layout = RecordLayout.contiguous(shapes, quantizations)
    checksums = tuple(zlib.crc32(bytes([number, expert])) for expert in range(experts))
    return PackedLayer(number, f"model.layers.{number}.mlp.switch_mlp", experts, layout, checksums)


MANIFEST = Manifest(
    layers={0: layer(0), 11: layer(11, 5)},
    files={"model.safetensors": StoredFile(1000, 7), "config.json": StoredFile(10, 0xFFFFFFFF)},
    source={
        "name": "someone/model",
        "revision": None,
        "samples": None,
        "format": "mlx",
        "files": {"model.safetensors": 5000},
    },
    conversion={"bits": 4},
    quantization_error={},
)


def test_manifest_comes_back():
    data = MANIFEST.to_bytes()
    assert parse_manifest(data) == MANIFEST
    assert parse_manifest(data).to_bytes() == data
    text, checksum = re.fullmatch(rb'(.*),\n "manifest_crc32": "([0-9a-f]{8})"\n}\n', data, re.DOTALL).groups()
    assert int(checksum, 16) == zlib.crc32(text)


def test_layer_file_is_safetensors_and_aligned(tmp_path: Path):
    one = layer(3)
    assert one.file_name == "experts/layer_03.safetensors"
    assert (one.payload_bytes, one.stride) == (9472, PAGE_BYTES)
    path = tmp_path / "layer_03.safetensors"
    path.write_bytes(one.header() + bytes(one.file_bytes - one.data_offset))
    assert one.data_offset % PAGE_BYTES == 0
    ((name, info),) = read_header(path).items()
    assert (name, info.dtype, info.shape) == ("layers.3.records", "U8", (3, PAGE_BYTES))
    assert info.offset == one.data_offset
    assert read_metadata(path) == one.metadata()
    ((name, tensor),) = safetensors.deserialize(path.read_bytes())  # the format's own reader takes it too
    assert (name, tensor["shape"]) == ("layers.3.records", [3, PAGE_BYTES])


def change(**fields: Any) -> bytes:
    """The manifest with other fields, and the checksum made right."""
    value = json.loads(MANIFEST.to_bytes())
    value.pop("manifest_crc32")
    return seal(value | fields)


def seal(value: Any) -> bytes:
    text = json.dumps(value, indent=1).removesuffix("\n}").encode()
    return text + f',\n "manifest_crc32": "{zlib.crc32(text):08x}"\n}}\n'.encode()


def change_layer(**fields: Any) -> bytes:
    entries = json.loads(MANIFEST.to_bytes())["layers"]
    return change(layers=[entries[0] | fields, entries[1]])


def change_part(index: int, **fields: Any) -> bytes:
    layout = json.loads(MANIFEST.to_bytes())["layers"][0]["layout"]
    names = ("name", "dtype", "shape", "offset")
    layout["parts"][index] = [fields.get(name, old) for name, old in zip(names, layout["parts"][index], strict=True)]
    return change_layer(layout=layout)


REFUSED: dict[str, tuple[bytes, type[CheckpointError], str]] = {
    "empty": (b"", CorruptError, "valid JSON"),
    "a list": (b"[]", CorruptError, "must be an object"),
    "another format": (change(format="gguf"), CorruptError, "format must be 'flash-moe-packed'"),
    "a later version": (change(version=3), UnsupportedModelError, "version must be 1 or 2, got 3. Update"),
    "a share without members": (change(version=2), CorruptError, "must be an object of .*share"),
    "a version in words": (change(version="1"), UnsupportedModelError, "version"),
    "true as version": (change(version=True), UnsupportedModelError, "version"),
    "an unknown field": (change(extra=1), CorruptError, "must be an object of"),
    "no layers": (change(layers=[]), CorruptError, "layers must list at least one"),
    "a layer twice": (change(layers=json.loads(MANIFEST.to_bytes())["layers"][:1] * 2), CorruptError, "ascend"),
    "another checksum": (MANIFEST.to_bytes().replace(b"someone", b"anybody"), CorruptError, "CRC-32"),
    "more behind it": (MANIFEST.to_bytes() + b"\n", CorruptError, "CRC-32"),
    "a negative layer": (change_layer(layer=-1), CorruptError, "integer from 0"),
    "another layer's module": (change_layer(module="model.layers.1.mlp"), CorruptError, "module must be of this layer"),
    "a file elsewhere": (change_layer(file="../../etc/passwd"), CorruptError, "file must be 'experts/layer_00"),
    "too few checksums": (change_layer(crc32="00000000"), CorruptError, "3 times 8 hexadecimal digits"),
    "more experts": (change_layer(num_experts=4), CorruptError, "4 times 8"),
    "absurdly more experts": (change_layer(num_experts=10**18), CorruptError, "integer from 1"),
    "another record size": (change_layer(record_bytes=9472), CorruptError, "record_bytes must be 16384"),
    "another data offset": (change_layer(data_offset=8192), CorruptError, "data_offset must be 16384"),
    "a float for a number": (change_layer(record_bytes=16384.0), CorruptError, "record_bytes"),
    "a part elsewhere": (change_part(1, offset=4096), CorruptError, "parts must lie at"),
    "a part of another type": (change_part(0, dtype="F32"), CorruptError, "must fit each other"),
    "a type nobody knows": (change_part(0, dtype="F4"), CorruptError, "must be U32, U8, F16, BF16 or F32"),
    "a part of another shape": (change_part(1, shape=[32, 2]), CorruptError, "must fit each other"),
    "an absurd shape": (change_part(3, shape=[2**62, 64]), CorruptError, "integer from 1"),
    "a part twice": (change_part(1, name="gate_proj.weight"), CorruptError, "a part's name"),
    "a file outside": (change(files={"../config.json": {"bytes": 1, "crc32": "0" * 8}}), CorruptError, "files must"),
    "a file that is the folder": (change(files={"..": {"bytes": 1, "crc32": "0" * 8}}), CorruptError, "files must"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_manifest_refused(case: str):
    data, kind, message = REFUSED[case]
    with pytest.raises(kind, match=re.escape(message) if "'" in message else message) as caught:
        parse_manifest(data)
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 600


# --- a whole checkpoint ---


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    config = text_config(num_hidden_layers=2, full_attention_interval=2)
    source = make_checkpoint(folder / "source", bits=4, config=config, shards=2)
    return pack(source, folder / "packed", bits=None)


def copied(packed: Path, folder: Path) -> Path:
    target = folder / "model"
    for path in packed.rglob("*"):
        if path.is_file():
            (target / path.relative_to(packed)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(packed)).write_bytes(path.read_bytes())
    return target


def test_what_contradicts_the_manifest_is_refused(packed: Path, tmp_path: Path):
    directory = copied(packed, tmp_path)
    first, second = (directory / "experts" / f"layer_0{i}.safetensors" for i in (0, 1))
    data = first.read_bytes()
    second_data = second.read_bytes()

    def refused(kind: type[CheckpointError], message: str) -> None:
        with pytest.raises(kind, match=message):
            Checkpoint.open(directory)

    first.write_bytes(second_data)
    refused(CorruptError, "header must say what experts.json says of layer 0")
    first.write_bytes(data[:-1])
    refused(CorruptError, "truncated by 1 bytes")
    first.unlink()
    refused(MissingTensorError, "layer_00")
    first.write_bytes(data)
    config = json.loads((directory / "config.json").read_text())
    for changes, message in (
        ({"num_experts": 9}, "the 9 experts of config.json, got 8"),
        ({"moe_intermediate_size": 32}, "moe_intermediate_size 32, got 64"),
        ({"num_hidden_layers": 1}, "num_hidden_layers must cover every layer"),
    ):
        text = config["text_config"] | changes
        (directory / "config.json").write_text(json.dumps(config | {"text_config": text}))
        refused(CorruptError, message)
    path = "language_model.model.layers.1.mlp.switch_mlp.up_proj"
    section = config["quantization"] | {path: {"bits": 8, "group_size": 64}}
    (directory / "config.json").write_text(json.dumps(config | {"quantization": section}))
    refused(CorruptError, "up_proj must be .*8.*, as config.json says")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / MANIFEST_NAME).unlink()
    refused(CheckpointError, "no routed experts")


def test_experts_in_the_dense_files_too(packed: Path, tmp_path: Path):
    directory = copied(packed, tmp_path)
    for path in directory.glob("model*"):
        path.unlink()
    make_checkpoint(tmp_path / "stock", bits=4, config=text_config(num_hidden_layers=2, full_attention_interval=2))
    (directory / "model.safetensors").write_bytes((tmp_path / "stock" / "model.safetensors").read_bytes())
    with pytest.raises(CorruptError, match="experts must be in the packed files only"):
        Checkpoint.open(directory)


def test_any_flipped_bit_of_a_header_or_the_manifest_is_found_when_it_is_opened(packed: Path, tmp_path: Path):
    """Every byte of the layer file's header up to its padding, a part of the padding, and of the manifest."""
    directory = copied(packed, tmp_path)
    chosen = random.Random(1)
    for name in (MANIFEST_NAME, "experts/layer_00.safetensors"):
        path = directory / name
        data = bytearray(path.read_bytes())
        if name == MANIFEST_NAME:
            positions = chosen.sample(range(len(data)), 150)
        else:
            (length,) = struct.unpack("<Q", data[:8])
            text = len(bytes(data[: 8 + length]).rstrip(b" "))
            positions = [*range(8), *chosen.sample(range(8, text), 150), *chosen.sample(range(text, 8 + length), 20)]
        for position in positions:
            bit = 1 << chosen.randrange(8)
            data[position] ^= bit
            with path.open("r+b") as file:
                file.seek(position)
                file.write(bytes([data[position]]))
                file.flush()
                with pytest.raises(CheckpointError):
                    Checkpoint.open(directory)
                data[position] ^= bit
                file.seek(position)
                file.write(bytes([data[position]]))
    Checkpoint.open(directory)


# --- fuzz: 100 inputs a test here, 25,000 with --hypothesis-profile=fuzz ---

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
names = st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path]
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += paths(inner, (*path, key))
    return found


TREE = {key: value for key, value in json.loads(MANIFEST.to_bytes()).items() if key != "manifest_crc32"}
PLACES = [path for path in paths(TREE) if path]


def mutated(path: tuple[Any, ...], value: Any) -> Any:
    tree = json.loads(json.dumps(TREE))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


@settings(deadline=None)
@given(path=st.sampled_from(PLACES), value=values | st.sampled_from([2**31, 2**63, -1, "U32", 10**400, [], {}]))
def test_any_manifest_is_read_or_refused(path: tuple[Any, ...], value: Any):
    try:
        result = parse_manifest(seal(mutated(path, value)))
    except CheckpointError as error:
        message = str(error)
    else:
        message = "[]"
        assert parse_manifest(result.to_bytes()) == result
    assert message.startswith("[") and len(message) < 1000


@settings(deadline=None)
@given(data=st.binary(max_size=40), position=st.integers(0, len(MANIFEST.to_bytes())), cut=st.integers(0, 60))
def test_any_bytes_are_read_or_refused(data: bytes, position: int, cut: int):
    whole = MANIFEST.to_bytes()
    changed = whole[:position] + data + whole[position + cut :]
    if changed != whole:
        with pytest.raises(CheckpointError):
            parse_manifest(changed)


@settings(deadline=None)
@given(data=st.binary(max_size=12), position=st.integers(0, layer().data_offset + 40), cut=st.integers(0, 60))
def test_any_layer_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, position: int,
                                           cut: int):  # fmt: skip
    one = layer()
    directory = tmp_path_factory.getbasetemp() / "fuzz"
    (directory / "experts").mkdir(parents=True, exist_ok=True)
    whole = one.header() + bytes(one.file_bytes - one.data_offset)
    (directory / one.file_name).write_bytes(whole[:position] + data + whole[position + cut :])
    try:
        info = read_layer(directory, one)
    except CheckpointError as error:
        message = str(error)
    else:
        message = "[]"
        assert (info.offset, info.shape) == (one.data_offset, (3, PAGE_BYTES))
    assert message.startswith("[") and len(message) < 1000


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_manifest_takes_little_memory(case: str):
    data = REFUSED[case][0]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            parse_manifest(data)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(data) + 200_000
    finally:
        tracemalloc.stop()
