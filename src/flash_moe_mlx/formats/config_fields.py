"""The fields of config.json that this library reads and their allowed values: one table, checked before use.

No accepted value can make anything exceed the tensors, which are compared with it, or the memory limit, which includes
it. Fields that only mlx-lm's own models read are checked when those are built (`models/switch_glu.py`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError
from .safetensors_header import brief

MAX_DIMENSION = 2**31 - 1
"""MLX's array dimensions are 32-bit."""

_RESTORE = "Restore the file."


@dataclass(frozen=True, slots=True)
class Kind:
    """A set of values allowed for a field.

    Attributes:
        words: Completion of "must be ..." in messages.
        accepts: Predicate for allowed values.
    """

    words: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of config.json. Null is equivalent to absence.

    Attributes:
        name: Key of the field.
        kind: Allowed values.
        default: Value if the field is absent.
        required: Whether the field must be present.
    """

    name: str
    kind: Kind
    default: Any = None
    required: bool = False


def integer(lowest: int = 0, highest: int = MAX_DIMENSION) -> Kind:
    """Return the kind of integers in a range, excluding true and false."""
    words = "a positive integer up to" if lowest == 1 else f"an integer from {lowest} to"
    return Kind(f"{words} {highest}", lambda value: type(value) is int and lowest <= value <= highest)


def number(lowest: float, highest: float) -> Kind:
    """Return the kind of finite numbers above ``lowest``, up to ``highest``."""

    def accepts(value: Any) -> bool:
        # Compare before converting: an integer may be too large for a float.
        return type(value) in (int, float) and lowest < value <= highest and math.isfinite(value)

    return Kind(f"a number above {lowest:g}, at most {highest:g}", accepts)


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists whose entries are all of one kind."""
    return Kind(
        f"a list, each entry {kind.words}", lambda value: isinstance(value, list) and all(map(kind.accepts, value))
    )


def either(first: Kind, second: Kind) -> Kind:
    """Return the kind of values of either kind."""
    return Kind(f"{first.words}, or {second.words}", lambda value: first.accepts(value) or second.accepts(value))


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
DIMENSION = integer(1)
COUNT = integer(0)
SCALE = number(0, 1e30)
FINITE = number(-1e30, 1e30)
TOKEN_IDS = either(COUNT, list_of(COUNT))

GENERAL_FIELDS = (
    Field("model_type", TEXT),
    Field("text_config", OBJECT),
    Field("eos_token_id", TOKEN_IDS),
    Field("num_hidden_layers", DIMENSION),
    Field("hidden_size", DIMENSION),
    Field("vocab_size", DIMENSION),
    *(Field(name, COUNT) for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    *(Field(name, COUNT) for name in ("routed_expert_hidden_size", "moe_hidden_size", "moe_latent_size")),
    Field("num_nextn_predict_layers", COUNT),
    *(Field(name, COUNT) for name in ("num_attention_heads", "kv_lora_rank")),
    Field("moe_intermediate_size", either(COUNT, list_of(COUNT))),
)
"""Fields read for every model, from ``text_config`` or the top level."""

HYBRID_FIELDS = (
    *(
        Field(name, DIMENSION, required=True)
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
            "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
        )
    ),
    Field("model_type", TEXT, ""),
    Field("head_dim", DIMENSION),
    Field("linear_conv_kernel_dim", DIMENSION, 4),
    Field("intermediate_size", DIMENSION),
    Field("full_attention_interval", DIMENSION, 4),
    Field("layer_types", list_of(TEXT), ()),
    Field("decoder_sparse_step", DIMENSION, 1),
    Field("mlp_only_layers", list_of(COUNT), ()),
    Field("hidden_act", TEXT, "silu"),
    Field("rms_norm_eps", number(0, 1), 1e-6),
    Field("tie_word_embeddings", FLAG, False),
    Field("attention_bias", FLAG, False),
    Field("norm_topk_prob", FLAG, True),
    Field("max_position_embeddings", DIMENSION, 32768),
    Field("rope_parameters", OBJECT),
    Field("rope_scaling", OBJECT),
)  # fmt: skip
"""Dimensions of Qwen3.5-MoE and Qwen3-Next."""

ROPE_FIELDS = (
    Field("rope_type", TEXT),
    Field("type", TEXT),
    Field("rope_theta", SCALE),
    Field("partial_rotary_factor", number(0, 1)),
    *(
        Field(name, SCALE)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ),
    *(
        Field(name, FINITE)
        for name in (
            "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_mscale", "long_mscale",
        )
    ),
    Field("short_factor", either(SCALE, list_of(SCALE))),
    Field("long_factor", either(SCALE, list_of(SCALE))),
    Field("mrope_section", list_of(COUNT)),
)  # fmt: skip
"""Fields of rotary embeddings, in ``rope_parameters``, ``rope_scaling`` or the text model's level."""


def read_fields(config: Mapping[str, Any], fields: Iterable[Field], where: str = "config.json") -> dict[str, Any]:
    """Return the values of fields by name, with defaults filled in.

    Raises:
        CorruptError: If a value is of the wrong kind, or a required field is absent.
    """
    return {field.name: read_field(config, field, where) for field in fields}


def read_field(config: Mapping[str, Any], field: Field, where: str = "config.json") -> Any:
    """Return the value of one field. Raises as `read_fields`."""
    value = config.get(field.name)
    if value is None and not field.required:
        return field.default
    if not field.kind.accepts(value):
        raise CorruptError(f"[{where}] {field.name} must be {field.kind.words}, got {brief(value)}. {_RESTORE}")
    return value
