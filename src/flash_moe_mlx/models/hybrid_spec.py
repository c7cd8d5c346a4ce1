"""Spec of a hybrid model, from a checkpoint: its modules, its weights in the right layout and dtype, and its memory."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import mlx.core as mx

from ..config import StreamingConfig
from ..errors import RequestError
from ..formats.checkpoint import Checkpoint
from ..formats.expert_layout import DTYPE_BYTES, Quantization
from ..formats.schemes import part_names
from ..ops.backend import use_cpu_kernels, use_kernels
from ..ops.dequant_matmul import dequantizes, product_scratch_bytes
from ..ops.quantized import has_kernels, reference_bytes
from .config import ModelConfig
from .decoder import HybridModel
from .layers import QuantizationOf
from .memory import HybridMemory
from .spec import ModelSpec, convert, dense_bytes, load_bytes

_SHIFTED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def prepare_hybrid(
    checkpoint: Checkpoint,
    stored: Mapping[str, mx.array],
    streaming: StreamingConfig,
    dtype: mx.Dtype,
    build: Callable[[ModelConfig, QuantizationOf], HybridModel],
    canonical_name: Callable[[str], str],
) -> ModelSpec:
    """Build the spec of a hybrid model. No weights are read.

    Args:
        checkpoint: The opened checkpoint.
        stored: The checkpoint's dense tensors by stored name, lazy.
        streaming: The arguments of load.
        dtype: Dtype of activations.
        build: Function that builds the model without weights.
        canonical_name: Function from a stored dense tensor's name to the model's name for it.

    Raises:
        CheckpointError: If config.json does not describe such a model.
        RequestError: If num_experts_per_tok exceeds the number of experts.
    """
    checkpoint.require_layers("num_hidden_layers", checkpoint.setting("num_hidden_layers") or 0)
    config, lossy = _with_experts_per_tok(ModelConfig.from_dict(checkpoint.config), streaming.num_experts_per_tok)
    names = {canonical_name(name): name for name in stored}
    if config.tie_word_embeddings:
        names = {own: name for own, name in names.items() if not own.endswith("lm_head.weight")}
    modules = {own.rpartition(".")[0]: name.rpartition(".")[0] for own, name in names.items()}

    def quantization_of(path: str) -> Quantization | None:
        return checkpoint.quantization(modules.get(path, path))

    hub_layout = _has_hub_layout(checkpoint)
    weights = {own: _from_hub(own, stored[name]) if hub_layout else stored[name] for own, name in names.items()}
    weights = convert(weights, lambda name, value: _kept_dtype(name, value.dtype, dtype))
    return ModelSpec(
        model=build(config, quantization_of),
        weights=weights,
        footprint=HybridMemory(
            dense_bytes=dense_bytes(weights),
            load_bytes=load_bytes(stored),
            config=config,
            activation_bytes=dtype.size,
            matvec_bytes=_product_bytes(weights, checkpoint),
            kept_bytes=_product_bytes(weights, checkpoint) if dequantizes() else 0,
            expert_bytes=_largest_projection(checkpoint),
            holds_scores=not use_cpu_kernels(),
        ),
        num_experts_per_tok=config.num_experts_per_tok,
        lossy=lossy,
    )


def _from_hub(name: str, value: mx.array) -> mx.array:
    if name.endswith("conv1d.weight"):
        return value.moveaxis(2, 1)
    # The hub stores these norms minus one; the sum is taken in float32, as transformers does.
    return value.astype(mx.float32) + 1.0 if name.endswith(_SHIFTED_NORMS) else value


def _kept_dtype(name: str, stored: mx.Dtype, activations: mx.Dtype) -> mx.Dtype:
    if name.endswith("A_log"):
        return mx.float32
    quantised = name.rpartition(".")[2] in part_names()[1:] or not mx.issubdtype(stored, mx.floating)
    return stored if quantised else activations


def _with_experts_per_tok(config: ModelConfig, k: int | None) -> tuple[ModelConfig, tuple[str, ...]]:
    if k is None or k == config.num_experts_per_tok:
        return config, ()
    if k > config.num_experts:
        raise RequestError(
            f"[num_experts_per_tok] must be at most {config.num_experts}, the experts of a layer, got {k}. "
            "Leave it out for the model's own."
        )
    note = f"num_experts_per_tok={k} where the model was trained with {config.num_experts_per_tok}"
    return replace(config, num_experts_per_tok=k), (note,)


def _has_hub_layout(checkpoint: Checkpoint) -> bool:
    """Return whether dense tensors have the hub's layout; like mlx_lm, this also tests the convolution's layout."""
    for name, info in checkpoint.dense.items():
        if name.endswith("conv1d.weight"):
            return info.shape[-1] != 1
    return checkpoint.format.startswith("hf")


def _product_bytes(weights: Mapping[str, mx.array], checkpoint: Checkpoint) -> int:
    """Return the largest temporary of quantised products: ``HybridMemory.matvec_bytes``."""
    if use_cpu_kernels() or use_kernels():
        layout = checkpoint.layout(checkpoint.moe_layers[0])
        # The vocabulary's matrix is only multiplied with a few rows.
        layers = (value for name, value in weights.items() if "layers." in name and value.dtype == mx.uint32)
        words = max((value.size for value in layers), default=0)
        largest = 16 * words * mx.float32.size  # a word holds up to 16 weights
        return product_scratch_bytes(largest, layout.hidden_size, layout.intermediate_size)
    scales = (value.size for name, value in weights.items() if name.endswith(".scales"))
    return 2 * mx.float32.size * max(scales, default=0)


def _largest_projection(checkpoint: Checkpoint) -> int:
    """Return the bytes of the largest expert projection, dequantised to float32, plus its source."""
    largest = 0
    for layer in checkpoint.moe_layers:
        layout = checkpoint.layout(layer)
        if not has_kernels(layout, "cpu"):
            largest = max(largest, 2 * reference_bytes(layout))
        for part in layout.parts:
            quantization = layout.quantization(part.projection)
            packed = 32 // quantization.bits if quantization and part.dtype == "U32" else 1
            largest = max(largest, 2 * prod(part.shape) * packed * DTYPE_BYTES["F32"])
    return largest
