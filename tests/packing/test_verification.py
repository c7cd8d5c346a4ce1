"""verify(), and load(verify=...): every flipped bit is found by somebody, and said where."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import load_model, pack, verify
from flash_moe_mlx.errors import (
    ChecksumError,
    CorruptError,
    FlashMoEError,
    MissingTensorError,
    RequestError,
    StoreError,
)
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.packed_format import MANIFEST_NAME
from flash_moe_mlx.packing.verification import SAMPLED_RECORDS
from flash_moe_mlx.storage.record_check import SAMPLE_INTERVAL
from flash_moe_mlx.storage.store import ExpertStore

from ..support.checkpoints import make_checkpoint, text_config
from ..support.models import VOCABULARY, streamed, write_tokenizer
from ..support.numerics import floats
from ..support.stores import request_for

LAYER = "experts/layer_01.safetensors"
EXPERTS = 8
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = text_config(num_hidden_layers=2, full_attention_interval=2, vocab_size=VOCABULARY, eos_token_id=0,
                         num_experts=EXPERTS)  # fmt: skip
    directory = make_checkpoint(tmp_path_factory.mktemp("source"), bits=4, config=config, shards=2)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    return pack(source, tmp_path / "packed", bits=None)


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def record_position(directory: Path, layer: int, expert: int) -> tuple[Path, int, int]:
    (where,) = Checkpoint.open(directory).ranges(layer, expert)
    return where.path, where.file_offset, where.nbytes


def test_a_good_checkpoint(packed: Path, source: Path):
    report = verify(packed)
    assert report and report.ok and report.format == "packed" and not report.full
    assert (report.records, report.all_records) == (2 * SAMPLED_RECORDS, 2 * EXPERTS)
    assert "a sample" in str(report)
    seen: list[tuple[int, int]] = []
    full = verify(packed, full=True, against=source, progress=lambda done, total: seen.append((done, total)))
    assert (full.records, full.compared, full.problems) == (2 * EXPERTS, 4, ())
    assert full.files == len(Checkpoint.open(packed).manifest.files)
    assert seen[-1] == (full.bytes_read, full.bytes_read)
    assert "result" in str(full) and "good" in str(full)
    assert "<table>" in full._repr_html_()
    assert json.loads(json.dumps(full.to_json()))["ok"] is True


def test_a_stock_checkpoint(source: Path):
    report = verify(source, full=True)
    assert report.ok and report.format == "mlx" and report.records == 0
    assert "no checksums" in str(report)
    with pytest.raises(RequestError, match="only a packed checkpoint"):
        verify(source, against=source)
    (source / "nothing").mkdir()
    assert not verify(source / "nothing").ok


def regions(directory: Path) -> dict[str, tuple[str, int]]:
    """Every kind of place in every kind of file: (file, position)."""
    checkpoint = Checkpoint.open(directory)
    path, begin, nbytes = record_position(directory, 1, 5)
    layout = checkpoint.layout(1)
    size = path.stat().st_size
    found = {
        f"part {part.name}": (LAYER, begin + part.offset + part.nbytes // 2) for part in layout.parts
    }  # fmt: skip
    found |= {
        "record's first byte": (LAYER, begin),
        "record's last byte": (LAYER, begin + nbytes - 1),
        "padding behind a record": (LAYER, begin + nbytes),
        "file's last byte": (LAYER, size - 1),
        "header length": (LAYER, 1),
        "header": (LAYER, 60),
        "header's padding": (LAYER, begin - 5 * 16384 - 1),
        "manifest": (MANIFEST_NAME, 300),
        "config.json": ("config.json", 30),
        "index": ("model.safetensors.index.json", 50),
        "tokenizer": ("tokenizer.json", 200),
    }
    for shard in sorted(directory.glob("model*.safetensors")):
        found[f"header of {shard.name}"] = (shard.name, 40)
        found[f"data of {shard.name}"] = (shard.name, shard.stat().st_size - 9)
    return found


def test_a_flipped_bit_in_every_region_of_every_file(packed: Path):
    """Found by verify(full=True), which names the file; and by load(verify="full") at the latest when it is read."""
    chosen = random.Random(0)
    with streamed(packed, verify="full") as model:
        good = floats(model(TOKENS))
    places = regions(packed)
    assert {Path(file).suffix for file, _ in places.values()} == {".safetensors", ".json"}
    for name, (file, position) in places.items():
        bit = chosen.randrange(8)
        flip(packed / file, position, bit)
        report = verify(packed, full=True)
        assert not report.ok, name
        assert any(Path(file).name in problem.message for problem in report.problems), (name, report.problems)
        try:
            with streamed(packed, verify="full") as model:
                logits = floats(model(TOKENS))
        except FlashMoEError:
            logits = good  # told, and not wrong
        assert np.array_equal(logits, good), name
        flip(packed / file, position, bit)
    assert verify(packed, full=True).ok


def test_problems_say_where(packed: Path):
    path, begin, nbytes = record_position(packed, 1, 5)
    flip(path, begin + 100)
    (problem,) = verify(packed, full=True).problems
    assert (problem.file, problem.layer, problem.expert, problem.offset) == (LAYER, 1, 5, begin)
    assert f"{nbytes} bytes at offset {begin} must have CRC-32" in problem.message
    flip(path, begin + 100)
    (packed / "tokenizer.json").unlink()
    (problem,) = verify(packed).problems
    assert problem.file == "tokenizer.json" and "no such file" in problem.message


def test_another_source(packed: Path, tmp_path: Path):
    config = text_config(num_hidden_layers=2, full_attention_interval=2, vocab_size=VOCABULARY, num_experts=EXPERTS)
    other = make_checkpoint(tmp_path / "other", bits=4, config=config, seed=1)
    report = verify(packed, against=other)
    assert len(report.problems) == 4 and "must be what other makes" in report.problems[0].message
    with pytest.raises(RequestError, match="of other shapes"):
        verify(packed, against=make_checkpoint(tmp_path / "shapes", bits=8, config=config))
    with pytest.raises(RequestError, match=r"\[against\]"):
        verify(packed, against=tmp_path / "nothing")


# --- on reading ---


def open_store(directory: Path, **options: Any) -> ExpertStore:
    return ExpertStore(Checkpoint.open(directory), **options)


@pytest.mark.parametrize("io", ["pread", "mmap", "direct"])
def test_a_damaged_record_is_read_again_and_then_refused(packed: Path, io: str, caplog: pytest.LogCaptureFixture):
    path, begin, nbytes = record_position(packed, 1, 5)
    flip(path, begin + 1000)
    with open_store(packed, io=io, verify="full") as store:
        requests = [request_for(store.checkpoint, 1, expert) for expert in (4, 5, 6)]
        pending = store.submit(requests)
        with pytest.raises(ChecksumError) as caught:
            pending.wait()
        message = str(caught.value)
        assert message.startswith(
            f"[ExpertStore] layer 1 expert 5: {nbytes} bytes at offset {begin} of {path.name} must"
        )
        assert "got another twice" in message and "flash-moe verify" in message
        assert isinstance(caught.value, StoreError) and isinstance(caught.value, CorruptError)
        assert pending.completed == (True, False, True)
        assert "read again" in caplog.text
        assert store.read_into(requests[:1]) == nbytes  # and continues
    with open_store(packed, io=io, verify=False) as store:
        assert store.read_into([request_for(store.checkpoint, 1, 5)]) == nbytes


def test_a_record_that_comes_wrong_once_is_right_the_second_time(packed: Path, monkeypatch: pytest.MonkeyPatch):
    preadv, calls = os.preadv, []

    def alter(fd: int, buffers: Any, offset: int) -> int:
        got = preadv(fd, buffers, offset)
        calls.append(offset)
        if len(calls) == 1:
            buffers[0][0] ^= 1
        return got

    with open_store(packed, verify="full") as store:
        good, request = (request_for(store.checkpoint, 0, 3) for _ in range(2))
        store.read_into([good])
        monkeypatch.setattr(os, "preadv", alter)
        store.read_into([request])
    assert len(calls) == 2
    assert bytes(request.buffer) == bytes(good.buffer)


def test_a_sample_of_the_reads_is_checked(packed: Path):
    for expert in range(EXPERTS):
        path, begin, _ = record_position(packed, 1, expert)
        flip(path, begin + 10)
    with open_store(packed, verify="sample") as store:
        request, failed = request_for(store.checkpoint, 1, 0), 0
        for _ in range(3 * SAMPLE_INTERVAL):
            try:
                store.read_into([request])
            except ChecksumError:
                failed += 1
    assert failed == 3


def test_load_checks(packed: Path, source: Path):
    def shard(directory: Path) -> Path:
        return min(directory.glob("model*.safetensors"))

    def refused(kind: type[FlashMoEError], message: str, **arguments: Any) -> None:
        with pytest.raises(kind, match=message):
            load_model(packed, memory_limit="1GB", **arguments)

    refused(RequestError, '"sample", "full" or False, got True', verify=True)
    refused(RequestError, "got 'all'", verify="all")
    with pytest.raises(RequestError, match="needs the checksums of a packed checkpoint"):
        load_model(source, memory_limit="1GB", verify="full")
    load_model(source, memory_limit="1GB", verify="sample").streaming.close()
    path = shard(packed)
    flip(path, path.stat().st_size - 5)
    load_model(packed, memory_limit="1GB").streaming.close()  # dense files are compared only when asked for
    refused(CorruptError, rf"\[{path.name}\] .* must have CRC-32", verify="full")
    flip(path, path.stat().st_size - 5)
    (packed / "tokenizer.json").unlink()
    refused(MissingTensorError, r"\[tokenizer\.json\] must be there", verify="full")


def test_a_damaged_expert_leaves_the_engine_usable(packed: Path):
    with streamed(packed, verify="full") as model:
        good = floats(model(TOKENS))
        model.streaming.clear()
        spoilt = {layer: [record_position(packed, layer, e)[:2] for e in range(EXPERTS)] for layer in (0, 1)}

        def each(change: Callable[[Path, int], None]) -> None:
            for places in spoilt.values():
                for path, begin in places:
                    change(path, begin + 7)

        each(flip)
        with pytest.raises(ChecksumError):
            model(TOKENS)
        each(flip)
        assert np.array_equal(floats(model(TOKENS)), good)
