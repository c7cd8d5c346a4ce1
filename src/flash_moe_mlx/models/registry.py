"""The model definition for each model type."""

from collections.abc import Callable, Mapping

import mlx.core as mx

from ..config import StreamingConfig
from ..formats.checkpoint import Checkpoint
from . import qwen3_5_moe, qwen3_next, switch_glu
from .spec import ModelSpec

Prepare = Callable[[Checkpoint, Mapping[str, mx.array], StreamingConfig, mx.Dtype], ModelSpec]

OWN_FAMILIES: dict[str, Prepare] = {
    "qwen3_5_moe": qwen3_5_moe.prepare,
    "qwen3_5_moe_text": qwen3_5_moe.prepare,
    "qwen3_next": qwen3_next.prepare,
}
"""Definitions of our own, by model type. They also read dense tensors in the hub's form."""


def build_spec(
    checkpoint: Checkpoint, stored: Mapping[str, mx.array], streaming: StreamingConfig, dtype: mx.Dtype
) -> ModelSpec:
    """Build the spec by the definition for a checkpoint's model_type: our own, or mlx-lm's with streamed experts.

    Args:
        checkpoint: The opened checkpoint.
        stored: The checkpoint's dense tensors by stored name, lazy.
        streaming: The arguments of load.
        dtype: Dtype of activations.

    Raises:
        CheckpointError: If the files don't describe such a model, or no definition knows the model type.
        RequestError: If the model does not support num_experts_per_tok.
    """
    model_type = str(checkpoint.config.get("model_type"))
    has_file = checkpoint.config.get("model_file") is not None  # takes precedence over any definition
    prepare = switch_glu.prepare if has_file else OWN_FAMILIES.get(model_type, switch_glu.prepare)
    return prepare(checkpoint, stored, streaming, dtype)
