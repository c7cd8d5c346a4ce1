"""A published-form gpt-oss checkpoint as a GGUF for llama.cpp: the same codes and scales, in ggml's order.

    python -m benchmarks.peers.gguf_gpt_oss CHECKPOINT OUT.gguf

A block of ggml's MXFP4 is a power of two and the codes of 32 weights, of which byte i has the i-th and the (i + 16)-th;
the published byte i has the weights 2i and 2i + 1. Matrices stay bfloat16, but the router, which is float32 in
llama.cpp's own conversions. Written for the checkpoints of ``benchmarks.synthetic_gpt_oss``.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np

from .gguf import Checkpoint, Tensor

_KIND = gguf.GGMLQuantizationType
_PROJECTIONS = {"gate": ("gate_up_proj", 0, 2), "up": ("gate_up_proj", 1, 2), "down": ("down_proj", 0, 1)}
"""Stored tensor, first row and step of rows by llama.cpp's name."""


class BytesCheckpoint(Checkpoint):
    """A checkpoint whose tensors are also read as they are stored."""

    def stored(self, name: str, dtype: type) -> np.ndarray:
        """Map a tensor as elements of ``dtype``, of the size of its own."""
        path, _, shape, start = self._tensors[name]
        return np.memmap(path, dtype, "r", start, tuple(shape))


def mxfp4_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Convert published bytes (..., groups, 16) and scales (..., groups) to ggml's blocks (..., groups, 17)."""
    blocks = np.empty((*codes.shape[:-1], 17), np.uint8)
    blocks[..., 0] = scales
    first, second = codes[..., :8], codes[..., 8:]
    blocks[..., 1::2] = first & 15 | second << 4
    blocks[..., 2::2] = first >> 4 | second & 0xF0
    return blocks


def tensors(checkpoint: BytesCheckpoint, layers: int) -> Iterator[Tensor]:
    """Yield a model's tensors under llama.cpp's names."""

    def plain(name: str, stored: str, kind: gguf.GGMLQuantizationType = _KIND.F32) -> Tensor:
        shape = checkpoint.stored(stored, np.uint16).shape
        make: Callable[[], np.ndarray] = partial(checkpoint.array, stored)
        return Tensor(name, shape, kind, make if kind == _KIND.F32 else partial(checkpoint.stored, stored, np.uint16))

    def bias(name: str, stored: str, first: int = 0, step: int = 1) -> Tensor:
        values = checkpoint.array(stored)[..., first::step]
        return Tensor(name, values.shape, _KIND.F32, lambda: values)

    def experts(name: str, stored: str, first: int, step: int) -> Tensor:
        codes = checkpoint.stored(f"{stored}_blocks", np.uint8)[:, first::step]
        scales = checkpoint.stored(f"{stored}_scales", np.uint8)[:, first::step]
        shape = (*codes.shape[:2], 2 * codes.shape[2] * codes.shape[3])
        return Tensor(name, shape, _KIND.MXFP4, lambda: mxfp4_blocks(codes, scales))

    yield plain("token_embd.weight", "model.embed_tokens.weight", _KIND.BF16)
    yield plain("output.weight", "lm_head.weight", _KIND.BF16)
    yield plain("output_norm.weight", "model.norm.weight")
    for i in range(layers):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        yield plain(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight")
        yield plain(f"{block}.post_attention_norm.weight", f"{layer}.post_attention_layernorm.weight")
        yield plain(f"{block}.attn_sinks.weight", f"{layer}.self_attn.sinks")
        for own, stored in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            yield plain(f"{block}.attn_{own}.weight", f"{layer}.self_attn.{stored}.weight", _KIND.BF16)
            yield plain(f"{block}.attn_{own}.bias", f"{layer}.self_attn.{stored}.bias")
        yield plain(f"{block}.ffn_gate_inp.weight", f"{layer}.mlp.router.weight")
        yield plain(f"{block}.ffn_gate_inp.bias", f"{layer}.mlp.router.bias")
        for own, (stored, first, step) in _PROJECTIONS.items():
            yield experts(f"{block}.ffn_{own}_exps.weight", f"{layer}.mlp.experts.{stored}", first, step)
            yield bias(f"{block}.ffn_{own}_exps.bias", f"{layer}.mlp.experts.{stored}_bias", first, step)


def write_gpt_oss_gguf(directory: Path, out: Path) -> Path:
    """Write the GGUF of a checkpoint in the published form."""
    c = json.loads((directory / "config.json").read_text())
    own = list(tensors(BytesCheckpoint(directory, 0), c["num_hidden_layers"]))
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(131_072)
    writer.add_embedding_length(c["hidden_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_sliding_window(c["sliding_window"])
    writer.add_expert_count(c["num_local_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(c["intermediate_size"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for tensor in own:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in own:
        writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
    writer.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    print(write_gpt_oss_gguf(a.checkpoint, a.out))


if __name__ == "__main__":
    main()
