"""The routed experts' tensors of one layer, in each of the layouts in which they are stored, as parts of a record.

- "mlx": ``layers.N. ... .switch_mlp.{gate,up,down}_proj.{weight,scales,...,bias}``, experts stacked [E, ...];
  some of mlx-lm's models say ``experts`` or ``switch_glu`` in place of ``switch_mlp``.
- "hf-fused": ``layers.N. ... .experts.gate_up_proj`` [E, 2I, H], gate above up, and ``experts.down_proj`` [E, H, I].
- "hf-per-expert": ``layers.N. ... .experts.E.{gate,up,down}_proj.weight``, one tensor an expert.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptError, MissingTensorError, UnsupportedModelError
from .expert_layout import PROJECTIONS, Quantization, record_parts
from .quantization import QuantizationSettings, Stored, mlx_name
from .safetensors_header import TensorInfo, brief, some
from .schemes import FLOAT_DTYPES

_NUMBER = re.compile(r"(0|[1-9][0-9]{0,5})\Z")  # one spelling a number, and none that is slow to convert
_STACKED = ("switch_mlp", "switch_glu", "experts")
_AGAIN = "Download the checkpoint again."


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """What an expert tensor's name says.

    Attributes:
        format: "mlx", "hf-fused" or "hf-per-expert".
        layer: Number of the layer.
        expert: Number of the expert; None where experts are stacked.
        projection: One of `PROJECTIONS`, or "gate_up_proj".
        part: One of `record_parts`.
    """

    format: str
    layer: int
    expert: int | None
    projection: str
    part: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of all experts of a layer: a slice of one stacked tensor, or one tensor an expert (stride 0)."""

    infos: tuple[TensorInfo, ...]
    dtype: str
    shape: tuple[int, ...]
    first: int = 0
    stride: int = 0

    def locate(self, expert: int) -> tuple[Path, int]:
        info = self.infos[0] if self.stride else self.infos[expert]
        return info.path, info.offset + self.first + expert * self.stride


Found = Mapping[tuple[str, str], Mapping[int | None, TensorInfo]]
"""A layer's tensors by (projection, part), then by expert; None where experts are stacked."""

Parts = dict[tuple[str, str], Part]
"""A layer's record, by (projection, part)."""


def parse_name(name: str) -> ExpertTensor | None:
    """What a routed expert's tensor is, from its name; None for other tensors."""
    words = name.split(".")
    try:
        position = words.index("layers")
    except ValueError:
        return None
    rest = words[position + 2 :]
    if not set(_STACKED) & set(rest) or not _NUMBER.match(words[position + 1]):
        return None
    layer = int(words[position + 1])
    match rest:
        case [*_, module, projection, part] if (
            module in _STACKED and projection in PROJECTIONS and part in record_parts()
        ):
            return ExpertTensor("mlx", layer, None, projection, part)
        case [*_, "experts", ("gate_up_proj" | "down_proj") as projection]:
            return ExpertTensor("hf-fused", layer, None, projection, "weight")
        case [*_, "experts", number, projection, "weight"] if projection in PROJECTIONS and _NUMBER.match(number):
            return ExpertTensor("hf-per-expert", layer, int(number), projection, "weight")
        case [*_, "switch_mlp", "fc1" | "fc2", _]:
            raise UnsupportedModelError(
                f"[checkpoint] routed experts must have gate_proj, up_proj and down_proj, got {brief(name)}. Experts "
                "without a gate are not served: run the model in mlx-lm."
            )
    raise UnsupportedModelError(
        f"[checkpoint] routed experts must be stored as MLX's switch_mlp, as experts.gate_up_proj and "
        f"experts.down_proj or as experts.N.gate_proj.weight, got {brief(name)}. Use an unquantised checkpoint "
        "or an MLX conversion of this model."
    )


def layer_parts(format: str, where: str, found: Found, expected: int | None) -> tuple[int, Parts]:
    """Number of experts of a layer, and where each part of their records lies.

    Args:
        format: How experts are stored.
        where: Opens messages.
        found: The layer's expert tensors, at least one.
        expected: config.json's number of experts, or None.

    Raises:
        MissingTensorError: If an expert's tensor is absent.
        CorruptError: If shapes contradict each other or ``expected``.
    """
    example = _example(found)
    if format == "mlx":
        num_experts, parts = _stacked_parts(where, example, found)
    elif format == "hf-fused":
        num_experts, parts = _fused_parts(where, example, found)
    else:
        num_experts, parts = _per_expert_parts(where, example, found, expected)
    if expected is not None and expected != num_experts:
        raise CorruptError(f"[{where}] must have the {expected} experts of config.json, got {num_experts}. {_AGAIN}")
    return num_experts, parts


