"""AWQ and GPTQ, which are rewritten before they are streamed: MLX's words of the same weights."""

import json
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from flash_moe_mlx import UnsupportedModelError, load_model, pack, plan, verify
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.packing import run
from flash_moe_mlx.planning.speed import Speed

from ..models.test_layouts import check
from ..support.hub_layouts import AWQ_ORDER, GROUP, OWN, PACKED_FIRST, awq, with_attention, write_layout, write_tensors
from ..support.models import load_resident, streamed
from ..support.numerics import assert_close

_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.(weight|scales|biases)")
_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def fields(words: mx.array, bits: int, order: list[int]) -> np.ndarray:
    """Codes along the last axis, by the definition of the order: written apart from the code under test."""
    packed = np.array(words).view(np.uint32)
    codes = np.empty((*packed.shape, len(order)), np.uint32)
    for place, index in enumerate(order):
        codes[..., index] = packed >> np.uint32(bits * place) & np.uint32(2**bits - 1)
    return codes.reshape(packed.shape[0], -1)


def affine(own: dict[str, mx.array], section: dict[str, Any]) -> dict[str, np.ndarray]:
    """A matrix's affine parts, by the formats' definitions."""
    bits = section["bits"]
    in_order = list(range(32 // bits))
    if section["quant_method"] == "awq":
        codes, zeros = fields(own["qweight"], 4, AWQ_ORDER).T, fields(own["qzeros"], 4, AWQ_ORDER).T
    else:
        codes, zeros = fields(own["qweight"].T, bits, in_order), fields(own["qzeros"], bits, in_order).T
        if section["checkpoint_format"] == "gptq":
            zeros = (zeros + 1) % 2**bits
    scales = np.array(own["scales"]).T
    runs = codes.reshape(codes.shape[0], -1, 32 // bits).astype(np.uint32)
    words = sum(runs[..., n] << np.uint32(bits * n) for n in in_order)
    biases = -(zeros.astype(np.float32) * scales.astype(np.float32))
    return {"weight": words, "scales": scales, "biases": biases.astype(np.float16)}


def as_mlx_has_it(source: Path, target: Path) -> dict[str, mx.array]:
    """Write the same model as mlx_lm.convert would have: affine, experts stacked."""
    config = json.loads((source / "config.json").read_text())
    section = config.pop("quantization_config")
    stored = mx.load(str(source / "model.safetensors"))
    tensors: dict[str, mx.array] = {}
    experts: dict[str, list[mx.array]] = {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        if f"{module}.qweight" not in stored:
            tensors[name] = value
        elif part == "qweight":
            own = {p: stored[f"{module}.{p}"] for p in ("qweight", "qzeros", "scales")}
            for made, array in affine(own, section).items():
                if match := _EXPERT.fullmatch(f"{module}.{made}"):
                    stem, _, projection, _ = match.groups()
                    path = f"{stem}.switch_mlp.{_NAMES.get(projection, projection)}.{made}"
                    experts.setdefault(path, []).append((int(match[2]), mx.array(np.ascontiguousarray(array))))
                else:
                    tensors[f"{module}.{made}"] = mx.array(np.ascontiguousarray(array))
    tensors |= {path: mx.stack([one for _, one in sorted(some, key=lambda e: e[0])]) for path, some in experts.items()}
    write_tensors(target, {**config, "quantization": {"group_size": GROUP, "bits": section["bits"]}}, tensors)
    return tensors


@pytest.mark.parametrize("layout", PACKED_FIRST)
def test_packed_bit_for_bit(layout: str, tmp_path: Path):
    source = write_layout(tmp_path / "source", PACKED_FIRST[layout])
    expected = as_mlx_has_it(source, tmp_path / "mlx")
    pack(source, tmp_path / "packed", bits=None, progress=False)
    report = verify(tmp_path / "packed", full=True, against=source)
    assert report.ok
    assert report.compared
    packed = Checkpoint.open(tmp_path / "packed")
    layer = packed.moe_layers[0]
    assert packed.manifest is not None
    (record,) = packed.ranges(layer, 3)
    data = record.path.read_bytes()[record.file_offset :]
    for part in packed.layout(layer).parts:
        own = np.array(expected[f"{packed.manifest.layers[layer].module}.{part.name}"][3])
        assert data[part.offset : part.offset + part.nbytes] == own.tobytes(), part.name
    paths = {info.path for info in packed.dense.values()}
    dense = {name: value for path in paths for name, value in mx.load(str(path)).items()}
    assert dense.keys() < expected.keys()
    quantised = [name for name in dense if name.rpartition(".")[2] in ("scales", "biases")]
    assert bool(quantised) == (layout in ("AWQ", "GPTQ", "GPTQ 2"))
    for name in quantised:
        for own in (name, f"{name.rpartition('.')[0]}.weight"):
            np.testing.assert_array_equal(np.array(dense[own]), np.array(expected[own]))
    if layout in ("AWQ", "GPTQ"):  # the others differ in their bytes alone
        check(tmp_path / "packed", load_resident(tmp_path / "mlx"), ["pread"])


def test_as_mlx_lm_transforms_awq(tmp_path: Path):
    """mlx-lm's own transform of the same tensors, which it applies to dense models."""
    source = write_layout(tmp_path / "source", PACKED_FIRST["AWQ"])
    stored = mx.load(str(source / "model.safetensors"))
    one = {name: value for name, value in stored.items() if ".experts.5." in name and "layers.0" in name}
    section = json.loads((source / "config.json").read_text())["quantization_config"]
    theirs, stated = mlx_lm.utils._transform_awq_weights(one, section)
    assert stated == {"group_size": GROUP, "bits": 4}
    pack(source, tmp_path / "packed", bits=None, progress=False)
    packed = Checkpoint.open(tmp_path / "packed")
    (record,) = packed.ranges(0, 5)
    data = record.path.read_bytes()[record.file_offset :]
    for part in packed.layout(0).parts:
        (own,) = (value for name, value in theirs.items() if name.endswith(part.name))
        assert data[part.offset : part.offset + part.nbytes] == np.array(own).tobytes(), part.name


def test_loading_asks_for_packing(tmp_path: Path):
    """load refuses, plan says so and gives the result's figures."""
    source = write_layout(tmp_path / "source", PACKED_FIRST["AWQ"])
    with pytest.raises(UnsupportedModelError, match="flash-moe pack SOURCE DESTINATION --bits unchanged"):
        load_model(source)
    made = plan(source, memory_limit="1GB", speed=Speed(1e9, 1e-4, 1e9))
    assert "load refuses this checkpoint until" in str(made)
    pack(source, tmp_path / "packed", bits=None, progress=False)
    packed = Checkpoint.open(tmp_path / "packed")
    experts = sum(packed.layout(n).payload_bytes * packed.num_experts(n) for n in packed.moe_layers)
    assert made.expert_bytes == experts


def test_requantised(tmp_path: Path):
    source = write_layout(tmp_path / "source", PACKED_FIRST["GPTQ"])
    pack(source, tmp_path / "packed", bits=8, group_size=32, progress=False)
    packed = Checkpoint.open(tmp_path / "packed")
    assert {(q.mode, q.bits) for _, q in packed.layout(0).quantizations if q} == {("affine", 8)}
    assert packed.manifest is not None
    assert 0 < packed.manifest.quantization_error["up_proj"]["relative"] < 0.01
    with pytest.raises(UnsupportedModelError, match="Leave dense out"):
        pack(source, tmp_path / "dense", bits=4, dense="quantize", progress=False)


@pytest.mark.parametrize("where", ["mlp.experts.2.up_proj", "self_attn.q_proj"])
def test_groups_of_inputs_from_anywhere(where: str, tmp_path: Path):
    """Whatever config.json says of desc_act."""
    source = write_layout(tmp_path / "source", PACKED_FIRST["GPTQ"])
    tensors = mx.load(str(source / "model.safetensors"))
    name = f"model.layers.0.{where}.g_idx"
    tensors[name] = tensors[name][::-1]
    write_tensors(source, json.loads((source / "config.json").read_text()), tensors)
    with pytest.raises(UnsupportedModelError, match=r"g_idx.* must give each group inputs in order"):
        pack(source, tmp_path / "packed", bits=None, progress=False)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_packing_again_leaves_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MLX keeps the thread of each stream: found by 500 packings in one process, which ran out of addresses."""
    source = write_layout(tmp_path / "source", PACKED_FIRST["AWQ of Mixtral"])
    monkeypatch.setattr(run, "_THREADS", 2)
    counts = []
    for number in range(5):
        pack(source, tmp_path / f"packed{number}", bits=None, progress=False)
        counts.append(len(os.listdir("/proc/self/task")))
    assert counts[-1] - counts[0] <= 2, counts  # the second of two streams may come later


def test_dense_matrices_alone(tmp_path: Path):
    """Experts as they were: mlx-lm opens these, and they are streamed without packing."""
    model_type, _, section = PACKED_FIRST["AWQ"]
    source = write_layout(tmp_path, (model_type, with_attention(OWN, awq, experts=False), section))
    assert Checkpoint.open(source).is_streamable
    ids = mx.array([[1, 2, 3, 4, 5]])
    with streamed(source, max_context=512) as model:
        assert_close("logits", load_resident(source)(ids), np.array(model(ids).astype(mx.float32)), 1e-5)
