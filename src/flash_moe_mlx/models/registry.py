"""Which definition serves a model type."""

from collections.abc import Callable, Mapping

import mlx.core as mx

from ..config import StreamingConfig
from ..formats.checkpoint import Checkpoint
from . import qwen3_5_moe, qwen3_next, switch_glu
from .spec import ModelSpec

Prepare = Callable[[Checkpoint, Mapping[str, mx.array], StreamingConfig, mx.Dtype], ModelSpec]

_FAMILIES: dict[str, Prepare] = {
    "qwen3_5_moe": qwen3_5_moe.prepare,
    "qwen3_5_moe_text": qwen3_5_moe.prepare,
    "qwen3_next": qwen3_next.prepare,
}


def build_spec(
    checkpoint: Checkpoint, stored: Mapping[str, mx.array], streaming: StreamingConfig, dtype: mx.Dtype
) -> ModelSpec:
    """The definition that serves a checkpoint's model_type: our own, or mlx-lm's with its experts streamed.

    Args:
        checkpoint: Opened.
        stored: Its dense tensors, lazy, by stored name.
        streaming: load's arguments.
        dtype: Of activations.

    Raises:
        CheckpointError: If the files don't describe such a model, or nobody knows the model type.
        RequestError: If num_experts_per_tok can't be had.
    """
    model_type = str(checkpoint.config.get("model_type"))
    has_file = checkpoint.config.get("model_file") is not None  # which goes before any definition
    prepare = switch_glu.prepare if has_file else _FAMILIES.get(model_type, switch_glu.prepare)
    return prepare(checkpoint, stored, streaming, dtype)
