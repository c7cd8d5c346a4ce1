"""Synthetic gpt-oss checkpoints of any dimensions: as published in mxfp4, or with affine experts as mlx-lm stores them.

    python -m benchmarks.synthetic_gpt_oss OUT --layers 4 --vocabulary 2048
    python -m benchmarks.synthetic_gpt_oss OUT --layers 4 --vocabulary 2048 --form affine

Attention, router, embeddings and the output projection are bfloat16 in both, as published: the two checkpoints differ
in the experts alone. The rotary frequencies are not scaled.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .synthetic import AFFINE_GROUP, E2M1_RMS, MODES, SCALE_CODES, Writer


@dataclass(frozen=True)
class GptOss:
    """Values of config.json; those of gpt-oss-20b by default."""

    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 24
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 128
    vocab_size: int = 201_088
    rope_theta: int = 150_000
    rms_norm_eps: float = 1e-5


FORMS = ("published", "affine")
SHARDS = 2  # and one per layer: the embeddings, the output


def layer_types(d: GptOss) -> list[str]:
    """Return the kinds of attention, which alternate."""
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(d.num_hidden_layers)]


def write_gpt_oss(directory: Path, d: GptOss, *, form: str = "published", seed: int = 0) -> Path:
    """Write a checkpoint.

    Args:
        directory: Created if need be.
        d: Dimensions of the model.
        form: "published": experts in mxfp4, gate's and up's rows alternating; "affine": 4 bits, groups of 64, stacked.
        seed: Seed of the weights.

    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards, weight_map = d.num_hidden_layers + SHARDS, {}
    bits, group_size = MODES["affine"]
    for shard in range(shards):
        writer = Writer(np.random.default_rng((seed, shard)), bits, group_size)
        if shard == 0:
            writer.normal("model.embed_tokens.weight", (d.vocab_size, d.hidden_size), 1.0)
        elif shard == shards - 1:
            writer.normal("model.norm.weight", (d.hidden_size,), 0.1, 1.0)
            writer.normal("lm_head.weight", (d.vocab_size, d.hidden_size), d.hidden_size**-0.5)
        else:
            _layer(writer, d, f"model.layers.{shard - 1}", form)
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        writer.write(directory / name)
        weight_map |= {tensor: name for tensor, *_ in writer.tensors}
    config = {"model_type": "gpt_oss", "layer_types": layer_types(d), "tie_word_embeddings": False, **asdict(d)}
    if form == "published":
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        }  # fmt: skip
    else:
        config["quantization"] = {"bits": bits, "group_size": AFFINE_GROUP}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def _layer(writer: Writer, d: GptOss, path: str, form: str) -> None:
    hidden, width, experts = d.hidden_size, d.intermediate_size, d.num_local_experts
    heads, keys = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    writer.normal(f"{path}.input_layernorm.weight", (hidden,), 0.1, 1.0)
    writer.normal(f"{path}.post_attention_layernorm.weight", (hidden,), 0.1, 1.0)
    writer.normal(f"{path}.self_attn.sinks", (d.num_attention_heads,), 1.0)
    for name, rows, columns in (
        ("self_attn.q_proj", heads, hidden), ("self_attn.k_proj", keys, hidden), ("self_attn.v_proj", keys, hidden),
        ("self_attn.o_proj", hidden, heads), ("mlp.router", experts, hidden),
    ):  # fmt: skip
        writer.normal(f"{path}.{name}.weight", (rows, columns), columns**-0.5)
        writer.normal(f"{path}.{name}.bias", (rows,), 0.1)
    own = f"{path}.mlp.experts"
    if form == "affine":
        for name, rows, columns in (
            ("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width),
        ):  # fmt: skip
            writer.matrix(f"{own}.{name}", experts, rows, columns)
            writer.normal(f"{own}.{name}.bias", (experts, rows), 0.1)
        return
    for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        groups = (experts, rows, columns // MODES["mxfp4"][1])
        code = SCALE_CODES["mxfp4"](columns**-0.5 / E2M1_RMS)
        writer.codes(f"{own}.{name}_blocks", (*groups, 16), "U8")
        writer.tensors.append((f"{own}.{name}_scales", "U8", groups, np.full(int(np.prod(groups)), code, np.uint8)))
        writer.normal(f"{own}.{name}_bias", (experts, rows), 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--form", choices=FORMS, default="published")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    d = GptOss()
    d = replace(d, num_hidden_layers=a.layers or d.num_hidden_layers, vocab_size=a.vocabulary or d.vocab_size)
    write_gpt_oss(a.out, d, form=a.form, seed=a.seed)


if __name__ == "__main__":
    main()