def _stacked_parts(where: str, example: str, found: Found) -> tuple[int, Parts]:
    stem = example.rsplit(".", 2)[0]
    tensors = {key: only[None] for key, only in found.items()}
    _require(where, (f"{stem}.{p}.weight" for p in PROJECTIONS if (p, "weight") not in tensors))
    for (_, part), info in tensors.items():
        _check_rank(info, 2 if part == "bias" else 3)
    num_experts = tensors["gate_proj", "weight"].shape[0]
    parts = {}
    for key, info in tensors.items():
        if info.shape[0] != num_experts:
            raise CorruptError(
                f"[{where}] every tensor must hold {num_experts} experts, got {brief(info.name)} "
                f"of shape {info.shape}. {_AGAIN}"
            )
        parts[key] = Part((info,), info.dtype, info.shape[1:], stride=info.nbytes // num_experts)
    return num_experts, parts


def _fused_parts(where: str, example: str, found: Found) -> tuple[int, Parts]:
    stem = example.rsplit(".", 1)[0]
    _require(where, (f"{stem}.{p}" for p in ("gate_up_proj", "down_proj") if (p, "weight") not in found))
    gate_up, down = found["gate_up_proj", "weight"][None], found["down_proj", "weight"][None]
    _check_rank(gate_up, 3)
    _check_rank(down, 3)
    num_experts, rows, hidden = gate_up.shape
    if down.shape == (num_experts, hidden // 2, rows):
        raise UnsupportedModelError(
            f"[{where}] must have gate_up_proj [E, 2I, H], got it transposed: {gate_up.shape}. Convert the checkpoint "
            "with mlx_lm.convert."
        )
    if rows % 2 or down.shape != (num_experts, hidden, rows // 2):
        raise CorruptError(
            f"[{where}] must have gate_up_proj [E, 2I, H] and down_proj [E, H, I], got {gate_up.shape} and "
            f"{down.shape}. {_AGAIN}"
        )
    stride, half = gate_up.nbytes // num_experts, (rows // 2, hidden)
    return num_experts, {
        ("gate_proj", "weight"): Part((gate_up,), gate_up.dtype, half, stride=stride),
        ("up_proj", "weight"): Part((gate_up,), gate_up.dtype, half, first=stride // 2, stride=stride),
        ("down_proj", "weight"): Part((down,), down.dtype, down.shape[1:], stride=down.nbytes // num_experts),
    }


def _per_expert_parts(where: str, example: str, found: Found, expected: int | None) -> tuple[int, Parts]:
    stem = example.rsplit(".", 3)[0]
    highest = max(number for same in found.values() for number in same if number is not None)
    # config.json's number counts only as far as there are names to list: it may be absurd.
    num_experts = max(highest + 1, min(expected or 0, highest + 1000))
    _require(
        where,
        (
            f"{stem}.{number}.{projection}.weight"
            for number in range(num_experts)
            for projection in PROJECTIONS
            if number not in found.get((projection, "weight"), {})
        ),
    )
    parts = {}
    for key, by_number in found.items():
        infos = tuple(by_number[number] for number in range(num_experts))
        for info in infos:
            _check_rank(info, 2)
            if (info.dtype, info.shape) != (infos[0].dtype, infos[0].shape):
                raise CorruptError(
                    f"[{where}] experts must be alike, got {brief(infos[0].name)} {infos[0].dtype} "
                    f"{infos[0].shape} and {brief(info.name)} {info.dtype} {info.shape}. {_AGAIN}"
                )
        parts[key] = Part(infos, infos[0].dtype, infos[0].shape)
    return num_experts, parts


def resolve(where: str, found: Found, parts: Parts, settings: QuantizationSettings) -> dict[str, Quantization | None]:
    """Quantisation of each projection; also checks that the three projections' shapes belong together."""
    rows = {projection: parts[projection, "weight"].shape[0] for projection in PROJECTIONS}
    if rows["gate_proj"] != rows["up_proj"]:
        raise CorruptError(
            f"[{where}] gate_proj and up_proj must have the same outputs, got {rows['gate_proj']} and "
            f"{rows['up_proj']}. {_AGAIN}"
        )
    example = _example(found)
    if (key := parse_name(example)) and key.format == "mlx":
        stem = example.rsplit(".", 2)[0]
    else:  # what mlx-lm turns it into, and config.json would speak of
        stem = example.rpartition(".experts.")[0] + ".switch_mlp"
    result = {}
    for projection in PROJECTIONS:
        name = f"{where} {projection}"
        module = f"{stem}.{projection}"
        tensors = {part: Stored(stored.dtype, stored.shape) for (p, part), stored in parts.items() if p == projection}
        width = rows["gate_proj"] if projection == "down_proj" else rows["down_proj"]
        result[projection] = settings.resolve(name, (mlx_name(module), module), tensors, width, exact=True)
        weight, bias = tensors["weight"], tensors.get("bias")
        if result[projection] is None and weight.shape[1] != width:
            raise CorruptError(f"[{where}] {projection} must have {width} inputs, got {weight.shape}. {_AGAIN}")
        if result[projection] is None and weight.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"[{where}] {projection} must be F16, BF16, F32 or quantised, got {weight.dtype}. "
                "Use an unquantised checkpoint, or an MLX conversion of it."
            )
        if bias is not None and (bias.shape != (rows[projection],) or bias.dtype not in FLOAT_DTYPES):
            raise CorruptError(
                f"[{where}] {projection}.bias must be a float for each of {rows[projection]} outputs, got "
                f"{bias.dtype} {bias.shape}. {_AGAIN}"
            )
    return result


def _example(found: Found) -> str:
    return next(iter(next(iter(found.values())).values())).name


def _check_rank(info: TensorInfo, rank: int) -> None:
    if len(info.shape) != rank or not info.nbytes:
        raise CorruptError(
            f"[{info.path.name}] {brief(info.name)} must have {rank} dimensions of at least 1, "
            f"got {brief(info.shape)}. {_AGAIN}"
        )


def _require(where: str, absent: Iterable[str]) -> None:
    names = list(absent)
    if names:
        raise MissingTensorError(
            f"[{where}] every expert's tensors must be there, got none named {some(names)}. {_AGAIN}"
        )
