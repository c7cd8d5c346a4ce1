"""Results of packing: the same logits, mlx_lm.convert's bytes, every choice of bits, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.utils
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_moe_mlx import pack, verify
from flash_moe_mlx.errors import CheckpointError, PackError, RequestError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.expert_layout import Quantization
from flash_moe_mlx.packing import PackSettings, open_packing

from ..support.checkpoints import make_checkpoint, text_config
from ..support.models import chat_config, convert, make_converted, streamed
from ..support.numerics import floats
from ..support.packing import contents, expert_parts, small_tasks, tensor_bytes

TOKENS = mx.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
FORMATS = ("hf-fused", "hf-per-expert", "mlx")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One unquantised model in every format, in three shards."""
    folder, config = tmp_path_factory.mktemp("sources"), chat_config(dtype="bfloat16", num_hidden_layers=2,
                                                                     full_attention_interval=2)  # fmt: skip
    return {name: make_checkpoint(folder / name, name, config=config, shards=3) for name in FORMATS}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit checkpoint as mlx_lm.convert writes it."""
    return make_converted(tmp_path_factory.mktemp("stock"), bits=4)


def converted(sources: dict[str, Path], folder: Path, bits: int, group_size: int) -> Checkpoint:
    return Checkpoint.open(convert(sources["hf-fused"], folder, bits=bits, group_size=group_size))


@pytest.mark.parametrize("io", ["pread", "mmap", "direct"])
def test_unchanged_bits_give_the_same_logits(stock: Path, tmp_path: Path, io: str):
    packed = pack(stock, tmp_path / "packed", bits=None)
    assert Checkpoint.open(packed).format == "packed"
    assert contents(packed).keys() >= {"experts.json", "experts/layer_00.safetensors", "tokenizer.json"}
    with streamed(stock) as a, streamed(packed, io=io, verify="full") as b:
        assert np.array_equal(floats(a(TOKENS)), floats(b(TOKENS)))
        assert b.streaming.stats().slot_bytes == a.streaming.stats().slot_bytes


@pytest.mark.parametrize("format", FORMATS[:2])
def test_unquantised_and_unchanged(sources: dict[str, Path], tmp_path: Path, format: str):
    """The hub's own form, its dense tensors as they are: to the bit what streaming it unpacked gives."""
    packed = pack(sources[format], tmp_path / "packed", bits=None)
    with streamed(sources[format]) as a, streamed(packed) as b:
        assert np.array_equal(floats(a(TOKENS)), floats(b(TOKENS)))


def test_a_record_is_one_aligned_range(stock: Path, tmp_path: Path):
    packed = Checkpoint.open(pack(stock, tmp_path / "packed", bits=None))
    before = Checkpoint.open(stock)
    for layer in packed.moe_layers:
        assert packed.layout(layer) == before.layout(layer)
        for expert in range(packed.num_experts(layer)):
            (where,) = packed.ranges(layer, expert)
            assert (where.file_offset % 16384, where.record_offset) == (0, 0)
            assert where.nbytes <= packed.layout(layer).record_bytes
    assert expert_parts(packed) == expert_parts(before)


@pytest.mark.parametrize(
    ("format", "bits", "group_size"),
    [("hf-fused", 2, 64), ("hf-fused", 3, 128), ("hf-fused", 4, 64), ("hf-fused", 5, 32), ("hf-fused", 6, 64),
     ("hf-fused", 8, 32), ("hf-per-expert", 4, 64), ("hf-per-expert", 3, 32), ("mlx", 4, 64)],
)  # fmt: skip
def test_bytes_are_those_of_mlx_lm_convert(
    sources: dict[str, Path], tmp_path: Path, format: str, bits: int, group_size: int
):
    expected = converted(sources, tmp_path / "expected", bits, group_size)
    packed = Checkpoint.open(pack(sources[format], tmp_path / "packed", bits=bits, group_size=group_size))
    assert expert_parts(packed) == expert_parts(expected)
    assert set(packed.dense) == set(expected.dense)
    for name, info in expected.dense.items():
        made = packed.dense[name]
        assert (made.dtype, made.shape) == (info.dtype, info.shape), name
        assert tensor_bytes(packed, name) == tensor_bytes(expected, name), name
    with streamed(packed.directory) as a, streamed(expected.directory) as b:
        assert np.array_equal(floats(a(TOKENS)), floats(b(TOKENS)))


