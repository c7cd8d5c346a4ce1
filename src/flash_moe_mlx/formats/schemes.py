"""Quantisation modes, one entry each. Everything that stores, checks or multiplies quantised weights asks the entry.

A mode is named in config.json (``"mode": "mxfp4"``) and consists of the tensors that are stored for a matrix, its
*parts*. "weight" holds the packed codes [out, in * bits / 32]; the other parts have one value per group of weights,
[out, in / G], or one for the whole matrix. To add a mode, add an entry to ``SCHEMES``; one that MLX doesn't know also
says how to dequantise.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

FLOAT_DTYPES = ("F16", "BF16", "F32")

Dequantise = Callable[[Mapping[str, Any], int, int], Any]
"""(parts as MLX arrays, bits, group size) to weights [..., out, in]: the reference of a mode that MLX doesn't have."""


@dataclass(frozen=True)
class Scheme:
    """One quantisation mode.

    Attributes:
        mode: Name, unlike any other's.
        bits: Bits per weight that it allows.
        group_sizes: Weights that share a scale.
        default: Bits and group size that MLX takes where none are given.
        parts: Safetensors dtypes that each part may have, by name; "weight" comes first. Parts of float dtypes have
            one dtype in common.
        dequantise: Reference; None where MLX has the mode itself, or `ops.quantized` a reference under its name.
        base: Mode in MLX and in config.json whose weights and scales these are; None: it has this entry's name.
        factors: Parts that are one number for the whole matrix: what its products are multiplied with, from the number.
        excess: Subtracted from each code, in place of biases that are stored.
        block_rows: Rows that share a scale.
        coded: Whether weights are codes of E2M1, 0 to 6, in place of integers.
        scale_format: How scales of dtype U8 are to be read: "E8M0" or "E4M3".
        inferred: Whether tensors may be taken for this mode where config.json doesn't name it.
        kernels: Backends ("cpu", "gpu") whose kernels of ours read it; the others run the reference.
    """

    mode: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    default: tuple[int, int]
    parts: Mapping[str, tuple[str, ...]]
    dequantise: Dequantise | None = None
    base: str | None = None
    factors: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    excess: int = 0
    block_rows: int = 1
    coded: bool = False
    scale_format: str | None = None
    inferred: bool = True
    kernels: frozenset[str] = field(default_factory=frozenset)

    @property
    def stated_mode(self) -> str:
        """Mode that config.json names, and MLX."""
        return self.base or self.mode

    @property
    def group_parts(self) -> tuple[str, ...]:
        """Names of the parts that have a value per group."""
        return tuple(name for name in self.parts if name != "weight" and name not in self.factors)

    @property
    def word_bits(self) -> int:
        """Bits of an element of the weight as it is stored."""
        return 8 if self.parts["weight"] == ("U8",) else 32

    def width(self, words: int, bits: int) -> int:
        """Return the weights of a row of so many stored elements."""
        return words * self.word_bits // bits

    def fits(self, shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> bool:
        """Tell whether parts of these shapes, by name, are a matrix, or a stack of them, of these sizes."""
        *lead, rows, words = shapes["weight"]
        width = self.width(words, bits)
        if words < 1 or width * bits != words * self.word_bits or (self.block_rows == 1 and width % group_size):
            return False
        expected = self.specs(rows, width, bits, group_size, "")
        return all(shapes[name] == (*lead, *shape) for name, (_, shape) in expected.items())

    def accepts(self, dtypes: Mapping[str, str]) -> bool:
        """Return whether parts of these dtypes, by name, form a matrix of this mode."""
        return dtypes.keys() == self.parts.keys() and all(dtype in self.parts[name] for name, dtype in dtypes.items())

    def allows(self, bits: Any, group_size: Any) -> bool:
        """Return whether the mode has these bits and this group size."""
        return bits in self.bits and group_size in self.group_sizes

    def specs(
        self, rows: int, width: int, bits: int, group_size: int, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return (dtype, shape) of each part of a matrix [rows, width]; ``dtype`` is that of float parts."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, width * bits // self.word_bits)}
        shapes |= dict.fromkeys(self.group_parts, (-(-rows // self.block_rows), -(-width // group_size)))
        return {
            name: (dtype if dtype in allowed else allowed[0], shapes.get(name, ()))
            for name, allowed in self.parts.items()
        }

    @property
    def sizes_in_words(self) -> str:
        """Allowed bits and group sizes, for messages."""
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

_CPU = frozenset({"cpu"})
_MICROSCALED = {"weight": ("U32",), "scales": ("U8",)}


def _nvfp4_with(part: str, factor: Callable[[Any], Any]) -> Scheme:
    parts = {**_MICROSCALED, part: ("F32",)}
    return Scheme(
        f"nvfp4 with {part}", (4,), (16,), (4, 16), parts, base="nvfp4", factors={part: factor}, coded=True,
        scale_format="E4M3", kernels=_CPU,
    )  # fmt: skip


SCHEMES: dict[str, Scheme] = {
    scheme.mode: scheme
    for scheme in (
        AFFINE,
        # E2M1 weights with E8M0 scales, E4M3 with E8M0, and E2M1 with E4M3. Reference: OCP Microscaling Formats, 2023.
        Scheme("mxfp4", (4,), (32,), (4, 32), _MICROSCALED, coded=True, scale_format="E8M0", kernels=_CPU),
        Scheme("mxfp8", (8,), (32,), (8, 32), _MICROSCALED, scale_format="E8M0"),
        Scheme("nvfp4", (4,), (16,), (4, 16), _MICROSCALED, coded=True, scale_format="E4M3", kernels=_CPU),
        # nvfp4 with a scale per matrix too, as three tools store it: MLX (times 448 * 6), ModelOpt, compressed-tensors.
        _nvfp4_with("global_scale", lambda scale: scale / (448 * 6)),
        _nvfp4_with("weight_scale_2", lambda scale: scale),
        _nvfp4_with("weight_global_scale", lambda scale: 1 / scale),
        # int4 of compressed-tensors: affine without stored biases. MLX's affine tensors without biases are no int4.
        Scheme(
            "int4",
            (4,),
            (32, 64, 128),
            (4, 32),
            {"weight": ("U32",), "scales": FLOAT_DTYPES},
            excess=8,
            inferred=False,
            kernels=_CPU,
        ),
        # E4M3 weights, one scale per block of 128 by 128.
        Scheme("fp8", (8,), (128,), (8, 128), {"weight": ("U8",), "weight_scale_inv": FLOAT_DTYPES}, block_rows=128),
    )
}
"""The schemes by mode."""


def part_names() -> tuple[str, ...]:
    """Return the names of the parts of all modes, each once, in the order of records."""
    return tuple(dict.fromkeys(name for scheme in SCHEMES.values() for name in scheme.parts))


def factor_names() -> set[str]:
    """Return the names of all modes' parts that are one number per matrix."""
    return {name for scheme in SCHEMES.values() for name in scheme.factors}


def matching(dtypes: Mapping[str, str], stated: Collection[str] = ()) -> list[Scheme]:
    """Return the modes that parts of these dtypes, by name, can have; ``stated`` are those that config.json names."""
    candidates = [scheme for scheme in SCHEMES.values() if scheme.inferred or scheme.mode in stated]
    return [scheme for scheme in candidates if scheme.accepts(dtypes)]


def modes_in_words() -> str:
    """Return all modes that config.json may name, for messages."""
    return _listed(tuple(mode for mode, scheme in SCHEMES.items() if scheme.base is None))


def _listed(values: tuple[object, ...]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
