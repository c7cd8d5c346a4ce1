"""The layout of one expert's bytes: an ordered list of named byte ranges with their quantisation.

All code that touches expert bytes (checkpoint, store, cache, kernels) describes records with these types only.
No MLX import, no file access.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType

from .schemes import SCHEMES, Scheme, part_names

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

PART_ALIGNMENT = 16
"""Alignment of parts in bytes, so that kernels may load 16 bytes at a time."""

RECORD_ALIGNMENT = 512
"""Records gathered from a stock checkpoint are padded to this; packed records carry their own padding."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element, by safetensors dtype name."""


@dataclass(frozen=True)
class Quantization:
    """Quantisation of one matrix: bits per weight, weights per group, and mode name."""

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def scheme(self) -> Scheme:
        """The mode's entry."""
        return SCHEMES[self.mode]

    @property
    def stated(self) -> "Quantization":
        """The quantisation as stated in config.json: in the mode that this one is a variant of."""
        return self if self.scheme.base is None else Quantization(self.bits, self.group_size, self.scheme.base)

    def __str__(self) -> str:
        mode = "" if self.mode == "affine" else f"{self.mode}, "
        return f"{mode}{self.bits} bits in groups of {self.group_size}"


def record_parts() -> tuple[str, ...]:
    """Return the names of a projection's possible parts, in record order."""
    return (*part_names(), "bias")


@dataclass(frozen=True)
class RecordPart:
    """One named byte range of a record.

    Attributes:
        projection: "gate_proj", "up_proj" or "down_proj".
        part: Part of the quantisation ("weight", "scales", ...), or "bias" for the expert's own bias.
        dtype: safetensors name: "U32" for packed weights, "U8" for scales of 8 bits, "BF16", "F16" or "F32".
        shape: Shape of this expert's tensor: (out, in) or (out, in * bits / 32), (out, in / G), (out,).
        offset: First byte, from the start of the record. A multiple of ``PART_ALIGNMENT``, except for views.
        strides: Elements from one index to the next, in each dimension, where the part is a view of bytes that it
            shares with others: every other row, or a matrix stored transposed. None: row-major, without gaps.
    """

    projection: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """ "gate_proj.weight" and so on."""
        return f"{self.projection}.{self.part}"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def element_strides(self) -> tuple[int, ...]:
        """``strides``, or row-major strides if None."""
        if self.strides is not None:
            return self.strides
        return tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    @property
    def rows_apart(self) -> int:
        """Stored rows from one row to the next; 0 where rows aren't contiguous."""
        if self.strides is None:
            return 1
        width = self.shape[1] if len(self.shape) == 2 else 1
        contiguous = len(self.shape) == 1 or (self.strides[1] == 1 and self.strides[0] % width == 0)
        return self.strides[0] // width if contiguous else 0

    @property
    def span_bytes(self) -> int:
        """Bytes from the start of the first element to the end of the last."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.element_strides, strict=True))
        return (last + 1) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class View:
    """Location of a part within bytes that it shares with others.

    Attributes:
        block: Identifier of the bytes; parts of a record with equal blocks share them.
        nbytes: Length of the bytes.
        first: Byte offset of the part's first element.
        strides: Strides of the elements, in the unit of `RecordPart`.
    """

    block: str
    nbytes: int
    first: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class RecordLayout:
    """The parts of one expert's record, projection by projection.

    Attributes:
        parts: Named byte ranges; disjoint, except for views of one block.
        quantizations: (projection, quantisation or None) for each projection present.
        record_bytes: Bytes from one record to the next, padding included.
    """

    parts: tuple[RecordPart, ...]
    quantizations: tuple[tuple[str, Quantization | None], ...]
    record_bytes: int

    @classmethod
    def contiguous(
        cls,
        specs: Mapping[tuple[str, str], tuple[str, tuple[int, ...]]],
        quantizations: Mapping[str, Quantization | None],
        alignment: int = RECORD_ALIGNMENT,
        views: Mapping[tuple[str, str], View] = MappingProxyType({}),
    ) -> "RecordLayout":
        """Lay out aligned parts one after another, projection by projection.

        Args:
            specs: (dtype, shape) of the parts present, by (projection, part).
            quantizations: Quantisation of each projection.
            alignment: The record's size is padded to a multiple of this.
            views: Parts that share bytes with others; shared bytes are placed where the first such part comes.
        """
        parts, offset = [], 0
        blocks: dict[str, int] = {}
        for projection in PROJECTIONS:
            for part in record_parts():
                if (projection, part) not in specs:
                    continue
                dtype, shape = specs[projection, part]
                view = views.get((projection, part))
                if view is None:
                    parts.append(RecordPart(projection, part, dtype, shape, offset))
                    nbytes = parts[-1].nbytes
                else:
                    nbytes = 0 if view.block in blocks else view.nbytes
                    begin = blocks.setdefault(view.block, offset) + view.first
                    parts.append(RecordPart(projection, part, dtype, shape, begin, view.strides))
                offset += -(-nbytes // PART_ALIGNMENT) * PART_ALIGNMENT
        return cls(tuple(parts), tuple(quantizations.items()), -(-offset // alignment) * alignment)

    @cached_property
    def by_name(self) -> Mapping[str, RecordPart]:
        """Parts by "projection.part"."""
        return MappingProxyType({part.name: part for part in self.parts})

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections present; experts without a gate have two."""
        return tuple(projection for projection, _ in self.quantizations)

    @property
    def has_gate(self) -> bool:
        """Whether there is a gate projection."""
        return "gate_proj" in self.projections

    @property
    def has_views(self) -> bool:
        """Whether parts share bytes or are not row-major."""
        return any(part.strides is not None for part in self.parts)

    def quantized_parts(self, projection: str) -> tuple[RecordPart, ...]:
        """Return a projection's weight and the other parts of its quantisation, in the scheme's order."""
        quantization = self.quantization(projection)
        names = ("weight",) if quantization is None else tuple(quantization.scheme.parts)
        return tuple(self.by_name[f"{projection}.{name}"] for name in names)

    def quantization(self, projection: str) -> Quantization | None:
        """Return the quantisation of a projection; None if it is unquantised."""
        return dict(self.quantizations)[projection]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the parts without padding, which must be read from disk for one expert."""
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def hidden_size(self) -> int:
        """H: outputs of down_proj."""
        return self.by_name["down_proj.weight"].shape[0]

    @cached_property
    def intermediate_size(self) -> int:
        """I: outputs of up_proj."""
        return self.by_name["up_proj.weight"].shape[0]
