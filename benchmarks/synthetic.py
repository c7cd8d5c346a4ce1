"""Synthetic Qwen3.5-MoE checkpoints in the stock MLX layout, at any dimensions, written layer by layer.

Weights are random; their statistics keep activations finite and routing spread over the experts: zero mean,
variance 1 / inputs, embeddings of unit variance. The same seed gives the same bytes.

At 4 and 8 bits a code of 0 never occurs and the bias is minus half of the codes' range: ``w = (q - 8) * scale``,
which llama.cpp's Q4_0 stores as well (``benchmarks/peers/gguf.py``). Routers and shared-expert gates have 8 bits, as
in mlx-lm's conversions. The routers are the last shard: a checkpoint with other routing shares all the others.

    python -m benchmarks.synthetic OUT --preset 35b --layers 8
    python -m benchmarks.synthetic OUT --preset 35b --layers 4 --vocabulary 2048 --mode nvfp4
    python -m benchmarks.synthetic LOCAL --routing local --like OUT
"""

import argparse
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Dimensions:
    """Values of config.json's text_config, and the storage of weights (``bits`` 0: bfloat16)."""

    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    num_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    vocab_size: int = 248_320
    full_attention_interval: int = 4


LOCAL_SHARE = 80 / 256
"""Of the experts that local routing picks from, another set in each layer."""
DTYPE_BYTES = {"U8": 1, "BF16": 2, "U32": 4, "F32": 4}
AFFINE_GROUP = 64
"""Weights that share a scale in the matrices that a conversion to another mode leaves affine."""
MODES = {"affine": (4, AFFINE_GROUP), "mxfp4": (4, 32), "nvfp4": (4, 16)}
"""Bits and group size by mode."""
E2M1_RMS = 2.926
"""Root mean square of E2M1's sixteen values."""
_ROUTERS = 1 << 20  # their seed, in place of a shard's number: the same routers, however many layers follow
_FAVOUR = 16.0  # length of their router rows over that of the others

PRESETS = {
    "35b": Dimensions(),
    "122b": Dimensions(
        hidden_size=3072, num_hidden_layers=48, num_attention_heads=32, moe_intermediate_size=1024,
        shared_expert_intermediate_size=1024, linear_num_value_heads=64,
    ),
    "397b": Dimensions(
        hidden_size=4096, num_hidden_layers=60, num_attention_heads=32, num_experts=512, num_experts_per_tok=10,
        moe_intermediate_size=1024, shared_expert_intermediate_size=1024, linear_num_value_heads=64,
    ),
}  # fmt: skip