def test_floats_are_cast_as_mlx_lm_casts_them(tmp_path: Path):
    """config.json says bfloat16 and the file holds float32: convert casts first, and so does this."""
    config = chat_config(dtype="bfloat16", num_hidden_layers=2, full_attention_interval=2)
    source = make_checkpoint(tmp_path / "source", "hf-fused", config=config, dtype=mx.float32)
    model, _ = mlx_lm.utils.load_model(source, lazy=True)
    keeps = model.cast_predicate
    model.update(mlx.utils.tree_map_with_path(
        lambda k, v: v.astype(mx.bfloat16) if keeps(k) and mx.issubdtype(v.dtype, mx.floating) else v,
        model.parameters(),
    ))  # fmt: skip
    model, config = mlx_lm.utils.quantize_model(model, mlx_lm.utils.load_config(source), 64, 4)
    mlx_lm.utils.save_model(tmp_path / "expected", model)
    mlx_lm.utils.save_config(config, tmp_path / "expected" / "config.json")
    expected, packed = Checkpoint.open(tmp_path / "expected"), Checkpoint.open(pack(source, tmp_path / "packed"))
    assert expert_parts(packed) == expert_parts(expected)
    assert {n: tensor_bytes(packed, n) for n in packed.dense} == {n: tensor_bytes(expected, n) for n in expected.dense}


def test_bits_of_projections_and_layers(sources: dict[str, Path], tmp_path: Path):
    packed = pack(sources["hf-fused"], tmp_path / "packed", bits=3, down_bits=6, layer_bits={1: 8}, group_size=32)
    checkpoint = Checkpoint.open(packed)
    chosen = {(layer, p): q for layer in (0, 1) for p, q in checkpoint.layout(layer).quantizations}
    assert {key: q.bits for key, q in chosen.items() if q} == {
        (0, "gate_proj"): 3, (0, "up_proj"): 3, (0, "down_proj"): 6,
        (1, "gate_proj"): 8, (1, "up_proj"): 8, (1, "down_proj"): 8,
    }  # fmt: skip
    assert checkpoint.quantization("language_model.model.layers.0.mlp.switch_mlp.down_proj") == Quantization(6, 32)
    section = json.loads((packed / "config.json").read_text())["quantization"]
    assert section["language_model.model.layers.0.mlp.switch_mlp.down_proj"] == {"group_size": 32, "bits": 6}
    with streamed(packed) as model:
        assert np.isfinite(floats(model(TOKENS))).all()
    assert verify(packed, full=True, against=sources["hf-fused"]).compared == 4


def test_requantised_from_dequantised_values_with_its_error(stock: Path, tmp_path: Path):
    packed = Checkpoint.open(pack(stock, tmp_path / "packed", bits=2))
    before, after = expert_parts(Checkpoint.open(stock)), expert_parts(packed)
    assert packed.manifest is not None
    squared = weights = 0.0
    largest = 0.0
    for layer in packed.moe_layers:
        for expert in (0, 8):  # one in eight is measured
            old = {p: before[layer, expert, f"up_proj.{p}"] for p in ("weight", "scales", "biases")}
            weight = dequantize(old, 128, 4)
            made = mx.quantize(weight, bits=2, group_size=64)
            for part, value in zip(("weight", "scales", "biases"), made, strict=True):
                assert after[layer, expert, f"up_proj.{part}"] == bytes(memoryview(value).cast("B")), part
            difference = mx.dequantize(*made, bits=2, group_size=64).astype(mx.float32) - weight.astype(mx.float32)
            squared += float(difference.square().sum())
            weights += float(weight.astype(mx.float32).square().sum())
            largest = max(largest, float(difference.abs().max()))
    stated = packed.manifest.quantization_error["up_proj"]
    assert stated["max"] == pytest.approx(largest)
    assert stated["relative"] == pytest.approx((squared / weights) ** 0.5, rel=1e-4)
    assert 0.2 < stated["relative"] < 0.6
    assert 0 < stated["rmse"] < stated["max"]


