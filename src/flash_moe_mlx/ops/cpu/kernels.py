"""The two parallel kernels for stored matrices: rows of x one at a time (decode), and tiles (prefill).

Both take jobs: the addresses of one matrix and of its operands, so that the same code runs on MLX
arrays, on expert slots and on mapped files. Each is compiled once per format, on first use.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ...formats.expert_layout import Quantization
from .coded_ir import LANE_CODES, make_coded_dots
from .elementwise import affine_tail, dense_tail, read_float
from .int8_ir import INT8_STEP, make_int8_dots
from .jit import compiled
from .memory_ir import add_one, load_f32, store_f32
from .tile_ir import MR, NR, PACK_BLOCK, make_multiply, make_unpack
from .vector_ir import (
    BF16,
    DENSE_FIELDS,
    E4M3,
    E8M0,
    F16,
    F32,
    FLOAT_BYTES,
    LANES,
    field_scales,
    lane_weights,
    make_dense_dots,
    make_quantized_dots,
)

FLOAT_KINDS = {"BF16": BF16, "F16": F16, "F32": F32, "E8M0": E8M0, "E4M3": E4M3}
WEIGHTS, SCALES, BIASES, BIAS, X, SUMS, Y, ROWS = range(8)
FACTOR = BIASES
COLUMNS = 8
"""Number of columns of a job: addresses, and the number of rows of x. BIAS is 0 if there is none; tiles need no SUMS,
rows no ROWS. Coded matrices have a FACTOR instead of BIASES: the address of a float32 factor on the products, or 0."""

TASK_ROWS = 64
"""Rows of a matrix per task: 16 to 64 KiB of weights."""

DOT_ROWS = 2
"""Rows of a task multiplied side by side. They are half a task apart: processors prefetch along streams, and the
streams of neighbouring rows end with the row (experiment 051)."""

TILE_K = 512
"""Weights of a row unpacked at once: a tile is 128 KiB and stays in the second-level cache."""


class Format(NamedTuple):
    """Storage format of a matrix.

    Attributes:
        bits: Bits per weight; 0 if unquantised.
        group_size: Number of weights that share a scale.
        kind: Floating-point format of scales and biases, or of the unquantised weights: BF16, F16 or F32; E8M0 or E4M3
            for the scales of ``coded`` weights.
        int8: Whether x is rounded to 8 bits, with a scale per group (lossy).
        coded: Whether weights are E2M1 codes, without biases.
        excess: Number subtracted from each code instead of biases.
        rows_apart: Stored rows from one row of the matrix to the next.
    """

    bits: int
    group_size: int
    kind: int
    int8: bool = False
    coded: bool = False
    excess: int = 0
    rows_apart: int = 1

    @property
    def name(self) -> str:
        name = f"q{self.bits}g{self.group_size}k{self.kind}" if self.bits else f"dense{self.kind}"
        name += f"{'c' * self.coded}{f'm{self.excess}' if self.excess else ''}"
        name += f"a{self.rows_apart}" if self.rows_apart > 1 else ""
        return f"{name}x8" if self.int8 else name

    def rounded(self, inputs: int) -> "Format":
        """Return this format with x in 8 bits if there are integer products for its weights, else itself."""
        plain = self.bits == 4 and not self.coded and not self.excess
        return self._replace(int8=plain and inputs % INT8_STEP == 0)

    def row_bytes(self, inputs: int) -> int:
        """Return the number of bytes from one row of the packed weights to the next."""
        row = inputs * self.bits // 8 if self.bits else inputs * FLOAT_BYTES[self.kind]
        return row * self.rows_apart

    def groups(self, inputs: int) -> int:
        """Return the number of groups per row; 0 if unquantised."""
        return inputs // self.group_size if self.bits else 0


@cache
def permutation(format_: Format) -> tuple[int, np.ndarray]:
    """Return the lane weights and factors that ``permute_for_dots`` takes."""
    if not format_.bits:
        return 0, np.ones(1, np.float32)
    scales = [1.0] * LANE_CODES if format_.coded else field_scales(format_.bits)
    return lane_weights(format_.bits), np.array(scales, np.float32)


def format_of(quantization: Quantization | None, dtype: str, rows_apart: int = 1) -> Format:
    """Return the format of stored matrices.

    Args:
        quantization: Quantisation in a mode that these kernels read; None if unquantised.
        dtype: Dtype of the scales, or of the unquantised weights, as safetensors names it.
        rows_apart: Stored rows from one row of the matrix to the next.
    """
    if quantization is None:
        return dense(FLOAT_KINDS[dtype])
    scheme = quantization.scheme
    return Format(
        quantization.bits,
        quantization.group_size,
        FLOAT_KINDS[scheme.scale_format or dtype],
        coded=scheme.coded,
        excess=scheme.excess,
        rows_apart=rows_apart,
    )


def affine(bits: int, group_size: int, kind: int) -> Format:
    """Return the format of affine-quantised matrices whose scales are stored as ``kind``."""
    return Format(bits, group_size, kind)


def dense(kind: int) -> Format:
    """Return the format of unquantised matrices."""
    return Format(0, 0, kind)


# Names to which `compiled` binds a format's values.
BITS = GROUP_SIZE = KIND = STEP = SCALE_BYTES = EXCESS = 0
CODED = False
APART = 1
row_dots: Any = None
one_row_dot: Any = None
product_rows: Any = None
unpack: Any = None
multiply: Any = None
multiply_one: Any = None


def _rows(weights, row_bytes, scales, biases, x, sums, y, count, inputs):  # type: ignore[no-untyped-def]
    """Write the products of ``count`` rows of a matrix with x to y."""
    groups = inputs // GROUP_SIZE if BITS else 0
    steps = inputs // STEP
    scale_bytes = groups * SCALE_BYTES * APART
    apart = count // DOT_ROWS
    for row in range(apart):
        at, scale, bias = weights + row * row_bytes, scales + row * scale_bytes, biases + row * scale_bytes
        row_dots(at, row_bytes, x, scale, bias, sums, groups, steps, y + 4 * row, apart)
    for row in range(apart * DOT_ROWS, count):
        at, scale, bias = weights + row * row_bytes, scales + row * scale_bytes, biases + row * scale_bytes
        one_row_dot(at, row_bytes, x, scale, bias, sums, groups, steps, y + 4 * row, 1)
    if not CODED and steps * STEP < inputs:
        for row in range(count):
            at = weights + row * row_bytes
            if BITS:
                own = scales + row * scale_bytes
                tail = affine_tail(at, BITS, GROUP_SIZE, KIND, steps * STEP, inputs, x, own)
            else:
                tail = dense_tail(at, KIND, steps * STEP, inputs, x)
            store_f32(y, row, load_f32(y, row) + tail)


def _matvec(jobs, outputs, inputs, row_bytes, bias_kind, state):  # type: ignore[no-untyped-def]
    scale_bytes = inputs // GROUP_SIZE * SCALE_BYTES * APART if BITS else 0
    next_task = state.ctypes.data
    tasks = (outputs + TASK_ROWS - 1) // TASK_ROWS * len(jobs)
    while True:
        task = add_one(next_task)
        if task >= tasks:
            break
        job, first = task % len(jobs), task // len(jobs) * TASK_ROWS
        count = min(TASK_ROWS, outputs - first)
        y = jobs[job, Y] + 4 * first
        product_rows(
            jobs[job, WEIGHTS] + first * row_bytes,
            row_bytes,
            jobs[job, SCALES] + first * scale_bytes,
            jobs[job, BIASES] + first * scale_bytes,
            jobs[job, X],
            jobs[job, SUMS],
            y,
            count,
            inputs,
        )
        if CODED and jobs[job, FACTOR]:
            factor = load_f32(jobs[job, FACTOR], 0)
            for row in range(count):
                store_f32(y, row, load_f32(y, row) * factor)
        if jobs[job, BIAS]:
            for row in range(count):
                store_f32(y, row, load_f32(y, row) + read_float(jobs[job, BIAS], (first + row) * APART, bias_kind))
        add_one(next_task + 8)
    return tasks


def _tiles(jobs, outputs, inputs, row_bytes, bias_kind, state):  # type: ignore[no-untyped-def]
    groups = inputs // GROUP_SIZE if BITS else 0
    columns = (outputs + NR - 1) // NR
    next_task = state.ctypes.data
    tasks = columns * len(jobs)
    tile = np.empty(TILE_K * NR + 16, np.float32)
    tile_address = (tile.ctypes.data + 63) // 64 * 64
    table = np.empty((2 * groups + 1, NR), np.float32)
    start = table[2 * groups].ctypes.data
    while True:
        task = add_one(next_task)
        if task >= tasks:
            break
        job, first = task // columns, task % columns * NR
        count = min(NR, outputs - first)
        for column in range(NR):
            row = first + min(column, count - 1)
            for group in range(groups):
                at = row * APART * groups + group
                scale = read_float(jobs[job, SCALES], at, KIND)
                if CODED:
                    if jobs[job, FACTOR]:
                        scale *= load_f32(jobs[job, FACTOR], 0)
                elif EXCESS:
                    table[groups + group, column] = np.float32(-EXCESS) * scale
                else:
                    table[groups + group, column] = read_float(jobs[job, BIASES], at, KIND)
                table[group, column] = scale
            table[2 * groups, column] = np.float32(0.0)
            if jobs[job, BIAS]:
                table[2 * groups, column] = read_float(jobs[job, BIAS], row * APART, bias_kind)
        x, y = jobs[job, X], jobs[job, Y]
        for k in range(0, inputs, TILE_K):
            depth = min(TILE_K, inputs - k)
            for column in range(0, NR, LANES):
                row = min(column, count - 1)
                unpack(
                    jobs[job, WEIGHTS] + (first + row) * row_bytes,
                    row_bytes,
                    count - 1 - row,
                    k // PACK_BLOCK,
                    depth // PACK_BLOCK,
                    table.ctypes.data + 4 * column,
                    table.ctypes.data + 4 * (groups * NR + column),
                    tile_address + 4 * column,
                )
            rows = jobs[job, ROWS]
            begin = start if k == 0 else 0
            for row in range(0, rows - MR + 1, MR):
                multiply(x + 8 * row, 4 * k, tile_address, 4 * NR, depth, y + 8 * row, 4 * first, count, begin)
            for row in range(rows // MR * MR, rows):
                multiply_one(x + 8 * row, 4 * k, tile_address, 4 * NR, depth, y + 8 * row, 4 * first, count, begin)
        add_one(next_task + 8)
    tile[0] = np.float32(0.0)  # keeps it alive: the loop has only its address
    return tasks


def _constants(format_: Format) -> dict[str, Any]:
    return {
        "BITS": format_.bits,
        "GROUP_SIZE": format_.group_size,
        "KIND": format_.kind,
        "SCALE_BYTES": FLOAT_BYTES[format_.kind],
        "CODED": format_.coded,
        "EXCESS": format_.excess,
        "APART": format_.rows_apart,
    }


@cache
def product_rows_of(format_: Format) -> Callable[..., None]:
    """Compile ``f(weights, row_bytes, scales, biases, x, sums, y, count, inputs)``, all int64, for kernels to call.

    The function writes the products of ``count`` consecutive rows with x, permuted by ``permute_for_dots``, to y.
    """
    bits, group_size, kind, int8, coded, excess, rows_apart = format_

    def dots(rows: int) -> Callable[..., None]:
        if int8:
            return make_int8_dots(group_size, kind, rows)
        if coded:
            return make_coded_dots(group_size, kind, rows, rows_apart)
        return make_quantized_dots(bits, group_size, kind, rows, excess) if bits else make_dense_dots(kind, rows)

    bindings = {
        **_constants(format_),
        "STEP": LANES * (lane_weights(bits) if bits else DENSE_FIELDS),
        "row_dots": dots(DOT_ROWS),
        "one_row_dot": dots(1),
    }
    return compiled(_rows, format_.name, bindings, inline=True)


@cache
def matvec_kernel(format_: Format) -> Callable[..., int]:
    """Compile ``kernel(jobs, outputs, inputs, row_bytes, bias_kind, state)``, which multiplies one row of x per job.

    It writes (outputs,) float32 to each job's Y from x permuted by ``permute_for_dots``. jobs has shape (P, 8), int64.
    """
    bindings = {**_constants(format_), "product_rows": product_rows_of(format_)}
    return compiled(_matvec, format_.name, bindings)


@cache
def tiles_kernel(format_: Format) -> Callable[..., int]:
    """Compile the kernel that multiplies ROWS rows of x per job, with the arguments of ``matvec_kernel``.

    Rows are in their own order, and the result is (ROWS, outputs). A job's X and Y point to the rows' addresses.
    """
    bindings = {
        **_constants(format_),
        "unpack": make_unpack(format_.bits, format_.kind, format_.group_size, coded=format_.coded),
        "multiply": make_multiply(MR, gathered=True),
        "multiply_one": make_multiply(1, gathered=True),
    }
    return compiled(_tiles, format_.name, bindings)
