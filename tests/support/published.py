"""Headers of published checkpoints: config.json and safetensors files whose data are holes of the right size.

Dimensions are those of the models' config.json (transformers' defaults and configuration files in public sources);
tensors' names and dtypes those of the published forms. No byte of data is written.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_lm.utils
from mlx.utils import tree_flatten

Entry = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype and shape."""

BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1, "I32": 4, "I64": 8, "U32": 4}
_STACKED = ("switch_mlp", "experts")
_GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128, "vocab_size": 201088, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "num_experts_per_tok": 4, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4"},
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 4096},
}  # fmt: skip
_DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "norm_topk_prob": True, "vocab_size": 129280, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 163840, "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "attention_bias": False, "num_hidden_layers": 61,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
_NEMOTRON = {
    "model_type": "nemotron_h", "hidden_size": 2688, "vocab_size": 131072, "intermediate_size": 1856,
    "max_position_embeddings": 262144, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "attention_bias": False, "mamba_num_heads": 64, "mamba_head_dim": 64, "mamba_proj_bias": False,
    "ssm_state_size": 128, "conv_kernel": 4, "n_groups": 8, "mlp_bias": False, "layer_norm_epsilon": 1e-5,
    "use_bias": False, "use_conv_bias": True, "moe_intermediate_size": 1856, "n_routed_experts": 128,
    "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "num_experts_per_tok": 6, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "mlp_hidden_act": "relu2",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
}  # fmt: skip
_QWEN = {
    "model_type": "qwen3_5_moe_text", "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10, "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024, "vocab_size": 248320,
    "linear_num_key_heads": 16, "linear_num_value_heads": 64, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "max_position_embeddings": 262144, "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub.

    Attributes:
        config: The entries of config.json that matter.
        form: How experts are stored: a key of `_FORMS`.
        payload_bytes: Bytes of one expert as they must be counted.
        layers: Entry of ``config`` that tests shorten, and its short value.
        experts: Names of mlx-lm's projections as stored, for the forms of one tensor per expert.
        dense_fp8: Whether the dense matrices are block FP8 too.
    """

    config: dict[str, Any]
    form: str
    payload_bytes: int
    layers: tuple[str, Any]
    experts: dict[str, str] = field(default_factory=dict)
    dense_fp8: bool = False


_OWN = {name: name for name in ("gate_proj", "up_proj", "down_proj")}


def _bytes_of(hidden: int, width: int, projections: int, bits: float, group: int, scale_bytes: float) -> int:
    return int(projections * hidden * width * (bits / 8 + scale_bytes / group))


PUBLISHED: dict[str, Published] = {
    "openai/gpt-oss-20b": Published(
        {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32}, "gpt-oss",
        _bytes_of(2880, 2880, 3, 4, 32, 1) + 2 * 3 * 2880, ("num_hidden_layers", 2),
    ),
    "openai/gpt-oss-120b": Published(
        {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128}, "gpt-oss",
        _bytes_of(2880, 2880, 3, 4, 32, 1) + 2 * 3 * 2880, ("num_hidden_layers", 2),
    ),
    "moonshotai/Kimi-K2-Thinking": Published(
        {**_DEEPSEEK, "model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64, "n_group": 1,
         "n_routed_experts": 384, "topk_group": 1, "first_k_dense_replace": 1, "vocab_size": 163840,
         "routed_scaling_factor": 2.827,
         "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "int4", _bytes_of(7168, 2048, 3, 4, 32, 2), ("num_hidden_layers", 2), _OWN,
    ),
    "deepseek-ai/DeepSeek-V3.1": Published(
        {**_DEEPSEEK, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "fp8", 3 * 7168 * 2048 + 3 * 56 * 16 * 4, ("num_hidden_layers", 4), _OWN, dense_fp8=True,
    ),
    "zai-org/GLM-4.6": Published(
        {"model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
         "num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
         "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
         "routed_scaling_factor": 2.5, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "vocab_size": 151552,
         "rms_norm_eps": 1e-5, "rope_theta": 1e6, "partial_rotary_factor": 0.5, "use_qk_norm": True,
         "attention_bias": True, "max_position_embeddings": 202752, "rope_scaling": None,
         "tie_word_embeddings": False},
        "plain", 3 * 5120 * 1536 * 2, ("num_hidden_layers", 4), _OWN,
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Published(
        _NEMOTRON, "plain", 2 * 2688 * 1856 * 2, ("hybrid_override_pattern", "MEM*E"),
        {"fc1": "up_proj", "fc2": "down_proj"},
    ),
    "lukealonso/Qwen3.5-397B-A17B-NVFP4": Published(
        {"model_type": "qwen3_5_moe", "text_config": _QWEN,
         "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        "modelopt", _bytes_of(4096, 1024, 3, 4, 16, 1) + 3 * 4, ("num_hidden_layers", 4), _OWN,
    ),
}  # fmt: skip


def _gpt_oss(module: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[Entry]:
    experts, width, hidden = shapes["gate_proj"]
    for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        yield f"{module}.{name}_blocks", "U8", (experts, rows, columns // 32, 16)
        yield f"{module}.{name}_scales", "U8", (experts, rows, columns // 32)
        yield f"{module}.{name}_bias", "BF16", (experts, rows)


def _expert(form: str, name: str, rows: int, columns: int) -> Iterator[Entry]:
    """Tensors of one matrix."""
    if form == "int4":
        yield f"{name}.weight_packed", "I32", (rows, columns // 8)
        yield f"{name}.weight_scale", "BF16", (rows, columns // 32)
        yield f"{name}.weight_shape", "I64", (2,)
    elif form == "fp8":
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))
    elif form == "modelopt":
        yield f"{name}.weight", "U8", (rows, columns // 2)
        yield f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16)
        yield f"{name}.weight_scale_2", "F32", ()
        yield f"{name}.input_scale", "F32", ()
    else:
        yield f"{name}.weight", "BF16", (rows, columns)


def _entries(published: Published, config: dict[str, Any]) -> Iterator[Entry]:
    """The tensors of mlx-lm's model under their published names. Its parameters stay lazy: shapes are all it takes."""
    model_class, args_class = mlx_lm.utils._get_classes(config)
    text = config.get("text_config", config)
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in tree_flatten(model_class(args_class.from_dict(config)).parameters()):
        words = name.split(".")
        if len(words) > 3 and words[-3] in _STACKED:
            if words[-1] == "weight":
                blocks.setdefault(".".join(words[:-2]), {})[words[-2]] = value.shape
            continue
        if name.startswith("language_model."):  # mlx-lm's names of Qwen3.5's parameters, and its convolution's axes
            name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm", "lm")
        shape = value.shape
        if name.endswith("conv1d.weight"):
            shape = (shape[0], shape[2], shape[1])
        if name.endswith("unembed_out.weight"):
            continue
        if name.endswith("embed_q.weight"):
            heads = text["num_attention_heads"] * (text["qk_nope_head_dim"] + text["v_head_dim"])
            name, shape = name.replace("embed_q", "kv_b_proj"), (heads, text["kv_lora_rank"])
        if published.dense_fp8 and len(shape) == 2 and name.endswith("_proj.weight"):
            yield from _expert("fp8", name.removesuffix(".weight"), *shape)
        else:
            yield name, "BF16", shape
    for module, shapes in blocks.items():
        if published.form == "gpt-oss":
            yield from _gpt_oss(module, shapes)
            continue
        module = module.replace("switch_mlp", "experts").replace("language_model.model.", "model.language_model.")
        for projection, own in published.experts.items():
            experts, rows, columns = shapes[projection]
            for expert in range(experts):
                yield from _expert(published.form, f"{module}.{expert}.{own}", rows, columns)


def write_holes(directory: Path, name: str, *, short: bool) -> Path:
    """Write a published checkpoint's config.json and one file of its headers; ``short``: only the first layers."""
    published = PUBLISHED[name]
    config = json.loads(json.dumps(published.config))
    key, value = published.layers
    if short:
        config.get("text_config", config)[key] = value
    text = config.get("text_config", config)
    if text["model_type"].startswith("qwen3_5") and "layer_types" not in text:
        kinds = ("linear_attention", "full_attention")
        text["layer_types"] = [kinds[(i + 1) % 4 == 0] for i in range(text["num_hidden_layers"])]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, dtype, shape in _entries(published, config):
        end = offset + math.prod(shape) * BYTES[dtype]
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    with path.open("r+b") as file:
        file.truncate(8 + len(data) + offset)
    return directory
