"""Qwen3.5-MoE: three GatedDeltaNet layers to one full attention, each followed by a streamed sparse MoE.

Module and weight names are those of MLX checkpoints (``language_model.model.layers...``). Reference:
transformers' ``Qwen3_5MoeForCausalLM``; shapes and caches follow mlx_lm's ``qwen3_5_moe``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

from ..config import ModelConfig
from ..moe import RoutedExperts, StreamingMoE
from ..streaming import StreamingEngine
from .hybrid import GatedAttention, GatedDeltaNet, mix
from .layers import Embedding, Linear, QuantizationOf, SwiGLU

_SHIFTED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


class SplitGatedDeltaNet(GatedDeltaNet):
    """GatedDeltaNet with one projection each for qkv, z, b and a."""

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf):
        super().__init__(config, path, quantization_of)
        for name, outputs in (
            ("in_proj_qkv", config.linear_conv_dim),
            ("in_proj_z", config.linear_value_dim),
            ("in_proj_b", config.linear_num_value_heads),
            ("in_proj_a", config.linear_num_value_heads),
        ):
            setattr(self, name, Linear(config.hidden_size, outputs, quantization_of(f"{path}.{name}")))

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)


class DecoderLayer(nn.Module):
    """``h = x + mixer(norm(x))``, then ``h + moe(norm(h))``."""

    mixers: Mapping[str, Callable[..., nn.Module]] = {
        "linear_attention": SplitGatedDeltaNet,
        "full_attention": GatedAttention,
    }

    def __init__(self, config: ModelConfig, index: int, path: str, quantization_of: QuantizationOf):
        super().__init__()
        self.is_linear = config.layer_types[index] == "linear_attention"
        name = "linear_attn" if self.is_linear else "self_attn"
        setattr(self, name, self.mixers[config.layer_types[index]](config, f"{path}.{name}", quantization_of))
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        mlp = f"{path}.mlp"
        self.mlp = StreamingMoE(
            gate=Linear(config.hidden_size, config.num_experts, quantization_of(f"{mlp}.gate")),
            shared_expert=SwiGLU(
                config.hidden_size, config.shared_expert_intermediate_size, f"{mlp}.shared_expert", quantization_of
            ),
            shared_expert_gate=Linear(config.hidden_size, 1, quantization_of(f"{mlp}.shared_expert_gate")),
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
        )

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        h = mix(self.linear_attn if self.is_linear else self.self_attn, self.input_layernorm, x, cache)
        return self.mlp(self.post_attention_layernorm(h), h)


class TextModel(nn.Module):
    """Embeddings, decoder layers and the last norm."""

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, quantization_of(f"{path}.embed_tokens"))
        self.layers = [
            DecoderLayer(config, i, f"{path}.layers.{i}", quantization_of) for i in range(config.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, hidden: mx.array, cache: list[Any]) -> mx.array:
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, layer_cache)
        return hidden


class LanguageModel(nn.Module):
    """The text model and its output projection, under the names that MLX checkpoints use."""

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf):
        super().__init__()
        self.model = TextModel(config, f"{path}.model", quantization_of)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, quantization_of(f"{path}.lm_head"))


class Model(nn.Module):
    """A Qwen3.5-MoE model whose routed experts are streamed by ``model.streaming``.

    Accepted by ``mlx_lm.generate``, ``mlx_lm.stream_generate`` and ``make_prompt_cache``.

    Attributes:
        streaming: The running engine; set by ``attach``.
    """

    streaming: StreamingEngine

    def __init__(self, config: ModelConfig, quantization_of: QuantizationOf, dtype: mx.Dtype):
        """Build the model without weights; ``load_weights`` fills it.

        Args:
            config: Dimensions.
            quantization_of: Quantisation of the module at a path.
            dtype: Of activations.
        """
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.dtype = dtype
        self.language_model = LanguageModel(config, "language_model", quantization_of)

    def attach(self, engine: StreamingEngine) -> None:
        """Make ``engine`` the source of every layer's routed experts."""
        self.streaming = engine
        for index, layer in enumerate(self.layers):
            layer.mlp.routed = RoutedExperts(engine, index, self.config.hidden_size)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.language_model.model.layers

    def make_cache(self) -> list[Any]:
        """Empty caches of one sequence, one a layer: mlx_lm's ArraysCache or KVCache."""
        return [ArraysCache(size=2) if layer.is_linear else KVCache() for layer in self.layers]

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Logits of the next token at each position.

        Args:
            inputs: Token ids. Shape (B, L).
            cache: One cache a layer, advanced by L; None starts from an empty context.
            input_embeddings: Used in place of the tokens' own. Shape (B, L, H).
            logits_to_keep: Only this many last positions; None keeps all L.

        Returns:
            Shape (B, L or logits_to_keep, vocabulary). The output projection is lazy: logits that
            nobody evaluates cost nothing.

        Raises:
            MemoryLimitError: If the limit can't hold a pass of this size.
            RequestError: If the context exceeds max_context.
            StoreError: If an expert can't be read.
        """
        text = self.language_model.model
        cache = self.make_cache() if cache is None else cache
        hidden = text.embed_tokens.embed(inputs, self.dtype) if input_embeddings is None else input_embeddings
        batch, tokens = hidden.shape[:2]
        length = tokens + max(c.size() for c in cache)
        with self.streaming.forward_pass(batch, tokens, length):
            hidden = text(hidden.astype(self.dtype), cache)
            # Started here, under the lock: it reads slots, which the next pass may overwrite.
            mx.async_eval(hidden)
            self.streaming.reading(hidden)
        hidden = text.norm(hidden if logits_to_keep is None else hidden[:, -logits_to_keep:])
        head = text.embed_tokens if self.config.tie_word_embeddings else self.language_model.lm_head
        return head(hidden)


def sanitize(weights: dict[str, mx.array], config: ModelConfig, hub_layout: bool) -> dict[str, mx.array]:
    """Dense tensors by canonical name, in the model's layout.

    Args:
        weights: By canonical name, lazy or not.
        config: Dimensions.
        hub_layout: As the hub stores them: norms minus one, convolutions (channels, 1, kernel).
    """
    result = {}
    for name, value in weights.items():
        if config.tie_word_embeddings and name == "language_model.lm_head.weight":
            continue
        if hub_layout and name.endswith("conv1d.weight"):
            value = value.moveaxis(2, 1)
        if hub_layout and name.endswith(_SHIFTED_NORMS):
            value = value.astype(mx.float32) + 1.0
        result[name] = value
    return result