def dequantize(parts: dict[str, bytes], rows: int, bits: int) -> mx.array:
    weight = mx.array(np.frombuffer(parts["weight"], np.uint32).reshape(rows, -1))
    scales, biases = (
        mx.array(np.frombuffer(parts[p], np.uint16).reshape(rows, -1)).view(mx.bfloat16) for p in ("scales", "biases")
    )
    return mx.dequantize(weight, scales, biases, bits=bits, group_size=64)


def test_expert_biases_and_odd_widths_are_copied(tmp_path: Path):
    config = text_config(moe_intermediate_size=96, num_experts=3)
    source = make_checkpoint(tmp_path / "source", "mlx", config=config, bits=8, group_size=32, expert_bias=True)
    packed = Checkpoint.open(pack(source, tmp_path / "packed", bits=4, group_size=64))
    now = dict(packed.layout(0).quantizations)
    assert now == {
        "gate_proj": Quantization(4, 64), "up_proj": Quantization(4, 64),
        "down_proj": Quantization(8, 32),  # 96 inputs are no multiple of 64: left as it is, as mlx_lm does
    }  # fmt: skip
    before, after = expert_parts(Checkpoint.open(source)), expert_parts(packed)
    assert all(after[key] == data for key, data in before.items() if key[2].endswith("bias") or "down" in key[2])


def test_packed_again_from_packed(stock: Path, tmp_path: Path):
    packed = pack(stock, tmp_path / "packed", bits=None)
    again = pack(packed, tmp_path / "again", bits=None)
    assert {n: d for n, d in contents(again).items() if n != "experts.json"} == {
        n: d for n, d in contents(packed).items() if n != "experts.json"
    }


def test_dense_part_loads_with_mlx_lm(stock: Path, sources: dict[str, Path], tmp_path: Path):
    """By mlx_lm.utils.load_model(lazy=True, strict=False): all but the experts, which it leaves as it made them."""
    for source, bits, expected in (
        (stock, None, stock), (sources["hf-fused"], 4, convert(sources["hf-fused"], tmp_path / "expected", bits=4)),
    ):  # fmt: skip
        packed = pack(source, tmp_path / f"packed-{bits}", bits=bits)
        ours, _ = mlx_lm.utils.load_model(packed, lazy=True, strict=False)
        theirs, _ = mlx_lm.utils.load_model(expected, lazy=True)
        a, b = (dict(tree_flatten(model.parameters())) for model in (ours, theirs))
        dense = {name for name in b if ".switch_mlp." not in name}
        assert dense == {name for name in a if ".switch_mlp." not in name}
        assert all(mx.array_equal(a[name], b[name]) for name in dense)


def test_quantised_dense_tensors_are_kept(stock: Path, tmp_path: Path):
    packed, before = Checkpoint.open(pack(stock, tmp_path / "packed", bits=3)), Checkpoint.open(stock)
    assert {n: tensor_bytes(packed, n) for n in packed.dense} == {n: tensor_bytes(before, n) for n in before.dense}


