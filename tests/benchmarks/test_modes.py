"""The checkpoints that benchmarks/modes.py times: their modes, their numbers, and the same numbers for llama.cpp."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from benchmarks.synthetic import MODES, write_checkpoint
from benchmarks.synthetic_gpt_oss import GptOss, write_gpt_oss

from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.expert_layout import Quantization

from .test_peers_gguf import DIMENSIONS

GPT_OSS = GptOss(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=128,
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_all_matrices_have_the_mode(mode: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, replace(DIMENSIONS, num_hidden_layers=1, full_attention_interval=1), mode=mode)
    checkpoint = Checkpoint.open(tmp_path)
    expected = Quantization(*MODES[mode], mode)
    assert {q for _, q in checkpoint.layout(0).quantizations} == {expected}
    assert checkpoint.quantization("language_model.lm_head") == expected
    assert checkpoint.quantization("language_model.model.layers.0.mlp.gate") == Quantization(8, 64)
    stored = mx.load(str(checkpoint.tensors["language_model.lm_head.weight"].path))
    parts = [stored.get(f"language_model.lm_head.{part}") for part in ("weight", "scales", "biases")]
    weights = mx.dequantize(*parts, group_size=expected.group_size, bits=4, mode=mode, dtype=mx.float32)
    deviation = float(mx.sqrt((weights**2).mean())) * DIMENSIONS.hidden_size**0.5
    assert 2**-0.5 <= deviation <= 2**0.5, "a power of two is the nearest scale that mxfp4 has"


@pytest.mark.parametrize("form", ["published", "affine"])
def test_experts_of_gpt_oss(form: str, tmp_path: Path) -> None:
    write_gpt_oss(tmp_path, replace(GPT_OSS, intermediate_size=128), form=form)
    layout = Checkpoint.open(tmp_path).layout(1)
    mode = "mxfp4" if form == "published" else "affine"
    assert {q for _, q in layout.quantizations} == {Quantization(*MODES[mode], mode)}
    assert layout.has_views == (form == "published")


def test_llama_cpp_gets_the_same_numbers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.peers.gguf_gpt_oss import write_gpt_oss_gguf

    write_gpt_oss(tmp_path / "model", GPT_OSS)
    stored = {
        name: value for path in (tmp_path / "model").glob("*.safetensors") for name, value in mx.load(str(path)).items()
    }
    written = gguf.GGUFReader(write_gpt_oss_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in written.tensors}
    for own, name, first, step in (("gate", "gate_up", 0, 2), ("up", "gate_up", 1, 2), ("down", "down", 0, 1)):
        path = f"model.layers.1.mlp.experts.{name}_proj"
        weight = stored[f"{path}_blocks"].view(mx.uint32).flatten(-2)
        expected = mx.dequantize(
            weight, stored[f"{path}_scales"], group_size=32, bits=4, mode="mxfp4", dtype=mx.float32
        )
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{own}_exps.weight"], np.array(expected)[:, first::step])
        bias = np.array(stored[f"{path}_bias"].astype(mx.float32))[:, first::step]
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{own}_exps.bias"], bias)
    queries = np.array(stored["model.layers.0.self_attn.q_proj.weight"].astype(mx.float32))
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"], queries)
    sinks = np.array(stored["model.layers.0.self_attn.sinks"].astype(mx.float32))
    np.testing.assert_array_equal(tensors["blk.0.attn_sinks.weight"], sinks)
