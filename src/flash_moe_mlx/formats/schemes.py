"""Quantisation modes, one entry each. Everything that stores, checks or multiplies quantised weights asks the entry.

A mode is named in config.json (``"mode": "mxfp4"``) and consists of the tensors that are stored for a matrix, its
*parts*. "weight" holds the packed codes [out, in * bits / 32]; every other part has one value per group of weights,
[out, in / G]. To add a mode, add an entry to ``SCHEMES``; one that MLX doesn't know also says how to dequantise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FLOAT_DTYPES = ("F16", "BF16", "F32")

Dequantise = Callable[[Mapping[str, Any], int, int], Any]
"""(parts as MLX arrays, bits, group size) to weights [..., out, in]: the reference of a mode that MLX doesn't have."""


@dataclass(frozen=True)
class Scheme:
    """One quantisation mode.

    Attributes:
        mode: Name, in config.json and in MLX.
        bits: Bits per weight that it allows.
        group_sizes: Weights that share a scale.
        default: Bits and group size that MLX takes where none are given.
        parts: Safetensors dtypes that each part may have, by name; "weight" comes first. Parts of float dtypes have
            one dtype in common.
        dequantise: Reference; None where MLX has the mode itself.
        kernels: Backends ("cpu", "gpu") whose kernels of ours read it; the others run the reference.
    """

    mode: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    default: tuple[int, int]
    parts: Mapping[str, tuple[str, ...]]
    dequantise: Dequantise | None = None
    kernels: frozenset[str] = field(default_factory=frozenset)

    @property
    def group_parts(self) -> tuple[str, ...]:
        """Names of the parts that have a value per group: all but the weight."""
        return tuple(self.parts)[1:]

    def accepts(self, dtypes: Mapping[str, str]) -> bool:
        """Tell whether parts of these dtypes, by name, are a matrix of this mode."""
        return dtypes.keys() == self.parts.keys() and all(dtype in self.parts[name] for name, dtype in dtypes.items())

    def allows(self, bits: Any, group_size: Any) -> bool:
        """Tell whether there is such a quantisation."""
        return bits in self.bits and group_size in self.group_sizes

    def specs(
        self, rows: int, width: int, bits: int, group_size: int, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each part of a matrix [rows, width]; ``dtype`` is that of float parts."""
        groups = (rows, width // group_size)
        specs: dict[str, tuple[str, tuple[int, ...]]] = {"weight": ("U32", (rows, width * bits // 32))}
        for name in self.group_parts:
            allowed = self.parts[name]
            specs[name] = (dtype if dtype in allowed else allowed[0], groups)
        return specs

    @property
    def sizes_in_words(self) -> str:
        """Bits and group sizes that it allows, for messages."""
        return f"{_listed(self.bits)} bits in groups of {_listed(self.group_sizes)}"


AFFINE = Scheme(
    "affine",
    bits=(2, 3, 4, 5, 6, 8),
    group_sizes=(32, 64, 128),
    default=(4, 64),
    parts={"weight": ("U32",), "scales": FLOAT_DTYPES, "biases": FLOAT_DTYPES},
    kernels=frozenset({"cpu", "gpu"}),
)
"""``w = q * scale + bias``."""

_MICROSCALED = {"weight": ("U32",), "scales": ("U8",)}

SCHEMES: dict[str, Scheme] = {
    scheme.mode: scheme
    for scheme in (
        AFFINE,
        # E2M1 weights with E8M0 scales, E4M3 with E8M0, and E2M1 with E4M3. Reference: OCP Microscaling Formats, 2023.
        Scheme("mxfp4", (4,), (32,), (4, 32), _MICROSCALED),
        Scheme("mxfp8", (8,), (32,), (8, 32), _MICROSCALED),
        Scheme("nvfp4", (4,), (16,), (4, 16), _MICROSCALED),
    )
}
"""By mode."""


def part_names() -> tuple[str, ...]:
    """Names of the parts of all modes, each once, in the order in which a record has them."""
    return tuple(dict.fromkeys(name for scheme in SCHEMES.values() for name in scheme.parts))


def matching(dtypes: Mapping[str, str]) -> list[Scheme]:
    """Modes that a matrix with parts of these dtypes, by name, may be of."""
    return [scheme for scheme in SCHEMES.values() if scheme.accepts(dtypes)]


def modes_in_words() -> str:
    """All modes, for messages."""
    return _listed(tuple(SCHEMES))


def _listed(values: tuple[object, ...]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
