"""The feed-forward of a token's experts as operations of a program that read their records in place."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...formats.expert_layout import PROJECTIONS, Quantization, RecordLayout
from . import product_tasks as products
from .kernels import FLOAT_KINDS, Format, format_of
from .program import ExpertOperations, Operation
from .vectors import Pool, Vector


class UnsupportedLayerError(Exception):
    """A layer that programs do not support: the model then runs through MLX."""


def stored_format(quantization: Quantization | None, dtype: str) -> Format:
    """Return the format of a matrix whose scales, or weights if it is unquantised, have this safetensors dtype."""
    if quantization is not None and ("cpu" not in quantization.scheme.kernels or quantization.scheme.factors):
        raise UnsupportedLayerError(quantization.mode)
    if dtype not in FLOAT_KINDS and not (quantization and quantization.scheme.scale_format):
        raise UnsupportedLayerError(dtype)
    return format_of(quantization, dtype)


def places_of(form: Format, parts: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return weights, scales and biases of a matrix, of which those that it hasn't are 0."""
    weight, *rest = parts
    scales = rest[0] if rest else 0
    return weight, scales, scales if form.excess else rest[1] if len(rest) > 1 else 0


class RecordOperations(ExpertOperations):
    """Operations on up to K records, whose outputs are rows of one array.

    Attributes:
        held: Memory that operations read by address alone.
    """

    def __init__(
        self,
        records: np.ndarray,
        ranks: np.ndarray,
        gate_up: Operation,
        permute: Sequence[Operation],
        down: Operation,
        blocks: tuple[int, int],
        held: Sequence[np.ndarray] = (),
    ):
        """Bind operations.

        Args:
            records: Address of each record, read by the operations. Shape (K,), int64.
            ranks: Row of the outputs of each record. Shape (K,), int64.
            gate_up: First stage.
            permute: Second stage, one task per record each.
            down: Third stage.
            blocks: Tasks per record of the first and of the third stage.
            held: Memory that operations read by address alone.
        """
        super().__init__([gate_up], permute, [down])
        self.held = list(held)
        self._records, self._ranks, self._blocks = records, ranks, blocks

    def set(self, records: Sequence[int], ranks: Sequence[int]) -> None:
        """Compute these records, for these rows, in the next run."""
        count = len(records)
        self._records[:count], self._ranks[:count] = records, ranks
        self.gate_up[0].tasks = count * self._blocks[0]
        for operation in self.permute:
            operation.tasks = count
        self.down[0].tasks = count * self._blocks[1]


def routed_experts(name: str, layout: RecordLayout, x: Vector, k: int, y: np.ndarray, pool: Pool) -> RecordOperations:
    """Build operations on up to k records of one layer, whose outputs are rows of y.

    Args:
        name: Distinguishes memory of operations that a program runs at different times.
        layout: Layout of the records.
        x: The token. Shape (H,).
        k: Maximum number of records.
        y: Outputs. Shape (K, H), float32.
        pool: Memory shared between layers.

    Raises:
        UnsupportedLayerError: If the operations do not support the format of the records.
    """
    forms: dict[str, Format] = {}
    places: dict[str, tuple[Any, ...]] = {}
    if layout.has_views or layout.projections != PROJECTIONS:
        raise UnsupportedLayerError("another layout")
    for projection in PROJECTIONS:
        quantization = layout.quantization(projection)
        if f"{projection}.bias" in layout.by_name:
            raise UnsupportedLayerError(f"{projection}.bias")
        parts = layout.quantized_parts(projection)
        forms[projection] = stored_format(quantization, parts[-1].dtype)
        places[projection] = places_of(forms[projection], [part.offset for part in parts])
    return feed_forward(name, forms, places, layout.intermediate_size, x, k, y, pool)


def feed_forward(
    name: str,
    forms: dict[str, Format],
    places: dict[str, tuple[Any, ...]],
    width: int,
    x: Vector,
    k: int,
    y: np.ndarray,
    pool: Pool,
) -> RecordOperations:
    """Build the operations from the matrices' formats and the offsets of their parts from each record's address."""
    if forms["up_proj"] != forms["gate_proj"]:
        raise UnsupportedLayerError("gate_proj and up_proj differ")
    records, ranks = pool.integers(f"{name} records", k), pool.integers(f"{name} ranks", k)
    h, u = pool.vector(f"{name} h", width, k, ranks), pool.floats(f"{name} u", k, width)
    gate, down = x.format(forms["gate_proj"]), h.format(forms["down_proj"])
    row_bytes = gate.row_bytes(x.size)
    first = Operation(
        products.gate_up(gate),
        k * products.blocks(width),
        records,
        *x.input(gate),
        *places["gate_proj"],
        *places["up_proj"],
        width,
        x.size,
        row_bytes,
        h.data,
        u,
        ranks,
        nbytes=2 * k * width * row_bytes,
    )
    last = Operation(
        products.down(down),
        k * products.blocks(x.size),
        records,
        *h.input(down),
        *places["down_proj"],
        x.size,
        width,
        down.row_bytes(width),
        y,
        ranks,
        nbytes=k * x.size * down.row_bytes(width),
    )
    return RecordOperations(records, ranks, first, h.permutes, last, (products.blocks(width), products.blocks(x.size)))
