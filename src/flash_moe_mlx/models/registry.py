"""Which definition serves a model type."""

from collections.abc import Callable

import mlx.core as mx

from ..checkpoint import Checkpoint
from ..config import StreamingConfig
from ..errors import UnsupportedModelError
from . import qwen3_5_moe, qwen3_next
from .family import Family

_FAMILIES: dict[str, Callable[[Checkpoint, StreamingConfig, mx.Dtype], Family]] = {
    "qwen3_5_moe": qwen3_5_moe.prepare,
    "qwen3_5_moe_text": qwen3_5_moe.prepare,
    "qwen3_next": qwen3_next.prepare,
}


def prepare_family(checkpoint: Checkpoint, streaming: StreamingConfig, dtype: mx.Dtype) -> Family:
    """The definition that serves a checkpoint's model_type.

    Raises:
        UnsupportedModelError: If there is none.
    """
    model_type = checkpoint.config.get("model_type")
    prepare = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if prepare is None:
        raise UnsupportedModelError(
            f"[config.json] model_type must be one of {', '.join(_FAMILIES)}, got {model_type!r}. "
            "If the model fits in memory, mlx-lm may serve it."
        )
    return prepare(checkpoint, streaming, dtype)
