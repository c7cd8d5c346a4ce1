"""The two parallel kernels of stored matrices: rows of x one at a time (decode), and tiles (prefill).

Both take jobs: addresses of one matrix and of what it is multiplied with, so that the same code runs on MLX
arrays, on slots of a bank and on mapped files. Each is compiled once a format, when first used.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .elementwise import affine_tail, dense_tail, read_float
from .int8_ir import INT8_STEP, make_int8_dots
from .jit import compiled
from .memory_ir import add_one, load_f32, store_f32
from .tile_ir import MR, NR, PACK_BLOCK, make_multiply, make_unpack
from .vector_ir import (
    DENSE_FIELDS,
    FLOAT_BYTES,
    LANES,
    field_scales,
    lane_weights,
    make_dense_dots,
    make_quantized_dots,
)

WEIGHTS, SCALES, BIASES, BIAS, X, SUMS, Y, ROWS = range(8)
COLUMNS = 8
"""Columns of a job: addresses, and rows of x. BIAS is 0 where there is none; tiles need no SUMS, rows no ROWS."""

TASK_ROWS = 64
"""Rows of a matrix that a thread draws at once: 16 to 64 KiB of weights."""

DOT_ROWS = 2
"""Of them, rows whose products are computed side by side. They are half a task apart: processors read ahead in
streams, and those of neighbours end with the row (experiment 051)."""

TILE_K = 512
"""Weights of a row that are unpacked at once: a tile is 128 KiB and stays in the second-level cache."""


class Format(NamedTuple):
    """How a matrix is stored: ``bits`` in groups of ``group_size``, or with bits 0 unquantised.

    ``kind`` is that of scales and biases, or of the unquantised weights: BF16, F16 or F32. With ``int8``, x is rounded
    to 8 bits a group: lossy.
    """

    bits: int
    group_size: int
    kind: int
    int8: bool = False

    @property
    def name(self) -> str:
        name = f"q{self.bits}g{self.group_size}k{self.kind}" if self.bits else f"dense{self.kind}"
        return f"{name}x8" if self.int8 else name

    def rounded(self, inputs: int) -> "Format":
        """The same with x in 8 bits, where there are products of its weights with integers."""
        return self._replace(int8=self.bits == 4 and inputs % INT8_STEP == 0)

    def row_bytes(self, inputs: int) -> int:
        """Bytes of one row of the packed weights."""
        return inputs * self.bits // 8 if self.bits else inputs * FLOAT_BYTES[self.kind]

    def groups(self, inputs: int) -> int:
        """Groups of a row; 0 where it is unquantised."""
        return inputs // self.group_size if self.bits else 0


@cache
def order(format_: Format) -> tuple[int, np.ndarray]:
    """Lane weights and factors, as ``prepare`` takes them."""
    if not format_.bits:
        return 0, np.ones(1, np.float32)
    return lane_weights(format_.bits), np.array(field_scales(format_.bits), np.float32)


def affine(bits: int, group_size: int, kind: int) -> Format:
    """Format of affine-quantised matrices whose scales are stored as ``kind``."""
    return Format(bits, group_size, kind)


def dense(kind: int) -> Format:
    """Format of unquantised matrices."""
    return Format(0, 0, kind)


# Names that `compiled` binds a format's values to.
BITS = GROUP_SIZE = KIND = STEP = 0
row_dots: Any = None
one_row_dot: Any = None
product_rows: Any = None
unpack: Any = None
multiply: Any = None
multiply_one: Any = None


def _rows(weights, row_bytes, scales, biases, x, sums, y, count, inputs):  # type: ignore[no-untyped-def]
    """Products of ``count`` rows of a matrix with x, written to y."""
    groups = inputs // GROUP_SIZE if BITS else 0
    steps = inputs // STEP
    scale_bytes = groups * (4 if KIND == 2 else 2)
    apart = count // DOT_ROWS
    for row in range(apart):
        at, scale, bias = weights + row * row_bytes, scales + row * scale_bytes, biases + row * scale_bytes
        row_dots(at, row_bytes, x, scale, bias, sums, groups, steps, y + 4 * row, apart)
    for row in range(apart * DOT_ROWS, count):
        at, scale, bias = weights + row * row_bytes, scales + row * scale_bytes, biases + row * scale_bytes
        one_row_dot(at, row_bytes, x, scale, bias, sums, groups, steps, y + 4 * row, 1)
    if steps * STEP < inputs:
        for row in range(count):
            at = weights + row * row_bytes
            if BITS:
                tail = affine_tail(at, BITS, GROUP_SIZE, KIND, steps * STEP, inputs, x, scales + row * scale_bytes)
            else:
                tail = dense_tail(at, KIND, steps * STEP, inputs, x)
            store_f32(y, row, load_f32(y, row) + tail)


def _matvec(jobs, outputs, inputs, row_bytes, bias_kind, state):  # type: ignore[no-untyped-def]
    scale_bytes = inputs // GROUP_SIZE * (4 if KIND == 2 else 2) if BITS else 0
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
        if jobs[job, BIAS]:
            for row in range(count):
                store_f32(y, row, load_f32(y, row) + read_float(jobs[job, BIAS], first + row, bias_kind))
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
                at = row * groups + group
                table[group, column] = read_float(jobs[job, SCALES], at, KIND)
                table[groups + group, column] = read_float(jobs[job, BIASES], at, KIND)
            table[2 * groups, column] = np.float32(0.0)
            if jobs[job, BIAS]:
                table[2 * groups, column] = read_float(jobs[job, BIAS], row, bias_kind)
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
    tile[0] = np.float32(0.0)  # keeps it alive: the loop has its address alone
    return tasks


@cache
def product_rows_of(format_: Format) -> Callable[..., None]:
    """``f(weights, row_bytes, scales, biases, x, sums, y, count, inputs)``, all int64, for kernels to call.

    Writes the products of ``count`` consecutive rows with x, as ``prepare`` ordered it, to y.
    """
    bits, group_size, kind, int8 = format_

    def dots(rows: int) -> Callable[..., None]:
        if int8:
            return make_int8_dots(group_size, kind, rows)
        return make_quantized_dots(bits, group_size, kind, rows) if bits else make_dense_dots(kind, rows)

    bindings = {
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "KIND": kind,
        "STEP": LANES * (lane_weights(bits) if bits else DENSE_FIELDS),
        "row_dots": dots(DOT_ROWS),
        "one_row_dot": dots(1),
    }
    return compiled(_rows, format_.name, bindings)


@cache
def matvec_kernel(format_: Format) -> Callable[..., int]:
    """``kernel(jobs, outputs, inputs, row_bytes, bias_kind, state)``: a row of x a job.

    Writes (outputs,) float32 to each job's Y from x that ``prepare`` ordered. jobs has shape (P, 8), int64.
    """
    bits, group_size, kind, _ = format_
    bindings = {"BITS": bits, "GROUP_SIZE": group_size, "KIND": kind, "product_rows": product_rows_of(format_)}
    return compiled(_matvec, format_.name, bindings)


@cache
def tiles_kernel(format_: Format) -> Callable[..., int]:
    """``kernel`` as of ``matvec_kernel`` for ROWS rows of x a job, in their own order: writes (ROWS, outputs).

    A job's X and Y are addresses of the rows' addresses.
    """
    bits, group_size, kind, _ = format_
    bindings = {
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "KIND": kind,
        "unpack": make_unpack(bits, kind, group_size),
        "multiply": make_multiply(MR, gathered=True),
        "multiply_one": make_multiply(1, gathered=True),
    }
    return compiled(_tiles, format_.name, bindings)
