"""Parts of a decode step on the CPU: operations on vectors, from a model's modules and from records of experts."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..formats.expert_layout import Quantization, RecordLayout
from ..ops.cpu import decode_tasks as tasks
from ..ops.cpu import product_tasks as products
from ..ops.cpu.arrays import KINDS, RECORD_KINDS, address, empty, floats, view
from ..ops.cpu.kernels import Format, affine, dense, order
from ..ops.cpu.tape import Operation, Tape
from ..ops.slot_memory import MLX_DTYPES
from .layers import Linear, SwiGLU
from .mixers.gated_delta import GatedDeltaNet

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}


class UnsupportedLayerError(Exception):
    """A layer that tapes don't know: the model is run the other way."""


class Vector:
    """One or more rows of float32 between operations, and the orders in which products want to read them."""

    def __init__(self, size: int, rows: int = 1, ranks: np.ndarray | None = None, *, int8: bool = False):
        """Args: values a row, rows, which of them an operation's tasks take, whether products read it in 8 bits."""
        self.size = size
        self.int8 = int8
        self.data = empty(rows, size)
        self.orders: list[Operation] = []
        self._rows, self._ranks = rows, ranks
        self._ordered: dict[tuple[int, int, bool], tuple[np.ndarray, np.ndarray]] = {}

    def format(self, form: Format) -> Format:
        """How matrices stored in this format are multiplied with this vector."""
        return form.rounded(self.size) if self.int8 else form

    def input(self, form: Format) -> tuple[Any, Any]:
        """What products with matrices of a format, as ``format`` gives it, read: x, and its sums a group."""
        if not form.bits:
            return self.data, 0
        key = (form.bits, form.group_size, form.int8)
        if key not in self._ordered:
            groups, ranks = form.groups(self.size), 0 if self._ranks is None else self._ranks
            ordered: np.ndarray
            how: tuple[Any, ...]
            operation: Operation
            if form.int8:
                ordered, sums = np.empty((self._rows, self.size), np.int8), empty(self._rows, 2, groups)
                how = (form.group_size, ordered, sums, ranks)
                operation = Operation(tasks.round_x, self._rows, self.data, self.size, *how)
            else:
                ordered, sums = empty(self._rows, self.size), empty(self._rows, groups)
                how = (form.group_size, ordered, sums, ranks)
                operation = Operation(tasks.order, self._rows, self.data, self.size, *order(form), *how)
            operation.row[3] = int(bool(self.orders))
            self.orders.append(operation)
            self._ordered[key] = ordered, sums
        return self._ordered[key]


class Pool:
    """Memory of a step by name. Layers run one after the other, so those of one shape share theirs."""

    def __init__(self, *, int8: bool):
        """Args: whether products of 4-bit weights read vectors in 8 bits."""
        self._int8 = int8
        self._made: dict[tuple[Any, ...], Any] = {}

    def floats(self, name: str, *shape: int) -> np.ndarray:
        """Uninitialised float32."""
        return self._get((name, "floats", *shape), lambda: empty(*shape))

    def integers(self, name: str, size: int) -> np.ndarray:
        """Zeros, int64."""
        return self._get((name, "integers", size), lambda: np.zeros(size, np.int64))

    def vector(self, name: str, size: int, rows: int = 1, ranks: np.ndarray | None = None) -> Vector:
        """As `Vector`."""
        return self._get((name, size, rows), lambda: Vector(size, rows, ranks, int8=self._int8))

    def _get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def together(*groups: Sequence[Operation]) -> list[Operation]:
    """Operations that may all begin at once."""
    operations = [operation for group in groups for operation in group]
    for place, operation in enumerate(operations):
        operation.row[3] = int(place > 0)
    return operations


def _format(quantization: Quantization | None, kind: int) -> Format:
    if quantization is not None and "cpu" not in quantization.scheme.kernels:
        raise UnsupportedLayerError(quantization.mode)
    return dense(kind) if quantization is None else affine(quantization.bits, quantization.group_size, kind)


def _kind(kinds: Mapping[Any, int], dtype: Any) -> int:
    """Code of the floats that a matrix is stored with: its scales, or the unquantised weights."""
    if dtype not in kinds:
        raise UnsupportedLayerError(str(dtype))
    return kinds[dtype]


def product(linear: nn.Module, x: Vector, y: Any) -> Operation:
    """``y = linear(x)``."""
    if not isinstance(linear, Linear):
        raise UnsupportedLayerError(type(linear).__name__)
    weight, form = linear.weight, x.format(_stored_format(linear, x.size))
    parts = list(linear.parts.values())
    own = (*parts, *[0] * (3 - len(parts)))
    bias, kind = (floats(linear.bias), KINDS[mx.float32]) if "bias" in linear else (0, 0)
    row_bytes = form.row_bytes(x.size)
    arguments = (*own, bias, kind, *x.input(form), weight.shape[0], x.size, row_bytes, y)
    nbytes = weight.shape[0] * row_bytes
    return Operation(products.matrix(form), products.blocks(weight.shape[0]), *arguments, nbytes=nbytes)


