"""A quantisation mode is one entry: a made-up one is registered, written, planned, packed and streamed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import pack, plan, verify
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.expert_layout import Quantization
from flash_moe_mlx.formats.schemes import AFFINE, FLOAT_DTYPES, SCHEMES, Scheme, matching, part_names

from ..support.checkpoints import Tensors, hf_tensors, mlx_tensors, text_config, write_checkpoint
from ..support.models import greedy, smallest_limit, streamed
from ..support.numerics import assert_close

EXCESS = 8
GROUP = 32


def dequantise(parts: Mapping[str, mx.array], bits: int, group_size: int) -> mx.array:
    """``w = (q - 8) * step``: the affine mode without its biases, and another name for scales."""
    codes = (parts["weight"][..., None] >> (bits * mx.arange(32 // bits, dtype=mx.uint32))) & (2**bits - 1)
    codes = codes.reshape(*parts["weight"].shape[:-1], -1, group_size).astype(parts["step"].dtype) - EXCESS
    return (codes * parts["step"][..., None]).reshape(*codes.shape[:-2], -1)


def quantise(value: mx.array) -> Tensors:
    """Weights in the made-up mode."""
    groups = value.astype(mx.float32).reshape(*value.shape[:-1], -1, GROUP)
    step = mx.maximum(mx.abs(groups).max(-1) / 7, 1e-6)
    codes = mx.clip(mx.round(groups / step[..., None]) + EXCESS, 0, 15).astype(mx.uint32)
    words = codes.reshape(*value.shape[:-1], -1, 8) << (4 * mx.arange(8, dtype=mx.uint32))
    return {"weight": words.sum(-1).astype(mx.uint32), "step": step}


@pytest.fixture
def excess_mode(monkeypatch: pytest.MonkeyPatch) -> Scheme:
    scheme = Scheme("excess", (4,), (GROUP,), (4, GROUP), {"weight": ("U32",), "step": ("F32",)}, dequantise)
    monkeypatch.setitem(SCHEMES, "excess", scheme)
    return scheme


def write_pair(directory: Path) -> tuple[Path, Path]:
    """A checkpoint in the made-up mode, and the same weights dequantised."""
    config = {"model_type": "qwen3_5_moe", "text_config": text_config()}
    quantised: Tensors = {}
    dense: Tensors = {}
    for name, value in mlx_tensors(hf_tensors(config["text_config"], dtype=mx.float32)).items():
        if value.ndim < 2 or "conv1d" in name or not name.endswith(".weight"):
            quantised[name] = dense[name] = value
            continue
        parts = quantise(value)
        quantised |= {f"{name.removesuffix('weight')}{part}": made for part, made in parts.items()}
        dense[name] = dequantise(parts, 4, GROUP)
    section = {"bits": 4, "group_size": GROUP, "mode": "excess"}
    return (
        write_checkpoint(directory / "excess", {**config, "quantization": section}, quantised),
        write_checkpoint(directory / "dense", config, dense),
    )


@pytest.mark.usefixtures("excess_mode")
@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "reference"])
def test_a_made_up_mode_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, reference: bool):
    """Equal to the dequantised checkpoint, whatever the budget, packed or not."""
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1" if reference else "")
    excess, dense = write_pair(tmp_path)
    assert Checkpoint.open(excess).layout(0).quantization("up_proj") == Quantization(4, GROUP, "excess")
    assert plan(excess, memory_limit="1GB").fits
    pack(excess, tmp_path / "packed", bits=None)
    assert verify(tmp_path / "packed", full=True, against=excess).ok
    ids = mx.array(np.random.default_rng(1).integers(0, 128, (1, 40)))
    with streamed(dense) as model:
        expected, tokens = np.array(model(ids)), greedy(model, [1, 2, 3], 16)[0]
    results = []
    for directory, limit in [(excess, "1GB"), (excess, smallest_limit(excess)), (tmp_path / "packed", "1GB")]:
        with streamed(directory, limit) as model:
            results.append(np.array(model(ids)))
            assert_close("logits", expected, results[-1], 1e-5)
            assert greedy(model, [1, 2, 3], 16)[0] == tokens
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.usefixtures("excess_mode")
def test_requantised_from_a_made_up_mode(tmp_path: Path):
    """pack quantises the dequantised weights."""
    excess, dense = write_pair(tmp_path)
    for source in (excess, dense):
        pack(source, tmp_path / f"packed-{source.name}", bits=8, dense="keep")
    layouts = [Checkpoint.open(tmp_path / f"packed-{name}").layout(0) for name in ("excess", "dense")]
    assert layouts[0].quantization("up_proj") == layouts[1].quantization("up_proj") == Quantization(8, 64)


def test_entries():
    """Names, dtypes and shapes that an entry gives are MLX's own."""
    assert part_names()[0] == "weight"
    dtypes = {mx.uint32: "U32", mx.uint8: "U8", mx.bfloat16: "BF16"}
    for scheme in (SCHEMES[mode] for mode in ("affine", "mxfp4", "mxfp8", "nvfp4")):
        bits, group_size = scheme.default
        assert scheme.allows(bits, group_size)
        made: Any = mx.quantize(mx.zeros((8, 256), mx.bfloat16), group_size, bits, mode=scheme.mode)
        expected = {n: (dtypes[a.dtype], a.shape) for n, a in zip(scheme.parts, made, strict=True)}
        assert scheme.specs(8, 256, bits, group_size, "BF16") == expected
        assert scheme in matching({name: dtype for name, (dtype, _) in expected.items()})
        assert mx.quantize(mx.zeros((8, 256)), mode=scheme.mode)[0].shape[1] * 32 == 256 * bits
    assert AFFINE.sizes_in_words == "2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128"
    assert matching({"weight": "BF16"}) == []
    assert matching({"weight": "U32", "scales": "F16"}) == []
    assert all(dtype in AFFINE.parts["scales"] for dtype in FLOAT_DTYPES)
