"""Parses the names of routed experts' tensors into (projection, part), for each supported layout.

- "mlx": ``layers.N. ... .switch_mlp.{gate,up,down}_proj.{weight,scales,...,bias}``, experts stacked [E, ...]; some of
  mlx-lm's models say ``experts`` or ``switch_glu`` for ``switch_mlp``. Experts without a gate are ``fc1``, ``fc2``.
- "hf-fused": ``layers.N. ... .experts.gate_up_proj`` and ``experts.down_proj``, stacked; gpt-oss has ``_blocks``,
  ``_scales`` and ``_bias`` behind them. Granite says ``block_sparse_moe.input_linear`` and ``output_linear``.
- "hf-per-expert": ``layers.N. ... .experts.E.{gate,up,down}_proj.weight``, or ``w1``, ``w3`` and ``w2``, one tensor an
  expert; other tools' quantisations have more tensors besides the weight.

To add a layout, add an entry to the tables below.
"""

import re
from dataclasses import dataclass

from ..errors import UnsupportedModelError
from .expert_layout import PROJECTIONS, record_parts
from .repacking import REPACKED_PARTS
from .safetensors_header import brief

UNREAD = ""
"""Part of a tensor that belongs to an expert and isn't needed: scales of activations, a shape written down."""

_NUMBER = re.compile(r"(0|[1-9][0-9]{0,5})\Z")  # one spelling a number, and none that is slow to convert
STACKED = ("switch_mlp", "switch_glu", "experts")
_OWN = {projection: projection for projection in PROJECTIONS}
_WITHOUT_GATE = {"fc1": "up_proj", "fc2": "down_proj"}
_NUMBERED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_FUSED = {
    f"{projection}{suffix}": (projection, part)
    for projection in ("gate_up_proj", "down_proj")
    for suffix, part in {"": "weight", "_blocks": "weight", "_scales": "scales", "_bias": "bias"}.items()
}
_GRANITE = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
_OTHER_TOOLS = {
    **{part: part for part in REPACKED_PARTS},
    "weight_packed": "weight",
    "weight_scale": "scales",
    "weight_shape": UNREAD,
    "input_scale": UNREAD,
    "input_global_scale": UNREAD,
}


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """The parsed name of an expert tensor.

    Attributes:
        format: "mlx", "hf-fused" or "hf-per-expert".
        layer: Number of the layer.
        expert: Number of the expert; None if experts are stacked.
        projection: One of `PROJECTIONS`, or "gate_up_proj".
        part: One of `record_parts` or of `REPACKED_PARTS`, or `UNREAD`.
    """

    format: str
    layer: int
    expert: int | None
    projection: str
    part: str


def name_in(projection: str, example: str) -> str:
    """Return the name of a projection in the layout that has a tensor named ``example``."""
    words = set(example.split("."))
    for aliases in (_WITHOUT_GATE, _NUMBERED):
        if words & aliases.keys():
            return next((alias for alias, own in aliases.items() if own == projection), projection)
    return projection


def parse_name(name: str) -> ExpertTensor | None:
    """Parse a routed expert's tensor name; return None for other tensors."""
    words = name.split(".")
    try:
        position = words.index("layers")
    except ValueError:
        return None
    rest = words[position + 2 :]
    granite = len(rest) > 2 and rest[-3] == "block_sparse_moe" and rest[-2] in _GRANITE
    if not (granite or set(STACKED) & set(rest)) or not _NUMBER.match(words[position + 1]):
        return None
    layer = int(words[position + 1])
    stacked = _OWN | _WITHOUT_GATE
    numbered = _OWN | _NUMBERED
    match rest:
        case [*_, module, projection, part] if module in STACKED and projection in stacked and part in record_parts():
            return ExpertTensor("mlx", layer, None, stacked[projection], part)
        case [*_, "experts", word] if word in _FUSED:
            return ExpertTensor("hf-fused", layer, None, *_FUSED[word])
        case [*_, "block_sparse_moe", word, "weight"] if word in _GRANITE:
            return ExpertTensor("hf-fused", layer, None, _GRANITE[word], "weight")
        case [*_, "experts", number, projection, part] if projection in numbered and _NUMBER.match(number):
            if part in record_parts() or part in _OTHER_TOOLS:
                part = _OTHER_TOOLS.get(part, part)
                return ExpertTensor("hf-per-expert", layer, int(number), numbered[projection], part)
    raise UnsupportedModelError(
        f"[checkpoint] routed experts must be stored as MLX's switch_mlp, as experts.gate_up_proj and "
        f"experts.down_proj or as experts.N.gate_proj.weight, got {brief(name)}. Use an unquantised checkpoint "
        "or an MLX conversion of this model."
    )
