"""Makers of tiny Qwen3.5-MoE checkpoints on disk, in every layout that the library reads.

One seed is one model: the same weights are written fused, one tensor per expert, or as MLX does it, so that what is
read from one layout can be compared with what is read from another, and with mlx-lm and transformers.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

FORMATS = ("mlx", "hf-fused", "hf-per-expert")
NORMS_MINUS_ONE = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight", "q_norm.weight",
                   "k_norm.weight")  # fmt: skip
Tensors = dict[str, mx.array]


def text_config(**changes: Any) -> dict[str, Any]:
    """A config as transformers writes it for a text model: 3 GatedDeltaNet layers, then one of full attention."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "attention_bias": False,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 32768,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000.0, "rope_type": "default"},
        "shared_expert_intermediate_size": 64,
        "tie_word_embeddings": False,
        "vocab_size": 128,
    }
    config |= changes
    interval = config.setdefault("full_attention_interval", 4)
    kinds = ("linear_attention", "full_attention")
    config.setdefault("layer_types", [kinds[(i + 1) % interval == 0] for i in range(config["num_hidden_layers"])])
    return config


def hf_tensors(config: Mapping[str, Any], *, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> Tensors:
    """A model's weights under transformers' names (``model.layers...``), experts fused, norms stored minus one."""
    key = mx.random.key(seed)

    def normal(*shape: int, scale: float | None = None) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        return (mx.random.normal(shape, key=now) * (scale or shape[-1] ** -0.5)).astype(dtype)

    c = config
    hidden, width, shared = c["hidden_size"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    heads, kv_heads, head = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    value_heads = c["linear_num_value_heads"]
    values = value_heads * c["linear_value_head_dim"]
    tensors = {"model.embed_tokens.weight": normal(c["vocab_size"], hidden, scale=1.0)}
    for layer, kind in enumerate(c["layer_types"]):
        p = f"model.layers.{layer}"
        tensors[f"{p}.input_layernorm.weight"] = normal(hidden, scale=0.1)
        tensors[f"{p}.post_attention_layernorm.weight"] = normal(hidden, scale=0.1)
        if kind == "linear_attention":
            p += ".linear_attn"
            tensors |= {
                f"{p}.in_proj_qkv.weight": normal(2 * keys + values, hidden),
                f"{p}.in_proj_z.weight": normal(values, hidden),
                f"{p}.in_proj_b.weight": normal(value_heads, hidden),
                f"{p}.in_proj_a.weight": normal(value_heads, hidden),
                f"{p}.conv1d.weight": normal(2 * keys + values, 1, c["linear_conv_kernel_dim"]),
                f"{p}.dt_bias": normal(value_heads, scale=0.5),
                f"{p}.A_log": mx.log(1 + 15 * mx.sigmoid(normal(value_heads, scale=1.0).astype(mx.float32))),
                f"{p}.norm.weight": 1 + normal(c["linear_value_head_dim"], scale=0.1),
                f"{p}.out_proj.weight": normal(hidden, values),
            }
        else:
            p += ".self_attn"
            outputs = {"q_proj": 2 * heads * head, "k_proj": kv_heads * head, "v_proj": kv_heads * head}
            for name, rows, columns in [
                *((n, r, hidden) for n, r in outputs.items()),
                ("o_proj", hidden, heads * head),
            ]:
                tensors[f"{p}.{name}.weight"] = normal(rows, columns)
                if c["attention_bias"]:
                    tensors[f"{p}.{name}.bias"] = normal(rows, scale=0.1)
            tensors[f"{p}.q_norm.weight"] = normal(head, scale=0.1)
            tensors[f"{p}.k_norm.weight"] = normal(head, scale=0.1)
        p = f"model.layers.{layer}.mlp"
        tensors |= {
            f"{p}.gate.weight": normal(c["num_experts"], hidden),
            f"{p}.experts.gate_up_proj": normal(c["num_experts"], 2 * width, hidden),
            f"{p}.experts.down_proj": normal(c["num_experts"], hidden, width),
            f"{p}.shared_expert.gate_proj.weight": normal(shared, hidden),
            f"{p}.shared_expert.up_proj.weight": normal(shared, hidden),
            f"{p}.shared_expert.down_proj.weight": normal(hidden, shared),
            f"{p}.shared_expert_gate.weight": normal(1, hidden),
        }
    tensors["model.norm.weight"] = normal(hidden, scale=0.1)
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(c["vocab_size"], hidden)
    return tensors


def per_expert(tensors: Tensors) -> Tensors:
    """Fused experts taken apart, as `save_pretrained` of transformers 5 writes them."""
    result = {}
    for name, value in tensors.items():
        stem = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            for expert in range(value.shape[0]):
                result[f"{stem}.{expert}.gate_proj.weight"] = value[expert, :half]
                result[f"{stem}.{expert}.up_proj.weight"] = value[expert, half:]
        elif name.endswith("experts.down_proj"):
            for expert in range(value.shape[0]):
                result[f"{stem}.{expert}.down_proj.weight"] = value[expert]
        else:
            result[name] = value
    return result


def hub_extras(config: Mapping[str, Any], dtype: mx.Dtype = mx.bfloat16) -> Tensors:
    """Vision and multi-token-prediction tensors of a hub checkpoint, which text generation skips."""
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    return {
        "model.visual.blocks.0.attn.qkv.weight": mx.zeros((3 * hidden, hidden), dtype),
        "model.visual.patch_embed.proj.bias": mx.zeros((hidden,), dtype),
        "mtp.fc.weight": mx.zeros((hidden, 2 * hidden), dtype),
        "mtp.layers.0.mlp.experts.gate_up_proj": mx.zeros((experts, 2 * width, hidden), dtype),
        "mtp.layers.0.mlp.experts.down_proj": mx.zeros((experts, hidden, width), dtype),
    }


def mlx_tensors(tensors: Tensors) -> Tensors:
    """Transformers' weights as mlx-lm's `sanitize` turns them: its names, norms plus one, conv1d [C, 4, 1]."""
    result = {}
    for name, value in tensors.items():
        stem = f"language_model.{name.rpartition('.')[0].removesuffix('.experts')}"
        if name.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            result[f"{stem}.switch_mlp.gate_proj.weight"] = value[:, :half]
            result[f"{stem}.switch_mlp.up_proj.weight"] = value[:, half:]
        elif name.endswith("experts.down_proj"):
            result[f"{stem}.switch_mlp.down_proj.weight"] = value
        elif name.endswith("conv1d.weight"):
            result[f"language_model.{name}"] = value.moveaxis(2, 1)
        else:
            result[f"language_model.{name}"] = value + 1 if name.endswith(NORMS_MINUS_ONE) else value
    return result


def quantize(
    tensors: Tensors, bits: int, group_size: int, overrides: Mapping[str, tuple[int, int] | None] | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Quantise as mlx_lm.convert does, router and shared-expert gate in 8 bits and groups of 64.

    Args:
        tensors: By mlx-lm's names.
        bits: Bits of all other modules.
        group_size: Group size of all other modules. Modules whose width it doesn't divide stay as they are.
        overrides: (bits, group size) or None (not quantised) of modules whose path ends so.

    Returns:
        Tensors, and config.json's ``quantization``.
    """
    special = {"mlp.gate": (8, 64), "shared_expert_gate": (8, 64), **(overrides or {})}
    result: Tensors = {}
    section: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or value.ndim < 2 or "conv1d" in name or value.shape[-1] % group_size:
            result[name] = value
            continue
        chosen: tuple[int, int] | None = (bits, group_size)
        for suffix, setting in special.items():
            if module.endswith(suffix):
                chosen = setting
                section[module] = {"group_size": setting[1], "bits": setting[0]} if setting else False
        if chosen is None:
            result[name] = value
            continue
        packed, scales, biases = mx.quantize(value, bits=chosen[0], group_size=chosen[1])
        result |= {name: packed, f"{module}.scales": scales, f"{module}.biases": biases}
    return result, section


def make_checkpoint(
    directory: Path,
    format: str = "mlx",
    *,
    config: Mapping[str, Any] | None = None,
    bits: int | None = None,
    group_size: int = 64,
    overrides: Mapping[str, tuple[int, int] | None] | None = None,
    expert_bias: bool = False,
    shards: int = 1,
    dtype: mx.Dtype = mx.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a checkpoint and return its directory.

    Args:
        directory: Made if need be.
        format: One of `FORMATS`. "mlx" is wrapped as mlx-lm wraps it (``language_model.``), "hf-fused" as the hub
            does (``model.language_model.``, with vision and mtp tensors), "hf-per-expert" as transformers saves it.
        config: From `text_config`; by default its defaults.
        bits: Bits of the quantisation, for "mlx" only; None for none.
        group_size: Group size of the quantisation.
        overrides: See `quantize`.
        expert_bias: Whether experts have biases, which Qwen3.5 has not ("mlx" only).
        shards: Files; more than one come with an index.
        dtype: Dtype of the weights, or of scales and biases.
        seed: Seed of the weights.
    """
    config = dict(config or text_config())
    tensors = hf_tensors(config, seed=seed, dtype=dtype)
    metadata = {"format": "mlx" if format == "mlx" else "pt"}
    if format == "hf-per-expert":
        tensors = per_expert(tensors)
    elif format == "hf-fused":
        tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
        tensors |= hub_extras(config, dtype)
        config = {"model_type": "qwen3_5_moe", "text_config": config, "vision_config": {"depth": 1}}
    else:
        tensors = mlx_tensors(tensors)
        if expert_bias:
            for name in [name for name in tensors if ".switch_mlp." in name]:
                shape = tensors[name].shape[:2]
                tensors[name.replace(".weight", ".bias")] = mx.arange(prod(shape)).reshape(shape).astype(dtype)
        config = {"model_type": "qwen3_5_moe", "text_config": config}
        if bits is not None:
            tensors, section = quantize(tensors, bits, group_size, overrides)
            config |= {"quantization": section, "quantization_config": section}
    return write_checkpoint(directory, config, tensors, shards=shards, metadata=metadata)


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, mx.array],
    *,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write config.json and tensors, in the given order, into one or several files. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    names = list(tensors)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        mx.save_safetensors(
            str(directory / file),
            {name: mx.contiguous(tensors[name]) for name in names if weight_map[name] == file},
            dict(metadata or {"format": "mlx"}),
        )
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file of any header, right or wrong. ``length`` is what its first 8 bytes say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """A tensor's entry in a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
