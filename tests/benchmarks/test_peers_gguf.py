"""benchmarks/peers/gguf.py: the GGUF for llama.cpp holds the checkpoint's numbers, in llama.cpp's places."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from benchmarks.synthetic import LOCAL_SHARE, Dimensions, write_checkpoint

gguf = pytest.importorskip("gguf")

from benchmarks.peers.gguf import part, write_gguf  # noqa: E402

DIMENSIONS = Dimensions(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    vocab_size=256,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, another with local routing, and the GGUFs of both."""
    folder = tmp_path_factory.mktemp("peers")
    write_checkpoint(folder / "uniform", DIMENSIONS)
    write_checkpoint(folder / "local", DIMENSIONS, routing="local", like=folder / "uniform")
    write_gguf(folder / "uniform", folder / "uniform.gguf")
    write_gguf(folder / "local", folder / "local.gguf", like=folder / "uniform.gguf")
    return folder


def mlx_matrix(checkpoint: Path, name: str, bits: int = 4) -> np.ndarray:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    parts = [f"{name}.{kind}" for kind in ("weight", "scales", "biases")]
    weight, scales, biases = (mx.load(str(checkpoint / index[part]))[part] for part in parts)
    return np.array(
        mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=bits)
    )


def gguf_matrix(path: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_embd.weight", "model.embed_tokens"),
        ("output.weight", "lm_head"),
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj"),
        ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj"),
        ("blk.1.ffn_gate_exps.weight", "model.layers.1.mlp.switch_mlp.gate_proj"),
        ("blk.1.ffn_down_exps.weight", "model.layers.1.mlp.switch_mlp.down_proj"),
        ("blk.2.ffn_up_shexp.weight", "model.layers.2.mlp.shared_expert.up_proj"),
    ],
)
def test_holds_the_same_numbers(folder: Path, theirs: str, ours: str) -> None:
    expected = mlx_matrix(folder / "uniform", f"language_model.{ours}")
    assert np.array_equal(gguf_matrix(part(folder / "uniform.gguf", 2), theirs), expected)


def test_value_heads_are_tiled(folder: Path) -> None:
    # Value head h of llama.cpp goes with key head h % 2, of MLX with h // 3.
    order, keys = [0, 3, 1, 4, 2, 5], 2 * 2 * 32
    layer, second = "language_model.model.layers.0.linear_attn", part(folder / "uniform.gguf", 2)
    qkv = mlx_matrix(folder / "uniform", f"{layer}.in_proj_qkv")
    values = qkv[keys:].reshape(6, 32, -1)[order].reshape(6 * 32, -1)
    assert np.array_equal(gguf_matrix(second, "blk.0.attn_qkv.weight"), np.concatenate([qkv[:keys], values]))
    out = mlx_matrix(folder / "uniform", f"{layer}.out_proj")
    assert np.array_equal(
        gguf_matrix(second, "blk.0.ssm_out.weight"), out.reshape(-1, 6, 32)[:, order].reshape(out.shape)
    )
    beta = mlx_matrix(folder / "uniform", f"{layer}.in_proj_b")
    assert np.array_equal(gguf_matrix(second, "blk.0.ssm_beta.weight"), beta[order])


@pytest.mark.parametrize("routing", ["uniform", "local"])
def test_routers_are_the_first_part(folder: Path, routing: str) -> None:
    expected = mlx_matrix(folder / routing, "language_model.model.layers.0.mlp.gate", bits=8)
    got = gguf_matrix(part(folder / f"{routing}.gguf", 1), "blk.0.ffn_gate_inp.weight")
    assert np.array_equal(got, expected)
    lengths = np.sort(np.linalg.norm(got, axis=1))
    favoured = round(LOCAL_SHARE * DIMENSIONS.num_experts)
    assert (lengths[-favoured] > 4 * lengths[-favoured - 1]) == (routing == "local")


def test_another_routing_shares_the_rest(folder: Path) -> None:
    assert part(folder / "local.gguf", 2).samefile(part(folder / "uniform.gguf", 2))
    shared = [file for file in sorted((folder / "uniform").glob("*.safetensors")) if "00006-of" not in file.name]
    assert len(shared) == 5
    assert all(file.samefile(folder / "local" / file.name) for file in shared)


def test_refuses_what_q4_0_can_not_hold(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "three", DIMENSIONS, bits=3)
    with pytest.raises(ValueError, match="must have 4 bits"):
        write_gguf(tmp_path / "three", tmp_path / "three.gguf")