def _stored_format(linear: Linear, size: int) -> Format:
    """Format of a matrix that is multiplied with ``size`` values, once its arrays are found to be what it says."""
    quantization, rows = linear.quantization, linear.weight.shape[0]
    stored = list(linear.parts.values())[-1]
    kind = _kind(KINDS, stored.dtype)
    expected: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {"weight": (stored.dtype, (rows, size))}
    if quantization is not None:
        sizes = quantization.bits, quantization.group_size
        specs = quantization.scheme.specs(rows, size, *sizes, _NAMES[stored.dtype])
        expected = {name: (MLX_DTYPES[dtype], shape) for name, (dtype, shape) in specs.items()}
    for name, part in linear.parts.items():
        if (part.dtype, part.shape) != expected[name]:
            raise UnsupportedLayerError(f"{name} of shape {part.shape} and {part.dtype}")
    return _format(quantization, kind)


def projections_of(mixer: GatedDeltaNet, x: Vector, parts: Sequence[np.ndarray], pool: Pool) -> list[Operation]:
    """The mixer's projections, split into qkv, z, b and a."""
    linears = mixer.projections()
    outputs = [pool.floats(f"projected {i}", linear.weight.shape[0]) for i, linear in enumerate(linears)]
    # Where each value lies, by splitting positions in place of values.
    starts = np.cumsum([0, *(output.size for output in outputs)])
    positions = [mx.arange(start, end)[None, None] for start, end in itertools.pairwise(starts.tolist())]
    gathers = []
    for place, part in zip(mixer.split(*positions), parts, strict=True):
        index = np.array(place, np.int64).reshape(-1)
        source = int(np.searchsorted(starts, index[0], "right")) - 1
        if index.size == outputs[source].size and (np.diff(index) == 1).all():
            outputs[source] = part
        else:
            gathers.append(Operation(tasks.gather, 1, outputs[source], index - starts[source], part.size, part))
    products_ = [product(linear, x, output) for linear, output in zip(linears, outputs, strict=True)]
    return [*together(products_), *together(gathers)]


def normed(norm: nn.RMSNorm, x: np.ndarray, added: Any, y: Vector) -> Operation:
    """``x += added`` unless that is 0, then ``y = norm(x)``."""
    return Operation(tasks.norm, 1, x, added, vector_of(norm.weight, x.size), x.size, float(norm.eps), y.data)


def vector_of(weight: mx.array, size: int) -> np.ndarray:
    """A weight of ``size`` numbers as contiguous float32, whatever it is stored as."""
    if weight.size != size:
        raise UnsupportedLayerError(f"a weight of shape {weight.shape} in place of {size} values")
    return floats(weight)


@dataclass
class ExpertTape:
    """Operations of the feed-forward of up to K records.

    Attributes:
        records: Address of each record. Shape (K,), int64.
        ranks: Which of the token's K experts each is. Shape (K,), int64.
        gate_up, order, down: Operations, whose tasks follow the number of records.
        blocks: Tasks of the first and of the last for each record.
        held: Memory that operations read by address alone.
    """

    records: np.ndarray
    ranks: np.ndarray
    gate_up: Operation
    order: list[Operation]
    down: Operation
    blocks: tuple[int, int]
    held: list[np.ndarray] = field(default_factory=list)

    def set(self, tape: Tape, records: Sequence[int], ranks: Sequence[int]) -> None:
        """Make a tape compute these records, for these ranks."""
        count = len(records)
        self.records[:count], self.ranks[:count] = records, ranks
        tape.set_tasks(self.gate_up, count * self.blocks[0])
        for operation in self.order:
            tape.set_tasks(operation, count)
        tape.set_tasks(self.down, count * self.blocks[1])


def routed_experts(name: str, layout: RecordLayout, x: Vector, k: int, y: np.ndarray, pool: Pool) -> ExpertTape:
    """Up to k records of one layer, whose outputs are rows of y."""
    forms, places = {}, {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        quantization = layout.quantization(projection)
        if f"{projection}.bias" in layout.by_name:
            raise UnsupportedLayerError(f"{projection}.bias")
        parts = layout.quantized_parts(projection)
        forms[projection] = _format(quantization, _kind(RECORD_KINDS, parts[-1].dtype))
        places[projection] = (*(part.offset for part in parts), *[0] * (3 - len(parts)))
    return _ffn(name, forms, places, layout.intermediate_size, x, k, y, pool)


def shared_expert(shared: SwiGLU, x: Vector, y: np.ndarray, pool: Pool) -> ExpertTape:
    """The shared expert, as a record that begins at address 0."""
    forms, places = {}, {}
    held: list[np.ndarray] = []
    width = shared.gate_proj.weight.shape[0]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(shared, projection)
        if not isinstance(linear, Linear) or "bias" in linear:
            raise UnsupportedLayerError(projection)
        forms[projection] = _stored_format(linear, width if projection == "down_proj" else x.size)
        views = [view(part, np.uint8) for part in linear.parts.values()]
        held += views
        places[projection] = (*map(address, views), *[0] * (3 - len(views)))
    tape = _ffn("shared", forms, places, width, x, 1, y, pool)
    tape.held = held
    return tape


def _ffn(
    name: str,
    forms: dict[str, Format],
    places: dict[str, tuple[int, ...]],
    width: int,
    x: Vector,
    k: int,
    y: np.ndarray,
    pool: Pool,
) -> ExpertTape:
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
    return ExpertTape(records, ranks, first, h.orders, last, (products.blocks(width), products.blocks(x.size)))
