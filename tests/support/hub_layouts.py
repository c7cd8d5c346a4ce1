"""Checkpoints in the layouts and forms in which models are published, from mlx-lm's tiny random ones.

Each maker takes mlx-lm's parameters by name and gives those of the published form, after the code that writes it:
transformers' modules for gpt-oss, Llama 4, Qwen3-VL-MoE, Granite and Mixtral; compressed-tensors and ModelOpt for int4
and NVFP4; DeepSeek's for block FP8.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .checkpoints import Tensors
from .switch_configs import make_config
from .switch_models import make_resident

_STACKED = re.compile(r"(.*)\.(switch_mlp|experts)\.(gate_proj|up_proj|down_proj|fc1|fc2)\.(weight|bias)")

NEMOTRON = {
    "hidden_size": 128, "vocab_size": 128, "intermediate_size": 192, "max_position_embeddings": 4096,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": False, "mamba_num_heads": 8,
    "mamba_head_dim": 32, "mamba_proj_bias": False, "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 2,
    "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True,
    "hybrid_override_pattern": "ME*E", "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 96,
    "n_group": 1, "n_routed_experts": 16, "n_shared_experts": 1, "topk_group": 1, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "model_type": "nemotron_h", "mlp_hidden_act": "relu2",
}  # fmt: skip
NVFP4_LIMIT = 448 * 6
GROUP = 32  # weights that share a scale in AWQ and GPTQ here; 128 as published
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def _config(model_type: str) -> dict[str, Any]:
    return dict(NEMOTRON) if model_type == "nemotron_h" else make_config(model_type)


def _grouped(tensors: Tensors) -> tuple[Tensors, dict[str, dict[str, mx.array]]]:
    """Dense tensors, and those of experts by block and then by "gate_proj.weight" and so on."""
    dense: Tensors = {}
    blocks: dict[str, dict[str, mx.array]] = {}
    for name, value in tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            dense[name] = value
        else:
            stem, module, projection, part = match.groups()
            blocks.setdefault(f"{stem}.{module}", {})[f"{projection}.{part}"] = value
    return dense, blocks


def _interleaved(gate: mx.array, up: mx.array) -> mx.array:
    return mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


def gpt_oss(tensors: Tensors) -> Tensors:
    """Lay out tensors as openai/gpt-oss-20b: MXFP4 blocks and scales, gate's and up's rows alternating, with biases."""
    dense, blocks = _grouped(tensors)
    for stem, own in blocks.items():
        for name, weight, bias in [
            ("gate_up_proj", *(_interleaved(own[f"gate_proj.{p}"], own[f"up_proj.{p}"]) for p in ("weight", "bias"))),
            ("down_proj", own["down_proj.weight"], own["down_proj.bias"]),
        ]:
            packed, scales = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
            dense[f"{stem}.{name}_blocks"] = packed.view(mx.uint8).reshape(*scales.shape, 16)
            dense[f"{stem}.{name}_scales"] = scales
            dense[f"{stem}.{name}_bias"] = bias
    return dense


def transposed(tensors: Tensors) -> Tensors:
    """Lay out tensors as Llama 4 and Qwen3-VL-MoE: gate_up_proj [E, H, 2I] and down_proj [E, I, H]."""
    dense, blocks = _grouped(tensors)
    for stem, own in blocks.items():
        gate_up = mx.concatenate([own["gate_proj.weight"], own["up_proj.weight"]], axis=1)
        stem = stem.replace("switch_mlp", "experts")
        dense[f"{stem}.gate_up_proj"] = mx.contiguous(gate_up.swapaxes(1, 2))
        dense[f"{stem}.down_proj"] = mx.contiguous(own["down_proj.weight"].swapaxes(1, 2))
    return dense


def granite(tensors: Tensors) -> Tensors:
    """Lay out tensors as GraniteMoe: input_linear [E, 2I, H] and output_linear [E, H, I]."""
    dense, blocks = _grouped(tensors)
    for stem, own in blocks.items():
        stem = stem.removesuffix(".switch_mlp")
        gate_up = mx.concatenate([own["gate_proj.weight"], own["up_proj.weight"]], axis=1)
        dense[f"{stem}.input_linear.weight"] = gate_up
        dense[f"{stem}.output_linear.weight"] = own["down_proj.weight"]
    return dense


Experts = Callable[[str, mx.array], Tensors]
"""Tensors of one expert's projection, from its module's path and its weights."""


def numbered(names: dict[str, str], experts: Experts | None = None) -> Callable[[Tensors], Tensors]:
    """One tensor an expert, projections under other names; ``experts`` gives more than a weight."""

    def make(tensors: Tensors) -> Tensors:
        dense, blocks = _grouped(tensors)
        for stem, own in blocks.items():
            for name, value in own.items():
                projection = name.rpartition(".")[0]
                for expert in range(value.shape[0]):
                    module = f"{stem.replace('switch_mlp', 'experts')}.{expert}.{names[projection]}"
                    weight = value[expert]
                    dense |= {f"{module}.weight": weight} if experts is None else experts(module, weight)
        return dense

    return make


def int4(module: str, weight: mx.array) -> Tensors:
    """compressed-tensors' pack-quantized int4 in groups of 32, symmetric, as Kimi K2 Thinking."""
    groups = weight.astype(mx.float32).reshape(weight.shape[0], -1, 32)
    scales = (mx.abs(groups).max(-1) / 7).astype(mx.bfloat16)
    codes = mx.clip(mx.round(groups / scales[..., None].astype(mx.float32)) + 8, 0, 15).astype(mx.uint32)
    words = (codes.reshape(weight.shape[0], -1, 8) << (4 * mx.arange(8, dtype=mx.uint32))).sum(-1)
    return {
        f"{module}.weight_packed": words.astype(mx.uint32).view(mx.int32),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": mx.array(weight.shape, mx.int32),
    }


