"""Qwen3.5-MoE: three GatedDeltaNet layers per full-attention layer, each followed by a streamed sparse MoE.

Module and weight names are those of MLX checkpoints (``language_model.model.layers...``). Reference:
transformers' ``Qwen3_5MoeForCausalLM``; shapes and caches follow mlx_lm's ``qwen3_5_moe``.
"""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ..config import StreamingConfig
from ..formats.checkpoint import Checkpoint
from ..formats.quantization import mlx_name
from .config import ModelConfig
from .decoder import HybridModel, TextModel
from .hybrid_spec import prepare_hybrid
from .layers import Linear, QuantizationOf
from .mixers import MIXERS
from .mixers.gated_delta import GatedDeltaNet
from .spec import ModelSpec


class SplitGatedDeltaNet(GatedDeltaNet):
    """GatedDeltaNet with separate projections for qkv, z, b and a."""

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf):
        super().__init__(config, path, quantization_of)
        for name, outputs in (
            ("in_proj_qkv", config.linear_conv_dim),
            ("in_proj_z", config.linear_value_dim),
            ("in_proj_b", config.linear_num_value_heads),
            ("in_proj_a", config.linear_num_value_heads),
        ):
            setattr(self, name, Linear(config.hidden_size, outputs, quantization_of(f"{path}.{name}")))

    def projections(self) -> tuple[Linear, ...]:
        return self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a

    def split(self, *projected: mx.array) -> tuple[mx.array, ...]:
        return projected


class LanguageModel(nn.Module):
    """The text model and its output projection, under the names that MLX checkpoints use."""

    def __init__(self, config: ModelConfig, quantization_of: QuantizationOf):
        super().__init__()
        mixers = {**MIXERS, "linear_attention": SplitGatedDeltaNet}
        self.model = TextModel(config, "language_model.model", quantization_of, mixers)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, quantization_of("language_model.lm_head"))


class Model(HybridModel):
    """Qwen3.5-MoE, with its text model under ``language_model``; skips vision and multi-token-prediction tensors."""

    def __init__(self, config: ModelConfig, quantization_of: QuantizationOf):
        super().__init__(config)
        self.language_model = LanguageModel(config, quantization_of)

    @property
    def text_model(self) -> TextModel:
        return self.language_model.model

    @property
    def output_projection(self) -> Linear:
        return self.text_model.embed_tokens if self.config.tie_word_embeddings else self.language_model.lm_head


def prepare(
    checkpoint: Checkpoint, stored: Mapping[str, mx.array], streaming: StreamingConfig, dtype: mx.Dtype
) -> ModelSpec:
    """Build the spec of a Qwen3.5-MoE checkpoint: see :func:`prepare_hybrid`."""
    return prepare_hybrid(checkpoint, stored, streaming, dtype, Model, mlx_name)
