"""Dimensions of the models that this library defines itself, from config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import CorruptError, UnsupportedModelError
from ..formats.config_fields import HYBRID_FIELDS, MAX_DIMENSION, ROPE_FIELDS, read_fields
from ..formats.safetensors_header import brief, some


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a Qwen3.5-MoE or Qwen3-Next text model, named as in config.json.

    ``layer_types`` names each layer's mixer, "linear_attention" (GatedDeltaNet) or "full_attention";
    ``dense_layers`` lists the layers without experts, whose width is ``intermediate_size``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    max_position_embeddings: int = 32768
    norm_topk_prob: bool = True
    intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the text model's dimensions from a config.json, nested (``text_config``) or flat.

        Raises:
            CorruptError: If a dimension is missing or is not a positive number.
            UnsupportedModelError: If the activation or a layer type is unknown.
        """
        text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
        values = read_fields(text, HYBRID_FIELDS)
        layers, interval, step = (
            values.pop(name) for name in ("num_hidden_layers", "full_attention_interval", "decoder_sparse_step")
        )
        layer_types = values.pop("layer_types") or [
            "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)
        ]
        if len(layer_types) != layers:
            raise CorruptError(
                f"[config.json] layer_types must name {layers} layers, got {len(layer_types)}. Restore the file."
            )
        if unknown := sorted(set(layer_types) - {"full_attention", "linear_attention"}):
            raise UnsupportedModelError(
                f"[config.json] layer_types must be linear_attention or full_attention, got {some(unknown)}. "
                "If the model fits in memory, mlx-lm may serve it."
            )
        if (activation := values.pop("hidden_act")) != "silu":
            raise UnsupportedModelError(
                f"[config.json] hidden_act must be silu, got {brief(activation)}. "
                "If the model fits in memory, mlx-lm may serve it."
            )
        mlp_only = set(values.pop("mlp_only_layers"))
        dense_layers = tuple(i for i in range(layers) if i in mlp_only or (i + 1) % step)
        if dense_layers and values["intermediate_size"] is None:
            raise CorruptError(
                f"[config.json] intermediate_size must be there for the {len(dense_layers)} layers without experts, "
                "got none. Restore the file."
            )
        scaling = values.pop("rope_scaling")
        rope = dict(values.pop("rope_parameters") or scaling or {})
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in text:
                rope.setdefault(name, text[name])
        read_fields(rope, ROPE_FIELDS, "config.json rope_parameters")
        result = cls(
            num_hidden_layers=layers,
            layer_types=tuple(layer_types),
            dense_layers=dense_layers,
            rope_parameters=MappingProxyType({name: value for name, value in rope.items() if value is not None}),
            **{
                **values,
                "head_dim": values["head_dim"] or max(values["hidden_size"] // values["num_attention_heads"], 1),
                "intermediate_size": values["intermediate_size"] if dense_layers else 0,
            },
        )
        result._check()
        return result

    def _check(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise CorruptError(
                f"[config.json] num_experts_per_tok must be at most num_experts = {self.num_experts}, "
                f"got {self.num_experts_per_tok}. Restore the file."
            )
        for heads, groups in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, heads) % getattr(self, groups):
                raise CorruptError(
                    f"[config.json] {heads} must be a multiple of {groups}, got {getattr(self, heads)} and "
                    f"{getattr(self, groups)}. Restore the file."
                )
        rotary = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 0.25))
        if rotary < 2 or rotary % 2:
            raise CorruptError(
                "[config.json] partial_rotary_factor must turn an even number of each head's values, got "
                f"{rotary} of {self.head_dim}. Restore the file."
            )
        for words, width in (
            ("num_attention_heads times head_dim", 2 * self.num_attention_heads * self.head_dim),
            ("num_key_value_heads times head_dim", self.num_key_value_heads * self.head_dim),
            ("the widths of all linear heads", self.linear_conv_dim + self.linear_value_dim),
        ):
            if width > MAX_DIMENSION:
                raise CorruptError(
                    f"[config.json] {words} must fit an array's dimension, got {width}. Restore the file."
                )

    def __deepcopy__(self, memo: dict[int, object]) -> "ModelConfig":
        return self  # immutable, and rope_parameters can't be copied

    @property
    def linear_key_dim(self) -> int:
        """Total width of the GatedDeltaNet keys per token."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """Total width of the GatedDeltaNet values per token."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_conv_dim(self) -> int:
        """Number of channels of the causal convolution: queries, keys and values."""
        return 2 * self.linear_key_dim + self.linear_value_dim