def fp8(module: str, weight: mx.array) -> Tensors:
    """DeepSeek's block FP8: a scale per 128 by 128."""
    rows, columns = weight.shape
    padded = mx.pad(weight.astype(mx.float32), [(0, -rows % 128), (0, -columns % 128)])
    blocks = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
    scales = mx.maximum(mx.abs(blocks).max((1, 3)) / 448, 1e-8)
    codes = mx.to_fp8((blocks / scales[:, None, :, None]).reshape(padded.shape))[:rows, :columns]
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scales}


def _nvfp4(weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Bytes, scales of groups, and the scale that both are multiplied with."""
    largest = mx.abs(weight).max().astype(mx.float32)
    packed, scales = mx.quantize(weight, group_size=16, bits=4, mode="nvfp4", global_scale=largest)
    return packed.view(mx.uint8), scales, largest / NVFP4_LIMIT


def modelopt(module: str, weight: mx.array) -> Tensors:
    """NVIDIA ModelOpt's NVFP4."""
    packed, scales, factor = _nvfp4(weight)
    return {
        f"{module}.weight": packed,
        f"{module}.weight_scale": scales,
        f"{module}.weight_scale_2": factor,
        f"{module}.input_scale": mx.array(0.01),
    }


def compressed_nvfp4(module: str, weight: mx.array) -> Tensors:
    """compressed-tensors' nvfp4-pack-quantized."""
    packed, scales, factor = _nvfp4(weight)
    return {
        f"{module}.weight_packed": packed,
        f"{module}.weight_scale": scales,
        f"{module}.weight_global_scale": (1 / factor).reshape(1),
        f"{module}.input_global_scale": mx.array([100.0]),
    }


def with_global_scales(tensors: Tensors) -> Tensors:
    """MLX's nvfp4 with a scale per expert, stacked."""
    dense, blocks = _grouped(tensors)
    for stem, own in blocks.items():
        for name, value in own.items():
            parts = [_nvfp4(weight) for weight in value]
            dense[f"{stem}.{name}"] = mx.stack([packed.view(mx.uint32) for packed, _, _ in parts])
            module = f"{stem}.{name.removesuffix('.weight')}"
            dense[f"{module}.scales"] = mx.stack([scales for _, scales, _ in parts])
            dense[f"{module}.global_scale"] = mx.stack([factor * NVFP4_LIMIT for _, _, factor in parts])
    return dense


def _asymmetric(weight: mx.array, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (out, in), zeros and float16 scales (out, groups), in groups of `GROUP`."""
    groups = np.array(weight.astype(mx.float32)).reshape(weight.shape[0], -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = np.maximum((high - low) / (2**bits - 1), 1e-4).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 0, 2**bits - 1).astype(np.uint32)
    codes = np.clip(np.round(groups / scales[..., None]) + zeros[..., None], 0, 2**bits - 1)
    return codes.reshape(weight.shape).astype(np.uint32), zeros, scales


def _words(codes: np.ndarray, order: list[int]) -> mx.array:
    """Pack each run of codes along the last axis into one word: the n-th field, from the lowest, is code order[n]."""
    runs = codes.reshape(*codes.shape[:-1], -1, len(order))
    words = np.zeros(runs.shape[:-1], np.uint32)
    for place, index in enumerate(order):
        words |= runs[..., index] << np.uint32(32 // len(order) * place)
    return mx.array(words.view(np.int32))


def awq(module: str, weight: mx.array) -> Tensors:
    """AutoAWQ's gemm form: eight outputs a word, interleaved."""
    codes, zeros, scales = _asymmetric(weight, 4)
    return {
        f"{module}.qweight": _words(codes.T, AWQ_ORDER),
        f"{module}.qzeros": _words(zeros.T, AWQ_ORDER),
        f"{module}.scales": mx.array(scales.T.copy()),
    }


def gptq(module: str, weight: mx.array, bits: int = 4, *, version: int = 1) -> Tensors:
    """AutoGPTQ's form: inputs a word, in order; zeros along the outputs, minus one in version 1."""
    codes, zeros, scales = _asymmetric(weight, bits)
    order = list(range(32 // bits))
    stored = (zeros - (version == 1)) & np.uint32(2**bits - 1)
    return {
        f"{module}.qweight": mx.contiguous(_words(codes, order).T),
        f"{module}.qzeros": _words(stored.T, order),
        f"{module}.scales": mx.array(scales.T.copy()),
        f"{module}.g_idx": mx.array(np.arange(weight.shape[1], dtype=np.int32) // GROUP),
    }


def with_attention(names: dict[str, str], form: Experts, *, experts: bool = True) -> Callable[[Tensors], Tensors]:
    """Attention's projections in a form, and experts one by one in the same form, or as they are."""

    def make(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, value in numbered(names, form if experts else None)(tensors).items():
            module = name.removesuffix(".weight")
            made |= form(module, value) if re.search(r"self_attn\.[qkvo]_proj\.weight", name) else {name: value}
        return made

    return make


OWN = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
W123 = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
Layout = tuple[str, Callable[[Tensors], Tensors], dict[str, Any] | None]
LAYOUTS: dict[str, Layout] = {
    "gpt-oss": ("gpt_oss", gpt_oss, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}),
    "Llama 4": ("llama4", transposed, None),
    "Qwen3-VL": ("qwen3_vl_moe", transposed, None),
    "Granite": ("granitemoe", granite, None),
    "Mixtral": ("mixtral", numbered(W123), None),
    "Nemotron-H": ("nemotron_h", numbered({"fc1": "up_proj", "fc2": "down_proj"}), None),
    "Nemotron-H of MLX": ("nemotron_h", dict, None),
    "Kimi K2": ("deepseek_v3", numbered(OWN, int4), COMPRESSED),
    "DeepSeek FP8": ("deepseek_v3", numbered(OWN, fp8), FP8),
}
"""By what is published so: mlx-lm's type, the maker, and ``quantization_config``. mlx-lm opens all of these."""

NVFP4 = {"group_size": 16, "quant_algo": "NVFP4"}
FOREIGN: dict[str, Layout] = {
    "ModelOpt NVFP4": ("qwen3_moe", numbered(OWN, modelopt), {"quant_method": "modelopt", **NVFP4}),
    "compressed-tensors NVFP4": (
        "qwen3_moe",
        numbered(OWN, compressed_nvfp4),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ),
}
"""More LAYOUTS, of experts that mlx-lm can't read."""
GLOBAL_SCALES: Layout = ("qwen3_moe", with_global_scales, None)
"""mlx-lm reads these, and multiplies with them on a GPU only."""

AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "checkpoint_format": "gptq"}
PACKED_FIRST: dict[str, Layout] = {
    "AWQ": ("qwen3_moe", with_attention(OWN, awq), AWQ),
    "AWQ of Mixtral": ("mixtral", numbered(W123, awq), AWQ),
    "GPTQ": ("qwen3_moe", with_attention(OWN, gptq), GPTQ),
    "GPTQ of 8 bits": ("deepseek_v3", numbered(OWN, partial(gptq, bits=8)), {**GPTQ, "bits": 8}),
    "GPTQ 2": ("qwen3_next", with_attention(OWN, partial(gptq, version=2)), {**GPTQ, "checkpoint_format": "gptq_v2"}),
}
"""Forms that are rewritten before they are streamed. mlx-lm opens none of these with quantised experts."""


def write_layout(directory: Path, layout: Layout, *, shards: int = 1) -> Path:
    """A tiny checkpoint in a published form."""
    model_type, make, section = layout
    config = _config(model_type)
    made = make(dict(tree_flatten(make_resident(config).parameters())))
    write_tensors(directory, config if section is None else {**config, "quantization_config": section}, made)
    return directory


def write_tensors(directory: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """One shard, its 8-bit floats named as such: MLX has them as bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "model.safetensors"
    mx.save_safetensors(str(path), {name: mx.contiguous(value) for name, value in tensors.items()}, {"format": "pt"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        is_fp8 = name.endswith(".weight_scale") or f"{name}_scale_inv" in header
        if is_fp8 and entry["dtype"] == "U8":
            entry["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
