"""The weights of a synthetic checkpoint as a GGUF for llama.cpp: the same numbers, not the same recipe.

    python -m benchmarks.peers.gguf CHECKPOINT OUT.gguf            # writes OUT-00001-of-00002.gguf and the second part
    python -m benchmarks.peers.gguf LOCAL OUT-local.gguf --like OUT.gguf
    python -m benchmarks.peers.gguf SMALL OUT.gguf --float32       # no 8-bit activations: agrees to rounding

Q4_0 stores a scale d for 32 codes and means ``(q - 8) d``: an affine matrix whose bias is -8 times a scale that float16
holds exactly, as ``benchmarks.synthetic`` writes them at 4 bits. Anything else is refused. Routers and shared-expert
gates are float32, as llama.cpp's own conversions have them. The first part holds the metadata and the routers, so that
another routing links the second. Names, order of value heads and signs are those of the ``qwen35moe`` architecture.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from benchmarks.synthetic import Dimensions, dimensions_of

ARCHITECTURE = "qwen35moe"
BLOCK = 32
_Q4_0, _F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32


class Checkpoint:
    """Tensors of a checkpoint as maps of its files, under MLX's names."""

    def __init__(self, directory: Path, group_size: int):
        self.group_size = group_size
        self._tensors: dict[str, tuple[Path, str, list[int], int]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start = 8 + length + entry["data_offsets"][0]
                    self._tensors[name] = (path, entry["dtype"], entry["shape"], start)

    def array(self, name: str) -> np.ndarray:
        """Read a tensor as stored; bfloat16 as float32."""
        path, dtype, shape, start = self._tensors[name]
        stored = {"U32": np.uint32, "F32": np.float32, "BF16": np.uint16}[dtype]
        values = np.memmap(path, stored, "r", start, tuple(shape))
        return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values

    def dequantised(self, name: str) -> np.ndarray:
        """Dequantise an affine matrix to float32."""
        packed, scales = self.array(f"{name}.weight"), self.array(f"{name}.scales")
        inputs = self.matrix_shape(name)[-1]
        bits = 32 * packed.shape[-1] // inputs
        shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
        codes = (packed[..., None] >> shifts & np.uint32(2**bits - 1)).reshape(*packed.shape[:-1], inputs)
        grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
        return (grouped * scales[..., None] + self.array(f"{name}.biases")[..., None]).reshape(codes.shape)

    def q4_0(self, name: str) -> np.ndarray:
        """Convert a 4-bit matrix to blocks: uint8 (..., inputs / 32, 18). Refuses one that Q4_0 can't hold exactly."""
        packed, scales = self.array(f"{name}.weight"), self.array(f"{name}.scales")
        half = scales.astype(np.float16)
        if 8 * packed.shape[-1] != self.matrix_shape(name)[-1] or not np.array_equal(half.astype(np.float32), scales):
            raise ValueError(
                f"[{name}] must have 4 bits and scales that float16 holds. Write it with benchmarks.synthetic."
            )
        if not np.array_equal(self.array(f"{name}.biases"), -8 * scales):
            raise ValueError(f"[{name}] must have biases of -8 times the scales. Write it with benchmarks.synthetic.")
        pairs = packed.view(np.uint8).reshape(*packed.shape[:-1], -1, BLOCK // 2)
        blocks = np.empty((*pairs.shape[:-1], 2 + BLOCK // 2), np.uint8)
        repeats = pairs.shape[-2] // scales.shape[-1]
        blocks[..., :2] = np.repeat(half, repeats, axis=-1)[..., None].view(np.uint8)
        # MLX puts weights 2i and 2i + 1 into byte i, ggml i and i + 16.
        first, second = pairs[..., : BLOCK // 4], pairs[..., BLOCK // 4 :]
        blocks[..., 2::2] = first & 15 | second << 4
        blocks[..., 3::2] = first >> 4 | second & 0xF0
        return blocks

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an affine matrix, (..., outputs, inputs)."""
        *rows, groups = self._tensors[f"{name}.scales"][2]
        return (*rows, groups * self.group_size)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF, made when it is written. Shape in logical elements, outermost first."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        elements, nbytes = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // elements * nbytes


class Converter:
    """One checkpoint's tensors under llama.cpp's names."""

    def __init__(self, directory: Path, *, float32: bool):
        config = json.loads((directory / "config.json").read_text())
        self.dimensions: Dimensions = dimensions_of(directory)
        self.checkpoint = Checkpoint(directory, config["quantization"]["group_size"])
        self.rms_norm_eps: float = config["text_config"]["rms_norm_eps"]
        self.rope: dict[str, float] = config["text_config"]["rope_parameters"]
        self._float32 = float32

    def routers(self) -> Iterator[Tensor]:
        for i in range(self.dimensions.num_hidden_layers):
            yield self._dequantised(f"blk.{i}.ffn_gate_inp.weight", f"{_layer(i)}.mlp.gate")

    def others(self) -> Iterator[Tensor]:
        yield self._matrix("token_embd.weight", "language_model.model.embed_tokens")
        yield self._matrix("output.weight", "language_model.lm_head")
        yield self._vector("output_norm.weight", "language_model.model.norm.weight")
        for i in range(self.dimensions.num_hidden_layers):
            block, layer = f"blk.{i}", _layer(i)
            yield self._vector(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight")
            yield self._vector(f"{block}.post_attention_norm.weight", f"{layer}.post_attention_layernorm.weight")
            full = (i + 1) % self.dimensions.full_attention_interval == 0
            yield from (self._attention if full else self._delta_net)(block, layer)
            for own in ("gate", "up", "down"):
                yield self._matrix(f"{block}.ffn_{own}_exps.weight", f"{layer}.mlp.switch_mlp.{own}_proj")
                yield self._matrix(f"{block}.ffn_{own}_shexp.weight", f"{layer}.mlp.shared_expert.{own}_proj")
            yield self._dequantised(f"{block}.ffn_gate_inp_shexp.weight", f"{layer}.mlp.shared_expert_gate")

    def _attention(self, block: str, layer: str) -> Iterator[Tensor]:
        name = f"{layer}.self_attn"
        for own, stored in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            yield self._matrix(f"{block}.attn_{own}.weight", f"{name}.{stored}")
        yield self._vector(f"{block}.attn_q_norm.weight", f"{name}.q_norm.weight")
        yield self._vector(f"{block}.attn_k_norm.weight", f"{name}.k_norm.weight")

    def _delta_net(self, block: str, layer: str) -> Iterator[Tensor]:
        d, name, of = self.dimensions, f"{layer}.linear_attn", self.checkpoint.array
        keys = 2 * d.linear_num_key_heads * d.linear_key_head_dim
        heads, values = self._tiled_heads(1), self._tiled_heads(d.linear_value_head_dim)
        mixed = np.concatenate([np.arange(keys), keys + values])
        yield self._matrix(f"{block}.attn_qkv.weight", f"{name}.in_proj_qkv", rows=mixed)
        yield self._matrix(f"{block}.attn_gate.weight", f"{name}.in_proj_z", rows=values)
        yield self._matrix(f"{block}.ssm_beta.weight", f"{name}.in_proj_b", rows=heads)
        yield self._matrix(f"{block}.ssm_alpha.weight", f"{name}.in_proj_a", rows=heads)
        yield self._matrix(f"{block}.ssm_out.weight", f"{name}.out_proj", columns=values)
        for own, values in (
            ("ssm_conv1d.weight", of(f"{name}.conv1d.weight")[mixed, :, 0]),
            ("ssm_dt.bias", of(f"{name}.dt_bias")[heads]),
            ("ssm_a", -np.exp(of(f"{name}.A_log")[heads])),
        ):
            yield Tensor(f"{block}.{own}", values.shape, _F32, partial(np.asarray, values))
        yield self._vector(f"{block}.ssm_norm.weight", f"{name}.norm.weight")

    def _tiled_heads(self, width: int) -> np.ndarray:
        """Return the source of llama.cpp's value heads: it repeats all key heads in turn, MLX each by itself."""
        d = self.dimensions
        order = np.arange(d.linear_num_value_heads * width)
        return order.reshape(d.linear_num_key_heads, -1, width).swapaxes(0, 1).reshape(-1)

    def _matrix(
        self, name: str, stored: str, rows: np.ndarray | None = None, columns: np.ndarray | None = None
    ) -> Tensor:
        if self._float32:
            return self._dequantised(name, stored, rows, columns)

        def make() -> np.ndarray:
            blocks = self.checkpoint.q4_0(stored)
            blocks = blocks if rows is None else blocks[rows]
            return blocks if columns is None else blocks[:, columns[::BLOCK] // BLOCK]  # heads are whole blocks

        return Tensor(name, self.checkpoint.matrix_shape(stored), _Q4_0, make)

    def _dequantised(
        self, name: str, stored: str, rows: np.ndarray | None = None, columns: np.ndarray | None = None
    ) -> Tensor:
        def make() -> np.ndarray:
            matrix = self.checkpoint.dequantised(stored)
            matrix = matrix if rows is None else matrix[rows]
            return matrix if columns is None else matrix[:, columns]

        shape = self.checkpoint.matrix_shape(stored)
        return Tensor(name, shape[1:] if shape[0] == 1 else shape, _F32, make)

    def _vector(self, name: str, stored: str) -> Tensor:
        values = self.checkpoint.array(stored)
        return Tensor(name, values.shape, _F32, partial(np.asarray, values))


def _layer(index: int) -> str:
    return f"language_model.model.layers.{index}"


def _metadata(writer: gguf.GGUFWriter, converter: Converter) -> None:
    d = converter.dimensions
    writer.add_block_count(d.num_hidden_layers)
    writer.add_context_length(262_144)
    writer.add_embedding_length(d.hidden_size)
    writer.add_head_count(d.num_attention_heads)
    writer.add_head_count_kv(d.num_key_value_heads)
    writer.add_key_length(d.head_dim)
    writer.add_value_length(d.head_dim)
    writer.add_layer_norm_rms_eps(converter.rms_norm_eps)
    writer.add_rope_dimension_count(int(d.head_dim * converter.rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(converter.rope["rope_theta"])
    writer.add_rope_dimension_sections([11, 11, 10, 0])  # of images; text has one position for all three
    writer.add_expert_count(d.num_experts)
    writer.add_expert_used_count(d.num_experts_per_tok)
    writer.add_expert_feed_forward_length(d.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(d.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(d.linear_conv_kernel_dim)
    writer.add_ssm_inner_size(d.linear_num_value_heads * d.linear_value_head_dim)
    writer.add_ssm_state_size(d.linear_key_head_dim)
    writer.add_ssm_time_step_rank(d.linear_num_value_heads)
    writer.add_ssm_group_count(d.linear_num_key_heads)
    writer.add_full_attention_interval(d.full_attention_interval)
    writer.add_vocab_size(d.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def part(out: Path, number: int) -> Path:
    """Return the file of part 1 or 2. llama.cpp requires this form of name, and is given the first."""
    return out.with_name(f"{out.stem}-{number:05d}-of-00002.gguf")


def write_gguf(checkpoint: Path, out: Path, *, float32: bool = False, like: Path | None = None) -> Path:
    """Write both parts.

    Args:
        checkpoint: That ``benchmarks.synthetic`` wrote, at 4 bits.
        out: "NAME.gguf" stands for NAME-00001-of-00002.gguf and NAME-00002-of-00002.gguf.
        float32: Store every matrix dequantised.
        like: A GGUF that differs in its routers alone: its second part is hard-linked.

    Returns:
        The first part.
    """
    converter = Converter(checkpoint, float32=float32)
    parts = {1: list(converter.routers()), 2: list(converter.others())}
    for number, tensors in parts.items():
        path = part(out, number)
        if number == 2 and like:
            os.link(part(like, 2), path)
            continue
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        if number == 1:
            _metadata(writer, converter)
        writer.add_key_value("split.no", number - 1, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.count", len(parts), gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.tensors.count", sum(map(len, parts.values())), gguf.GGUFValueType.INT32)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.make())
            writer.write_tensor_data(values)
        writer.close()
    return part(out, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", type=Path, help="link the second part of this GGUF")
    parser.add_argument("--float32", action="store_true", help="dequantise every matrix")
    arguments = parser.parse_args()
    print(write_gguf(arguments.checkpoint, arguments.out, float32=arguments.float32, like=arguments.like))


if __name__ == "__main__":
    main()
