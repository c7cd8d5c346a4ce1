"""Settings of a packing, and the resulting conversion of each projection of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..formats.expert_layout import Quantization, RecordLayout, RecordPart
from ..formats.schemes import AFFINE, FLOAT_DTYPES

DENSE = ("auto", "keep", "quantize")


@dataclass(frozen=True)
class PackSettings:
    """Validated settings.

    Attributes:
        bits: Bits per expert weight; None keeps the weights unchanged.
        group_size: Number of weights that share a scale.
        down_bits: Bits for down_proj, overriding ``bits``.
        layer_bits: Bits for all three projections by layer, overriding both.
        dense: "keep" the dense tensors as they are, "quantize" them as mlx_lm.convert does, or "auto": quantise what
            is not, where ``bits`` is given.
    """

    bits: int | None = 4
    group_size: int = 64
    down_bits: int | None = None
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    dense: str = "auto"

    def __post_init__(self) -> None:
        named = {"bits": self.bits, "down_bits": self.down_bits}
        named |= {f"layer_bits of layer {layer}": bits for layer, bits in self.layer_bits.items()}
        for name, bits in named.items():
            if bits is not None and (type(bits) is not int or bits not in AFFINE.bits):
                raise RequestError(f"[{name}] must be one of {', '.join(map(str, AFFINE.bits))}, got {bits!r}. Try 4.")
        if type(self.group_size) is not int or self.group_size not in AFFINE.group_sizes:
            raise RequestError(f"[group_size] must be 32, 64 or 128, got {self.group_size!r}. Try 64.")
        if self.dense not in DENSE:
            raise RequestError(f"[dense] must be one of {', '.join(DENSE)}, got {self.dense!r}. Leave it out for auto.")
        if self.dense == "quantize" and self.bits is None:
            raise RequestError('[dense] "quantize" needs bits, got none. Give bits, or dense="keep".')

    def to_json(self) -> dict[str, Any]:
        """Return the settings as stored in the manifest and the journal."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "down_bits": self.down_bits,
            "layer_bits": {str(layer): bits for layer, bits in sorted(self.layer_bits.items())},
            "dense": self.dense,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PackSettings":
        """Parse the output of `to_json`. Raises RequestError for anything else."""
        try:
            layer_bits = {int(layer): bits for layer, bits in value["layer_bits"].items()}
            return cls(value["bits"], value["group_size"], value["down_bits"], layer_bits, value["dense"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"[conversion] must be what pack wrote, got {value!r:.200}. Pack it again.") from error

    def quantization(self, layer: int, projection: str, source: Quantization | None, width: int) -> Quantization | None:
        """Return the target quantisation of a projection: the requested one, or its present one.

        As in mlx_lm, a projection whose width is not a multiple of the group size is left unchanged.
        """
        bits = self.bits
        if projection == "down_proj" and self.down_bits is not None:
            bits = self.down_bits
        bits = self.layer_bits.get(layer, bits)
        if bits is None or width % self.group_size:
            return source
        return Quantization(bits, self.group_size)


@dataclass(frozen=True)
class Conversion:
    """Conversion of one projection's weights.

    Attributes:
        source: Present quantisation; None for floats.
        target: Target quantisation.
        dtype: dtype of intermediate floats, scales and biases, as safetensors names it.
    """

    source: Quantization | None
    target: Quantization
    dtype: str


def target_layout(
    layer: int, source: RecordLayout, settings: PackSettings, cast: str | None
) -> tuple[RecordLayout, dict[str, Conversion]]:
    """Return the packed record of a layer's experts, and the projections that need conversion.

    Args:
        layer: Number of the layer.
        source: Layout of the source's record.
        settings: Packing settings.
        cast: dtype for floats from config.json, or None.
    """
    specs = {(part.projection, part.part): (part.dtype, part.shape) for part in source.parts}
    quantizations = dict(source.quantizations)
    conversions: dict[str, Conversion] = {}
    for projection, now in source.quantizations:
        weight = source.by_name[f"{projection}.weight"]
        rows, width = weight.shape[0], unpacked_width(weight, now)
        target = settings.quantization(layer, projection, now, width)
        if target is None or target == now:
            continue
        dtype = _float_dtype(source, projection) or cast or (weight.dtype if now is None else "BF16")
        conversions[projection] = Conversion(now, target, dtype)
        quantizations[projection] = target
        specs = {key: spec for key, spec in specs.items() if key[0] != projection or key[1] == "bias"}
        made = target.scheme.specs(rows, width, target.bits, target.group_size, dtype)
        specs |= {(projection, part): spec for part, spec in made.items()}
    return RecordLayout.contiguous(specs, quantizations), conversions


def _float_dtype(source: RecordLayout, projection: str) -> str | None:
    """Return the dtype of a quantised projection's scales, if they are floats."""
    quantization = source.quantization(projection)
    if quantization is None or quantization.scheme.block_rows > 1:
        return None
    dtype = source.by_name[f"{projection}.{quantization.scheme.group_parts[-1]}"].dtype
    return dtype if dtype in FLOAT_DTYPES else None


def unpacked_width(weight: RecordPart, quantization: Quantization | None) -> int:
    """Return the number of inputs of a projection from its weight's stored shape."""
    return quantization.scheme.width(weight.shape[1], quantization.bits) if quantization else weight.shape[1]