class Writer:
    """Tensors of one shard; their bytes are made when the shard is written."""

    def __init__(self, rng: np.random.Generator, bits: int, group_size: int, mode: str = "affine"):
        self.rng, self.bits, self.group_size, self.mode = rng, bits, group_size, mode
        self.tensors: list[tuple[str, str, tuple[int, ...], object]] = []

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0, dtype: str = "BF16") -> None:
        self.tensors.append((name, dtype, shape, (mean, std)))

    def matrix(
        self, name: str, *shape: int, gain: float = 1.0, bits: int | None = None, rows_gain: object = 1.0
    ) -> None:
        """Create a weight of standard deviation ``gain * rows_gain / sqrt(inputs)``, quantised if ``bits``."""
        *rows, columns = shape
        std = gain / np.sqrt(columns)
        bits = self.bits and (bits or self.bits)
        if not bits:
            self.normal(
                f"{name}.weight", shape, std * (rows_gain if np.isscalar(rows_gain) else np.repeat(rows_gain, columns))
            )
            return
        if self.mode != "affine" and bits == self.bits:
            self._coded(name, shape, std)
            return
        group_size = self.group_size if self.mode == "affine" else AFFINE_GROUP
        codes = np.arange(2**bits)
        centre = (len(codes) - 1) / 2
        if bits in _WITHOUT_ZERO:
            centre = len(codes) // 2
            codes = _WITHOUT_ZERO[bits].astype(np.int64) & (len(codes) - 1)
        scale = _round_bfloat16(std / np.sqrt(np.mean((codes - centre) ** 2)) * np.broadcast_to(rows_gain, rows))
        groups = (*rows, columns // group_size)
        scales = np.repeat(scale.reshape(-1), groups[-1])
        self.codes(f"{name}.weight", (*rows, columns * bits // 32), "U32", bits)
        self.tensors.append((f"{name}.scales", "BF16", groups, scales))
        self.tensors.append((f"{name}.biases", "BF16", groups, np.float32(-centre) * scales))

    def _coded(self, name: str, shape: tuple[int, ...], std: float) -> None:
        """Create a weight of E2M1 codes and scales of one byte: a power of two in mxfp4, E4M3 in nvfp4."""
        *rows, columns = shape
        scales = np.full(int(np.prod(rows)) * (columns // self.group_size), SCALE_CODES[self.mode](std / E2M1_RMS))
        self.codes(f"{name}.weight", (*rows, columns // 8), "U32")
        self.tensors.append((f"{name}.scales", "U8", (*rows, columns // self.group_size), scales.astype(np.uint8)))

    def codes(self, name: str, shape: tuple[int, ...], dtype: str, bits: int = 4) -> None:
        """Create random codes of weights, packed into U32 or U8."""
        self.tensors.append((name, dtype, shape, bits))

    def write(self, path: Path) -> None:
        header, offset = {"__metadata__": {"format": "mlx"}}, 0
        for name, dtype, shape, _ in self.tensors:
            size = int(np.prod(shape)) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, dtype, shape, recipe in self.tensors:
                for piece in self._pieces(dtype, int(np.prod(shape)), recipe):
                    file.write(piece)

    def _pieces(self, dtype: str, count: int, recipe: object) -> Iterator[bytes]:
        if isinstance(recipe, int):
            count = count * DTYPE_BYTES[dtype] // 4
            while count > 0:
                size = min(count, 1 << 20)
                codes = self.rng.integers(0, 2**32, size, dtype=np.uint32).view(np.uint8)
                yield (_WITHOUT_ZERO[recipe][codes] if recipe in _WITHOUT_ZERO else codes).tobytes()
                count -= size
        elif isinstance(recipe, np.ndarray):
            yield recipe.tobytes() if recipe.dtype == np.uint8 else _bfloat16(recipe.astype(np.float32))
        else:
            mean, std = recipe
            std = np.broadcast_to(np.float32(std), count)
            for start in range(0, count, 1 << 22):
                part = std[start : start + (1 << 22)]
                values = self.rng.standard_normal(len(part), dtype=np.float32) * part + np.float32(mean)
                yield values.tobytes() if dtype == "F32" else _bfloat16(values)


_BYTES = np.arange(256, dtype=np.uint8)
_WITHOUT_ZERO = {
    4: np.where(_BYTES & 15, _BYTES & 15, 8) | np.where(_BYTES >> 4, _BYTES >> 4, 8).astype(np.uint8) << 4,
    8: np.where(_BYTES, _BYTES, 128).astype(np.uint8),
}
"""By bits: each byte of codes with the middle in place of code 0, so that the mean is zero."""


def _power_of_two(value: float) -> int:
    return 127 + round(np.log2(value))


def _e4m3(value: float) -> int:
    """Return the code of the nearest number below 1 with four bits of exponent and three of mantissa."""
    values = [m / 512 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(8) for m in range(8)]
    return int(np.argmin(np.abs(np.array(values) - value)))


SCALE_CODES = {"mxfp4": _power_of_two, "nvfp4": _e4m3}


def _round_bfloat16(values: np.ndarray) -> np.ndarray:
    return (
        (np.frombuffer(_bfloat16(values.astype(np.float32)), np.uint16).astype(np.uint32) << 16)
        .view(np.float32)
        .reshape(values.shape)
    )


def _bfloat16(values: np.ndarray) -> bytes:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def write_checkpoint(
    directory: Path,
    dimensions: Dimensions,
    *,
    bits: int = 4,
    group_size: int = 64,
    mode: str = "affine",
    seed: int = 0,
    routing: str = "uniform",
    like: Path | None = None,
) -> Path:
    """Write a checkpoint: one shard for the embeddings, one a layer, and one for all routers.

    Args:
        directory: Created if need be.
        dimensions: Dimensions of the model.
        bits: Bits of all projections and experts; 0 stores bfloat16.
        group_size: Weights that share a scale.
        mode: MLX's quantisation mode of all projections and experts: "affine", or "mxfp4" or "nvfp4" in place of the
            bits and group size above.
        seed: Seed of the weights.
        routing: "uniform", or "local": each layer picks from ``LOCAL_SHARE`` of its experts.
        like: A checkpoint that differs in its routing alone, or has more layers: its other shards are hard-linked.

    Returns:
        The directory.
    """
    d = dimensions
    if mode != "affine":
        bits, group_size = MODES[mode]
    directory.mkdir(parents=True, exist_ok=True)
    shards = d.num_hidden_layers + 2
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        routers = shard == shards - 1
        writer = Writer(np.random.default_rng((seed, _ROUTERS if routers else shard)), bits, group_size, mode)
        name = _shard_name(shard, d)
        if shard == 0:
            writer.matrix("language_model.model.embed_tokens", d.vocab_size, d.hidden_size, gain=np.sqrt(d.hidden_size))
            writer.normal("language_model.model.norm.weight", (d.hidden_size,), 0.1, 1.0)
            writer.matrix("language_model.lm_head", d.vocab_size, d.hidden_size)
        elif not routers:
            _layer(writer, d, shard - 1)
        else:
            _routers(writer, d, routing)
        if like and not routers:
            os.link(like / _shard_name(shard, dimensions_of(like)), directory / name)
        else:
            writer.write(directory / name)
        weight_map |= {tensor: name for tensor, *_ in writer.tensors}
    text = asdict(d) | {
        "model_type": "qwen3_5_moe_text",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262_144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25},
    }
    config: dict[str, object] = {"model_type": "qwen3_5_moe", "text_config": text}
    if bits:
        gates = [f"{_mlp(i)}.{gate}" for i in range(d.num_hidden_layers) for gate in ("gate", "shared_expert_gate")]
        eight = {"bits": 8, "group_size": group_size if mode == "affine" else AFFINE_GROUP}
        named = {} if mode == "affine" else {"mode": mode}
        config["quantization"] = {"bits": bits, "group_size": group_size, **named, **dict.fromkeys(gates, eight)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def dimensions_of(directory: Path) -> Dimensions:
    """Return the dimensions of a checkpoint that this script wrote."""
    text = json.loads((directory / "config.json").read_text())["text_config"]
    return Dimensions(**{field.name: text[field.name] for field in fields(Dimensions)})


def _shard_name(shard: int, d: Dimensions) -> str:
    return f"model-{shard + 1:05d}-of-{d.num_hidden_layers + 2:05d}.safetensors"


def _mlp(index: int) -> str:
    return f"language_model.model.layers.{index}.mlp"


def _routers(writer: Writer, d: Dimensions, routing: str) -> None:
    for index in range(d.num_hidden_layers):
        length = np.ones(d.num_experts)
        if routing == "local":
            favoured = writer.rng.permutation(d.num_experts)[: round(d.num_experts * LOCAL_SHARE)]
            length[:] = 1 / _FAVOUR
            length[favoured] = 1
        writer.matrix(f"{_mlp(index)}.gate", d.num_experts, d.hidden_size, bits=8, rows_gain=length)


def _layer(writer: Writer, d: Dimensions, index: int) -> None:
    path, hidden = f"language_model.model.layers.{index}", d.hidden_size
    writer.normal(f"{path}.input_layernorm.weight", (hidden,), 0.1, 1.0)
    writer.normal(f"{path}.post_attention_layernorm.weight", (hidden,), 0.1, 1.0)
    if (index + 1) % d.full_attention_interval == 0:
        name = f"{path}.self_attn"
        writer.matrix(f"{name}.q_proj", 2 * d.num_attention_heads * d.head_dim, hidden)
        writer.matrix(f"{name}.k_proj", d.num_key_value_heads * d.head_dim, hidden)
        writer.matrix(f"{name}.v_proj", d.num_key_value_heads * d.head_dim, hidden)
        writer.matrix(f"{name}.o_proj", hidden, d.num_attention_heads * d.head_dim)
        writer.normal(f"{name}.q_norm.weight", (d.head_dim,), 0.1, 1.0)
        writer.normal(f"{name}.k_norm.weight", (d.head_dim,), 0.1, 1.0)
    else:
        name, keys = f"{path}.linear_attn", d.linear_num_key_heads * d.linear_key_head_dim
        values = d.linear_num_value_heads * d.linear_value_head_dim
        writer.matrix(f"{name}.in_proj_qkv", 2 * keys + values, hidden)
        writer.matrix(f"{name}.in_proj_z", values, hidden)
        writer.matrix(f"{name}.in_proj_b", d.linear_num_value_heads, hidden)
        writer.matrix(f"{name}.in_proj_a", d.linear_num_value_heads, hidden)
        writer.matrix(f"{name}.out_proj", hidden, values)
        writer.normal(f"{name}.conv1d.weight", (2 * keys + values, d.linear_conv_kernel_dim, 1), 0.5)
        writer.normal(f"{name}.dt_bias", (d.linear_num_value_heads,), 0.1)
        writer.normal(f"{name}.A_log", (d.linear_num_value_heads,), 0.5, dtype="F32")
        writer.normal(f"{name}.norm.weight", (d.linear_value_head_dim,), 0.1, 1.0)
    mlp, width = _mlp(index), d.moe_intermediate_size
    writer.matrix(f"{mlp}.shared_expert_gate", 1, hidden, bits=8)
    for name, rows, columns in (
        ("gate_proj", d.shared_expert_intermediate_size, hidden),
        ("up_proj", d.shared_expert_intermediate_size, hidden),
        ("down_proj", hidden, d.shared_expert_intermediate_size),
    ):
        writer.matrix(f"{mlp}.shared_expert.{name}", rows, columns)
    for name, rows, columns in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
        writer.matrix(f"{mlp}.switch_mlp.{name}", d.num_experts, rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="35b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--mode", choices=MODES, default="affine")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--routing", choices=("uniform", "local"), default="uniform")
    parser.add_argument(
        "--like", type=Path, help="link all but the routers of this checkpoint; give bits and seed as there"
    )
    a = parser.parse_args()
    d = dimensions_of(a.like) if a.like else PRESETS[a.preset]
    d = replace(d, num_hidden_layers=a.layers or d.num_hidden_layers, num_experts=a.experts or d.num_experts)
    d = replace(d, vocab_size=a.vocabulary or d.vocab_size)
    write_checkpoint(
        a.out, d, bits=a.bits, group_size=a.group_size, mode=a.mode, seed=a.seed, routing=a.routing, like=a.like
    )


if __name__ == "__main__":
    main()
