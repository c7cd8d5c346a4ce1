"""The header reader against real writers, every rule of the format, and whatever hypothesis thinks of."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import save_file

from flash_moe_mlx.errors import CheckpointError, CorruptError, MissingTensorError
from flash_moe_mlx.formats import safetensors_header
from flash_moe_mlx.formats.safetensors_header import read_header, read_json, read_metadata

from ..support.checkpoints import entry, write_raw

ONE = {"a": entry("F32", [2], 0, 8)}
TWO = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [4], 8, 12)}


def test_agrees_with_safetensors(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    written = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.uint8),
        "half": np.arange(5, dtype=np.float16),
        "unicode é": np.array([True, False]),
    }
    save_file(written, path, {"format": "np"})
    data = path.read_bytes()
    theirs = dict(safetensors.deserialize(data))
    ours = read_header(path)
    assert ours.keys() == theirs.keys()
    for name, info in ours.items():
        assert (info.name, info.path) == (name, path)
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert data[info.offset : info.offset + info.nbytes] == bytes(theirs[name]["data"])
    assert read_metadata(path) == {"format": "np"}
    assert [info.offset for info in ours.values()] == sorted(info.offset for info in ours.values())


@pytest.mark.parametrize("metadata", [None, {"format": "mlx"}])
def test_reads_what_mlx_writes(tmp_path: Path, metadata: dict[str, str] | None):
    path = tmp_path / "a.safetensors"
    arrays = {"a": mx.arange(6).astype(mx.bfloat16).reshape(2, 3), "b": mx.array(1, mx.uint32), "c": mx.zeros((3,))}
    mx.save_safetensors(str(path), arrays, metadata)
    assert {name: (info.dtype, info.shape) for name, info in read_header(path).items()} == {
        "a": ("BF16", (2, 3)), "b": ("U32", ()), "c": ("F32", (3,)),
    }  # fmt: skip
    assert read_metadata(path) == (metadata or {})


def test_takes_what_the_format_allows(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    assert read_header(write_raw(path, {})) == {}
    assert read_header(write_raw(path, {}, b"")) == {}
    padded = json.dumps(ONE).encode() + b"   "
    assert read_header(write_raw(path, padded, bytes(8)))["a"].offset == 8 + len(padded)
    unordered = {"b": entry("U8", [4], 8, 12), "a": entry("F32", [2], 0, 8)}
    assert list(read_header(write_raw(path, unordered, bytes(12)))) == ["a", "b"]
    four_bits = {"a": entry("F4", [2, 3], 0, 3), "b": entry("F8_E8M0", [1], 3, 4)}
    assert read_header(write_raw(path, four_bits, bytes(4)))["a"].nbytes == 3
    zero_sized = {"z": entry("F32", [0, 7], 0, 0), "a": entry("U8", [1], 0, 1), "y": entry("F32", [0], 1, 1)}
    assert set(read_header(write_raw(path, zero_sized, bytes(1)))) == {"z", "a", "y"}
    assert read_header(write_raw(path, {"": entry("U8", [1], 0, 1)}, bytes(1)))[""].nbytes == 1


BROKEN_ENTRIES: dict[str, Any] = {
    "not an object": 5,
    "no dtype": {"shape": [2], "data_offsets": [0, 8]},
    "more keys": {**ONE["a"], "strides": [1]},
    "unknown dtype": entry("F7", [2], 0, 8),
    "dtype not text": {**ONE["a"], "dtype": ["F32"]},
    "shape not a list": {**ONE["a"], "shape": 2},
    "negative size": entry("F32", [-2], 0, 8),
    "size a float": entry("F32", [2.0], 0, 8),
    "size a bool": entry("U8", [True, 8], 0, 8),
    "size null": entry("F32", [None], 0, 8),
    "size of 400 digits": entry("F32", [10**400], 0, 8),
    "sizes that overflow": entry("F32", [2**62, 2**62], 0, 8),
    "sizes that overflow to zero": entry("F32", [2**62, 2**62, 0], 0, 0),
    "two million sizes": entry("F32", [2**62] * 100_000, 0, 8),
    "offsets not a list": {**ONE["a"], "data_offsets": "0,8"},
    "one offset": {**ONE["a"], "data_offsets": [8]},
    "three offsets": {**ONE["a"], "data_offsets": [0, 4, 8]},
    "offset a bool": {**ONE["a"], "data_offsets": [False, 8]},
    "offset negative": {**ONE["a"], "data_offsets": [-8, 0]},
    "offset a float": {**ONE["a"], "data_offsets": [0.0, 8.0]},
    "offset of 400 digits": {**ONE["a"], "data_offsets": [0, 10**400]},
    "offsets descend": {**ONE["a"], "data_offsets": [8, 0]},
    "length of another shape": entry("F32", [3], 0, 8),
    "length of another dtype": entry("F16", [2], 0, 8),
    "half a byte": entry("F4", [3], 0, 2),
    "past the end": entry("F32", [3], 0, 12),
    "far past the end": entry("U8", [2**50], 0, 2**50),
    "a hole before": entry("U8", [4], 4, 8),
}


@pytest.mark.parametrize("broken", BROKEN_ENTRIES.values(), ids=BROKEN_ENTRIES)
def test_broken_entry_is_corrupt(tmp_path: Path, broken: object):
    path = write_raw(tmp_path / "a.safetensors", {"a": broken}, bytes(8))
    with pytest.raises(CorruptError, match=r"^\[a\.safetensors\] .*, got .*\. Download") as caught:
        read_header(path)
    assert len(str(caught.value)) < 600
    if broken != BROKEN_ENTRIES["more keys"]:  # the format's own reader lets those pass
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(path.read_bytes())


BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "at least 10 bytes, got 7"),
    "length alone": (struct.pack("<Q", 2), "at least 10 bytes"),
    "length 0": (struct.pack("<Q", 0) + b"{}", "2 to 100000000 bytes, got 0"),
    "length over the cap": (struct.pack("<Q", 100_000_001) + b"{}", "2 to 100000000 bytes"),
    "length 2**64 - 1": (b"\xff" * 8 + b"{}", "2 to 100000000 bytes"),
    "length beyond the file": (struct.pack("<Q", 100) + b'{"a"', "truncated"),
    "a zip": (b"PK\x03\x04" + bytes(100), "begin with"),
    "a pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "not a safetensors file"),
    "html": (b"<!DOCTYPE html><html>" + b" " * 100, "not a safetensors file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64, "git lfs pull"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_file_is_corrupt(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=message):
        read_header(tmp_path / "a.safetensors")


BROKEN_HEADERS: dict[str, tuple[bytes, str]] = {
    "leading space": (b' {"a":1}', "begin with"),
    "a list": (b"[1]", "begin with"),
    "cut": (b'{"a":', "valid JSON"),
    "trailing": (b"{}{}", "valid JSON"),
    "not utf-8": (b'{"\xff\xfe":1}', "UTF-8"),
    "duplicate tensor": (json.dumps(ONE).encode()[:-1] + b"," + json.dumps(ONE).encode()[1:], "once, got 'a' twice"),
    "duplicate key": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "'dtype' twice"),
    "duplicate metadata": (b'{"__metadata__":{"a":"","a":""}}', "'a' twice"),
    "metadata a list": (b'{"__metadata__":[]}', "__metadata__"),
    "metadata not text": (b'{"__metadata__":{"a":1}}', "__metadata__"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "integer of 10,000 digits": (b'{"a":' + b"9" * 10_000 + b"}", "valid JSON"),
    "nan": (b'{"a":NaN}', "the number NaN"),
    "lone surrogate": (b'{"\\ud800":1}', "tensor"),
    "control characters": (b'{"\\u001b[31m\\u0000":1}', "tensor"),
}


@pytest.mark.parametrize(("header", "message"), BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_broken_header_is_corrupt(tmp_path: Path, header: bytes, message: str):
    with pytest.raises(CorruptError, match=message) as caught:
        read_header(write_raw(tmp_path / "a.safetensors", header))
    text = str(caught.value)
    text.encode()
    assert text.isprintable()
    assert len(text) < 600


def test_layout_of_the_data(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CorruptError, match=r"truncated by 5 bytes\. Download the file again"):
        read_header(write_raw(path, TWO, bytes(7)))
    with pytest.raises(CorruptError, match=r"must ascend, got \[8, 0\]"):
        read_header(write_raw(path, {"a": entry("U8", [8], 8, 0)}, bytes(8)))
    with pytest.raises(CorruptError, match="1 bytes more"):
        read_header(write_raw(path, TWO, bytes(13)))
    with pytest.raises(CorruptError, match=r"'b' at byte 4 where 8 was due \(overlap"):
        read_header(write_raw(path, {**ONE, "b": entry("U8", [8], 4, 12)}, bytes(12)))
    with pytest.raises(CorruptError, match=r"'b' at byte 9 where 8 was due \(hole"):
        read_header(write_raw(path, {**ONE, "b": entry("U8", [3], 9, 12)}, bytes(12)))
    with pytest.raises(CorruptError, match="overlap"):
        read_header(write_raw(path, {"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 0, 8)}, bytes(8)))
    with pytest.raises(CorruptError, match="hole"):
        read_header(write_raw(path, {"a": entry("U8", [0], 8, 8)}, bytes(8)))


def test_what_is_not_a_readable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MissingTensorError, match="must exist, got no such file"):
        read_header(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="must be a file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="must be a file"):  # and doesn't wait for a writer
        read_header(tmp_path / "pipe.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write_raw(tmp_path / "a.safetensors", {})
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"must be readable, got .*Permission denied"):
        read_header(path)


def test_reads_no_data(tmp_path: Path):
    """A sparse file of 4 TiB takes no time and no memory."""
    path = write_raw(tmp_path / "a.safetensors", {"a": entry("U8", [2**42], 0, 2**42)})
    try:
        os.truncate(path, path.stat().st_size + 2**42)
    except OSError as error:
        pytest.skip(f"the file system has no such sparse files: {error}")
    assert read_header(path)["a"].nbytes == 2**42


# --- fuzz: whatever a header holds, it is read or refused with a typed error ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
sizes = st.integers(-1, 9) | st.sampled_from([2**31, 2**63 - 1, 2**64, 10**30, True, 1.0, None])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "X", 1]),
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    },
    optional={"more": json_values},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\ud800"]), entries | json_values, max_size=3)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ours_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read_header(path)
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()
    return None


@fuzz
@given(header=headers, nbytes=st.integers(0, 40))
def test_any_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], nbytes: int):
    path = write_raw(tmp_path / "a.safetensors", header, bytes(nbytes))
    ours = ours_or_none(path)
    if ours is not None:  # never more lenient than the format's own reader
        theirs = dict(safetensors.deserialize(path.read_bytes()))
        assert {n: (i.dtype, list(i.shape), i.nbytes) for n, i in ours.items()} == {
            n: (t["dtype"], t["shape"], len(t["data"])) for n, t in theirs.items()
        }


@fuzz
@given(data=st.binary(max_size=80), length=st.none() | st.integers(0, 90))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes, length: int | None):
    ours_or_none(write_raw(tmp_path / "a.safetensors", data, length=length))
    ours_or_none(write_raw(tmp_path / "a.safetensors", b"{" + data + b"}", length=length))


@fuzz
@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_any_flipped_byte_is_read_or_refused(tmp_path: Path, position: int, byte: int):
    path = write_raw(tmp_path / "a.safetensors", {**TWO, "__metadata__": {"format": "pt"}}, bytes(12))
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    ours_or_none(path)


def test_read_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    assert read_json(path, "")["a"] == "x" * 100
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 50)
    with pytest.raises(CorruptError, match="at most 50 bytes"):
        read_json(path, "")


@pytest.mark.parametrize("reader", [read_header, lambda path: read_json(path, "Check it.")])
def test_memory_that_runs_out_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], object]
):
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    path = write_raw(tmp_path / "a.safetensors", {})
    monkeypatch.setattr(safetensors_header.json, "loads", exhausted)
    with pytest.raises(CorruptError, match="fits in memory"):
        reader(path)