def test_many_tasks_and_threads_give_the_same_bytes(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    once = contents(pack(sources["hf-per-expert"], tmp_path / "once", bits=4))
    small_tasks(monkeypatch)
    assert contents(pack(sources["hf-per-expert"], tmp_path / "small", bits=4)) == once


@pytest.mark.parametrize(("format", "bits"), [("hf-fused", 4), ("hf-per-expert", 3), ("stock", 2), ("stock", None)])
def test_records_in_parts_give_the_same_bytes(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, bits: int | None
):
    """As if shards arrived one at a time: a record's parts are written separately and their checksums combined.

    Of the stock checkpoint's twenty shards some end between a projection's weight and its scales.
    """
    config = chat_config(num_hidden_layers=2, full_attention_interval=2)
    source = sources.get(format) or make_checkpoint(tmp_path / "stock", bits=4, config=config, shards=20)
    whole = contents(pack(source, tmp_path / "whole", bits=bits))
    monkeypatch.setattr("flash_moe_mlx.packing.LocalSource.by_shard", True)
    with open_packing(source, tmp_path / "parts", PackSettings(bits=bits)) as packing:
        assert any(not getattr(task, "whole", True) for task in packing.plan.tasks)
        assert any(len(task.needs) > 1 for task in packing.plan.tasks) == ((format, bits) == ("stock", 2))
        packing.run(False)
    assert contents(tmp_path / "parts") == whole


def test_progress_and_estimate(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_tasks(monkeypatch)
    with open_packing(stock, tmp_path / "packed", PackSettings(bits=2)) as packing:
        estimate = packing.estimate()
    assert not (tmp_path / "packed").exists()
    assert estimate.remaining_bytes < estimate.result_bytes < estimate.needed_bytes < estimate.free_bytes
    assert estimate.lossy == tuple(
        f"{p}: 4-bit to 2 bits in groups of 64" for p in ("down_proj", "gate_proj", "up_proj")
    )
    assert "disk needed" in str(estimate) and "<table>" in estimate._repr_html_()
    seen = []
    packed = pack(stock, tmp_path / "packed", bits=2, progress=seen.append)
    assert seen[-1].step == "waiting for the disk" and seen[-1].done == seen[-1].total
    done = [moment.done for moment in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total == estimate.remaining_bytes
    assert len(set(done)) > 5
    size = sum(len(data) for name, data in contents(packed).items() if "safetensors" in name and "json" not in name)
    assert size == estimate.result_bytes


def test_quiet_where_stderr_is_no_terminal(stock: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pack(stock, tmp_path / "packed", bits=None, progress=True)
    assert capfd.readouterr() == ("", "")


def test_a_finished_packing_is_left_alone(stock: Path, tmp_path: Path):
    packed = pack(stock, tmp_path / "packed", bits=None)
    times = {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
    pack(stock, packed, bits=None)
    assert {path: path.stat().st_mtime_ns for path in packed.rglob("*")} == times
    with pytest.raises(PackError, match="no other packed checkpoint"):
        pack(stock, packed, bits=2)
    pack(stock, packed, bits=2, restart=True)
    assert verify(packed, full=True, against=stock)


def test_a_source_that_has_changed_since_is_not_taken_for_the_one_packed(stock: Path, tmp_path: Path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    packed = pack(source, tmp_path / "packed", bits=None)
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"other")
    with pytest.raises(PackError, match="got one of another source"):
        pack(source, packed, bits=None)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bits": ({"bits": 7}, RequestError, r"\[bits\] must be one of 2, 3, 4, 5, 6, 8, got 7"),
    "bits text": ({"bits": "4"}, RequestError, r"\[bits\]"),
    "group size": ({"group_size": 16}, RequestError, r"\[group_size\] must be 32, 64 or 128"),
    "down bits": ({"down_bits": 1}, RequestError, r"\[down_bits\]"),
    "layer bits": ({"layer_bits": {3: 9}}, RequestError, "layer_bits of layer 3"),
    "dense": ({"dense": "drop"}, RequestError, r"\[dense\]"),
    "dense without bits": ({"dense": "quantize", "bits": None}, RequestError, "needs bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_refused(case: str, stock: Path, tmp_path: Path):
    arguments, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        pack(stock, tmp_path / "packed", **arguments)
    assert not (tmp_path / "packed").exists()


def test_paths_refused(stock: Path, tmp_path: Path):
    with pytest.raises(RequestError, match="outside the source"):
        pack(stock, stock / "packed")
    with pytest.raises(CheckpointError, match="got neither"):
        pack(tmp_path / "nothing", tmp_path / "packed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"must be empty .*, got thesis\.txt"):
        pack(stock, tmp_path / "full", restart=True)
    assert contents(tmp_path / "full") == {"thesis.txt": b"mine"}


MEMORY_CHILD = """
import re, sys
from flash_moe_mlx.packing import dense, pack, plan, run

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

dense.CHUNK_BYTES = plan.CHUNK_BYTES = 2 << 20
run._BUFFER_CACHE_BYTES = 8 << 20
before = peak()
pack(sys.argv[1], sys.argv[2], bits=4, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    """A model of 330 MB, of which 134 MB are two tensors, in pieces of 2 MB: it is never there as a whole."""
    config = chat_config(dtype="bfloat16", num_hidden_layers=2, full_attention_interval=2, vocab_size=2**18,
                         moe_intermediate_size=1024, num_experts=128)  # fmt: skip
    source = make_checkpoint(tmp_path / "source", "hf-fused", config=config, shards=3)
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 300e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, source, tmp_path / "packed"], check=True, capture_output=True, text=True,
        env=os.environ,
    )  # fmt: skip
    assert 0 < int(done.stdout) < 100e6
