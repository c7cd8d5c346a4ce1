"""Lookup tables that stay in their files, against mlx-lm's resident model and our own with the tables in memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.config import TABLE_BYTES, StreamingConfig
from flash_moe_mlx.errors import CorruptError, ShortReadError
from flash_moe_mlx.models.table_rows import tables_of
from flash_moe_mlx.planning.plan import plan
from flash_moe_mlx.planning.speed import Speed
from flash_moe_mlx.runtime.loading import _prepare, inspect_checkpoint

from ..support.models import greedy, load_resident
from ..support.numerics import RELATIVE_RMS, assert_close
from ..support.switch_configs import VOCABULARY, make_config
from ..support.switch_models import MAX_CONTEXT, write_model

SPEED = Speed(weight_bytes_per_second=10e9, layer_seconds=1e-3, disk_bytes_per_second=1e9)
TABLES, ROWS = 2, 78 * VOCABULARY
IO_MODES = ("pread", "mmap", "direct")


def load_with_tables(directory: Path, table_bytes: int, memory_limit: str = "1GB", io: str = "pread") -> Any:
    config = StreamingConfig.from_arguments(memory_limit, MAX_CONTEXT, None, io)
    return _prepare(directory, replace(config, table_bytes=table_bytes), False).load()


@pytest.fixture(scope="module", params=["unquantised", "4-bit g64"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables of 9,985 and 9,987 rows of 64, for pairs and for three tokens in a row."""
    config = make_config("longcat_flash_ngram") | {"emb_split_num": 1, "emb_neighbor_num": 3}
    return write_model(tmp_path_factory.mktemp("ngram"), config, request.param)


def logits(model: Any) -> list[np.ndarray]:
    """A prompt of two sequences with repeated n-grams, and tokens after another."""
    rng = np.random.default_rng(1)
    prompt = np.tile(rng.integers(0, VOCABULARY, (2, 20)), 2)
    cache = model.make_cache()
    parts = [(part, cache) for part in np.split(prompt[:1], [30, 31, 32], axis=1)[:3]]
    passes = [model(mx.array(ids), cache=own) for ids, own in [(prompt, None), *parts]]
    return [np.array(result.astype(mx.float32)) for result in passes]


@pytest.mark.parametrize("io", IO_MODES)
def test_same_bits_as_in_memory(checkpoint: Path, io: str):
    resident = load_with_tables(checkpoint, TABLE_BYTES)
    streamed = load_with_tables(checkpoint, 100_000, io=io)
    with resident.streaming, streamed.streaming as engine:
        assert (len(tables_of(resident)), len(tables_of(streamed))) == (0, TABLES)
        for expected, result in zip(logits(resident), logits(streamed), strict=True):
            np.testing.assert_array_equal(result, expected)
        saved = resident.streaming.stats().dense_bytes - engine.stats().dense_bytes
        assert saved > TABLES * ROWS * 64 // 2
        assert resident.streaming.stats().row_reads == 0 < engine.stats().row_reads


def test_matches_mlx_lm(checkpoint: Path):
    resident = load_resident(checkpoint)
    model = load_with_tables(checkpoint, 100_000)
    with model.streaming:
        for expected, result in zip(logits(resident), logits(model), strict=True):
            assert_close("logits", expected, result, RELATIVE_RMS["mlx-lm"])
        assert greedy(model, [3, 1, 2, 1, 2], 16)[0] == greedy(resident, [3, 1, 2, 1, 2], 16)[0]


def test_each_row_once(checkpoint: Path):
    model = load_with_tables(checkpoint, 100_000)
    parts = sum(len(table.parts) for table in tables_of(model))
    row_bytes = sum(info.nbytes // info.shape[0] for table in tables_of(model) for info in table.parts.values())
    with model.streaming as engine:
        model(mx.full((1, 50), 5, mx.int32))  # its first tokens follow nothing: three n-grams in all
        stats = engine.stats()
        assert parts < stats.row_reads <= 3 * parts
        assert stats.row_bytes <= 3 * row_bytes
        assert "table rows read" in str(stats)
        engine.reset_stats()
        cache = model.make_cache()
        model(mx.array([[7]]), cache=cache)
        assert (engine.stats().row_reads, engine.stats().row_bytes) == (parts, row_bytes)


def test_plan_and_footprint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    usual = inspect_checkpoint(checkpoint, StreamingConfig(max_context=MAX_CONTEXT))[1]
    spec = inspect_checkpoint(checkpoint, StreamingConfig(max_context=MAX_CONTEXT, table_bytes=100_000))[1]
    tables = sum(table.nbytes for table in tables_of(spec.model))
    assert usual.footprint.dense_bytes - spec.footprint.dense_bytes >= tables
    assert spec.footprint.load_bytes < usual.footprint.load_bytes
    assert "lookup tables" not in str(plan(checkpoint, max_context=MAX_CONTEXT, speed=SPEED))
    from_arguments = StreamingConfig.from_arguments
    monkeypatch.setattr(
        StreamingConfig, "from_arguments", lambda *a, **k: replace(from_arguments(*a, **k), table_bytes=100_000)
    )
    made = plan(checkpoint, max_context=MAX_CONTEXT, speed=SPEED)
    assert made.table_bytes == made.to_dict()["table_bytes"] == tables
    assert "stay in files, read by the row" in str(made)


def test_tables_of_the_vocabulary_stay(checkpoint: Path):
    """Its embeddings may be the output projection as well."""
    model = load_with_tables(checkpoint, 0)
    with model.streaming:
        assert len(tables_of(model)) == TABLES


def test_a_table_of_another_shape(tmp_path: Path):
    """It is refused as if it were kept in memory."""
    config = make_config("longcat_flash_ngram") | {"emb_split_num": 1, "emb_neighbor_num": 3}
    directory = write_model(tmp_path, config)
    (directory / "config.json").write_text(json.dumps(config | {"ngram_vocab_size_ratio": 80}))
    with pytest.raises(CorruptError, match=r"embedders.* must have shape \(1024[13], 64\)"):
        load_with_tables(directory, 100_000)


def test_a_file_cut_short(tmp_path: Path):
    config = make_config("longcat_flash_ngram") | {"emb_split_num": 1, "emb_neighbor_num": 3}
    directory = write_model(tmp_path, config)
    model = load_with_tables(directory, 100_000)
    (table, *_) = tables_of(model)
    info = table.parts["weight"]
    with model.streaming as engine:
        with open(info.path, "r+b") as file:
            file.truncate(info.offset + 10)
        with pytest.raises(ShortReadError, match=r"rows of .*embedders"):
            engine.read_rows(info, [0, 1], memoryview(bytearray(2 * info.nbytes // info.shape[0])))
