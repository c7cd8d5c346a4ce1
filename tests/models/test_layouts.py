"""Models in the layouts and forms in which they are published, streamed, against mlx-lm's resident ones."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.models.foreign_dense import dequantised

from ..support.hub_layouts import (
    FOREIGN,
    GLOBAL_SCALES,
    LAYOUTS,
    NVFP4_LIMIT,
    compressed_nvfp4,
    fp8,
    modelopt,
    write_layout,
    write_tensors,
)
from ..support.models import greedy, load_resident, smallest_limit, streamed
from ..support.numerics import assert_close
from ..support.switch_models import GREEDY_TOKENS, MAX_CONTEXT

TOLERANCE = 1e-4
VOCABULARY = 128


def check(directory: Path, resident: Any, ways: list[str]) -> None:
    """Logits within the tolerance, equal greedy tokens; the same bits at every budget and in every way of reading."""
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, VOCABULARY, 20).tolist()
    ids = mx.array(rng.integers(0, VOCABULARY, (1, 40)))
    expected, tokens = resident(ids), greedy(resident, prompt, GREEDY_TOKENS)[0]
    results = []
    for io in ["all", *ways]:
        limit = "1GB" if io == "all" else smallest_limit(directory, max_context=MAX_CONTEXT, io=io)
        with streamed(directory, limit, max_context=MAX_CONTEXT, io="auto" if io == "all" else io) as model:
            results.append(np.array(model(ids).astype(mx.float32)))
            assert_close("logits", expected, results[-1], TOLERANCE)
            if io in ("all", ways[0]):
                assert greedy(model, prompt, GREEDY_TOKENS)[0] == tokens
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_mlx_lm(layout: str, tmp_path: Path):
    directory = write_layout(tmp_path, LAYOUTS[layout])
    ways = ["pread", "mmap", "direct"] if layout in ("gpt-oss", "Llama 4", "Nemotron-H") else ["pread"]
    check(directory, load_resident(directory), ways)


@pytest.mark.parametrize("layout", FOREIGN)
def test_matches_the_dequantised(layout: str, tmp_path: Path):
    """mlx-lm has no reader of these: the same weights, dequantised by the definition of the format."""
    directory = write_layout(tmp_path / "published", FOREIGN[layout])
    checkpoint = Checkpoint.open(directory)
    assert {q.stated.mode for _, q in checkpoint.layout(0).quantizations if q} == {"nvfp4"}
    tensors = mx.load(str(directory / "model.safetensors"))
    plain = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if ".experts." not in name:
            plain[name] = value
        elif part in ("weight", "weight_packed"):
            words, scales = value.view(mx.uint32), tensors[f"{module}.weight_scale"]
            weight = mx.dequantize(words, scales, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
            own, other = f"{module}.weight_scale_2", f"{module}.weight_global_scale"
            plain[f"{module}.weight"] = weight * tensors[own] if own in tensors else weight / tensors[other]
    config = {k: v for k, v in mlx_lm.utils.load_config(directory).items() if k != "quantization_config"}
    write_tensors(tmp_path / "plain", config, plain)
    check(directory, load_resident(tmp_path / "plain"), ["pread"])


def test_global_scales_of_mlx(tmp_path: Path):
    directory = write_layout(tmp_path / "published", GLOBAL_SCALES)
    layout = Checkpoint.open(directory).layout(0)
    assert {q.mode for _, q in layout.quantizations if q} == {"nvfp4 with global_scale"}
    tensors = mx.load(str(directory / "model.safetensors"))
    plain = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if ".switch_mlp." not in name:
            plain[name] = value
        elif part == "weight":
            how = {"group_size": 16, "bits": 4, "mode": "nvfp4", "dtype": mx.float32}
            weight = mx.dequantize(value, tensors[f"{module}.scales"], **how)
            plain[name] = weight * (tensors[f"{module}.global_scale"] / NVFP4_LIMIT)[:, None, None]
    write_tensors(tmp_path / "plain", mlx_lm.utils.load_config(directory), plain)
    check(directory, load_resident(tmp_path / "plain"), ["pread"])


def test_dense_matrices_of_other_tools(tmp_path: Path):
    """Of a model whose mlx-lm definition doesn't dequantise: FP8 and NVFP4 in attention become bfloat16."""
    model_type, make, section = FOREIGN["ModelOpt NVFP4"]
    directory = write_layout(tmp_path / "published", (model_type, make, section))
    tensors = mx.load(str(directory / "model.safetensors"))
    config = mlx_lm.utils.load_config(directory)
    quantised, plain = dict(tensors), dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        for form, projection in ((fp8, "q_proj"), (modelopt, "o_proj"), (compressed_nvfp4, "k_proj")):
            module = f"model.layers.{layer}.self_attn.{projection}"
            made = form(module, quantised.pop(f"{module}.weight"))
            quantised |= made
            plain |= {f"{module}.weight": dequantised(made)[0][f"{module}.weight"]}
            assert plain[f"{module}.weight"].dtype == mx.bfloat16
            error = plain[f"{module}.weight"].astype(mx.float32) - tensors[f"{module}.weight"].astype(mx.float32)
            assert mx.abs(error).max() < 0.2 * mx.abs(tensors[f"{module}.weight"]).max()
    write_tensors(tmp_path / "quantised", config, quantised)
    write_tensors(tmp_path / "plain", config, plain)
    ids = mx.array([[1, 2, 3, 4, 5]])
    with streamed(tmp_path / "plain", max_context=MAX_CONTEXT) as model:
        expected = np.array(model(ids).astype(mx.float32))
    with streamed(tmp_path / "quantised", max_context=MAX_CONTEXT) as model:
        np.testing.assert_array_equal(np.array(model(ids).astype(mx.float32)), expected)
