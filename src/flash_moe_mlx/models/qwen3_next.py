"""Qwen3-Next: like Qwen3.5-MoE, but with the GatedDeltaNet projections fused by key head.

Module and weight names are those of MLX checkpoints (``model.layers...``). Reference: mlx_lm's ``qwen3_next`` and
transformers' ``Qwen3NextForCausalLM``.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..config import StreamingConfig
from ..formats.checkpoint import Checkpoint
from .config import ModelConfig
from .decoder import HybridModel, TextModel
from .hybrid_spec import prepare_hybrid
from .layers import Linear, QuantizationOf
from .mixers import MIXERS
from .mixers.gated_delta import GatedDeltaNet
from .spec import ModelSpec


class FusedGatedDeltaNet(GatedDeltaNet):
    """GatedDeltaNet with two projections, each laid out key head by key head: (q, k, v, z) and (b, a)."""

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf):
        super().__init__(config, path, quantization_of)
        self.in_proj_qkvz = Linear(
            config.hidden_size,
            config.linear_conv_dim + config.linear_value_dim,
            quantization_of(f"{path}.in_proj_qkvz"),
        )
        self.in_proj_ba = Linear(
            config.hidden_size, 2 * config.linear_num_value_heads, quantization_of(f"{path}.in_proj_ba")
        )

    def projections(self) -> tuple[Linear, ...]:
        return self.in_proj_qkvz, self.in_proj_ba

    def split(self, *projected: mx.array) -> tuple[mx.array, ...]:
        qkvz, ba = projected
        config, (batch, length, _) = self.config, qkvz.shape
        heads, width = config.linear_num_key_heads, config.linear_key_head_dim
        values = config.linear_value_dim // heads
        by_head = qkvz.reshape(batch, length, heads, -1)
        q, k, v, z = mx.split(by_head, [width, 2 * width, 2 * width + values], axis=-1)
        b, a = mx.split(ba.reshape(batch, length, heads, -1), 2, axis=-1)
        qkv = mx.concatenate([part.reshape(batch, length, -1) for part in (q, k, v)], axis=-1)
        return qkv, z.reshape(batch, length, -1), b.reshape(batch, length, -1), a.reshape(batch, length, -1)


class Model(HybridModel):
    """Qwen3-Next, with its text model under ``model``; skips multi-token-prediction tensors."""

    def __init__(self, config: ModelConfig, quantization_of: QuantizationOf):
        super().__init__(config)
        mixers = {**MIXERS, "linear_attention": FusedGatedDeltaNet}
        self.model = TextModel(config, "model", quantization_of, mixers)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, quantization_of("lm_head"))

    @property
    def text_model(self) -> TextModel:
        return self.model

    @property
    def output_projection(self) -> Linear:
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head


def prepare(
    checkpoint: Checkpoint, stored: Mapping[str, mx.array], streaming: StreamingConfig, dtype: mx.Dtype
) -> ModelSpec:
    """Build the spec of a Qwen3-Next checkpoint: see :func:`prepare_hybrid`."""
    return prepare_hybrid(checkpoint, stored, streaming, dtype, Model, lambda name: name)
