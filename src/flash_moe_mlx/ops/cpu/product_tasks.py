"""Products of one row with stored matrices as tasks of a ``Program``: a dense matrix, and experts' records."""

from functools import cache
from typing import Any

from .decode_tasks import floats_at, words
from .elementwise import read_float, sigmoid
from .jit import task
from .kernels import TASK_ROWS, Format, product_rows_of
from .memory_ir import load_f32, store_f32
from .vector_ir import FLOAT_BYTES

# Names to which `task` binds a format's values.
SCALE_BYTES = GROUP_SIZE = 0
X_BYTES, SUMS_BYTES = 4, 4  # per value of x, and per group of them
product_rows: Any = None


def _matrix(args, number):  # type: ignore[no-untyped-def]
    """Multiply TASK_ROWS rows of a dense matrix with x per task.

    Arguments: weights, scales, biases, bias, bias kind, x, sums, outputs, inputs, row bytes, y.
    """
    a = words(args, 11)
    first = number * TASK_ROWS
    count = min(TASK_ROWS, a[7] - first)
    skipped = first * (a[8] // GROUP_SIZE * SCALE_BYTES)
    y = a[10] + 4 * first
    product_rows(a[0] + first * a[9], a[9], a[1] + skipped, a[2] + skipped, a[5], a[6], y, count, a[8])
    if a[3]:
        for row in range(count):
            store_f32(y, row, load_f32(y, row) + read_float(a[3], first + row, a[4]))


def _gate_up(args, number):  # type: ignore[no-untyped-def]
    """Compute ``h[rank] = silu(W_gate x) * (W_up x)``, TASK_ROWS rows of one expert per task.

    Arguments: records, x, sums, offsets of gate's weight, scales and biases, offsets of up's, I, H, row bytes, h, u
    (scratch of the same shape), ranks.
    """
    a = words(args, 15)
    outputs, inputs, row_bytes = a[9], a[10], a[11]
    blocks = (outputs + TASK_ROWS - 1) // TASK_ROWS
    expert, first = number // blocks, number % blocks * TASK_ROWS
    count = min(TASK_ROWS, outputs - first)
    record, rank = words(a[0], expert + 1)[expert], words(a[14], expert + 1)[expert]
    skipped = first * (inputs // GROUP_SIZE * SCALE_BYTES)
    h, u = a[12] + 4 * (rank * outputs + first), a[13] + 4 * (rank * outputs + first)
    for offset, y in ((3, h), (6, u)):
        product_rows(
            record + a[offset] + first * row_bytes,
            row_bytes,
            record + a[offset + 1] + skipped,
            record + a[offset + 2] + skipped,
            a[1],
            a[2],
            y,
            count,
            inputs,
        )
    gate, up = floats_at(h, count), floats_at(u, count)
    for i in range(count):
        gate[i] = gate[i] * sigmoid(gate[i]) * up[i]


def _down(args, number):  # type: ignore[no-untyped-def]
    """Compute ``y[rank] = W_down x[rank]``, TASK_ROWS rows of one expert per task.

    Arguments: records, x, sums, offsets of weight, scales and biases, H, I, row bytes, y, ranks.
    """
    a = words(args, 11)
    outputs, inputs, row_bytes = a[6], a[7], a[8]
    blocks = (outputs + TASK_ROWS - 1) // TASK_ROWS
    expert, first = number // blocks, number % blocks * TASK_ROWS
    count = min(TASK_ROWS, outputs - first)
    record, rank = words(a[0], expert + 1)[expert], words(a[10], expert + 1)[expert]
    groups = inputs // GROUP_SIZE
    skipped = first * groups * SCALE_BYTES
    product_rows(
        record + a[3] + first * row_bytes,
        row_bytes,
        record + a[4] + skipped,
        record + a[5] + skipped,
        a[1] + X_BYTES * rank * inputs,
        a[2] + SUMS_BYTES * rank * groups,
        a[9] + 4 * (rank * outputs + first),
        count,
        inputs,
    )


@cache
def _task_of(function: Any, format_: Format) -> Any:
    bindings = {
        "GROUP_SIZE": format_.group_size or 1,
        "SCALE_BYTES": FLOAT_BYTES[format_.kind] if format_.bits else 0,
        "X_BYTES": 1 if format_.int8 else 4,
        "SUMS_BYTES": 8 if format_.int8 else 4,
        "product_rows": product_rows_of(format_),
    }
    return task(function, format_.name, bindings)


def matrix(format_: Format) -> Any:
    """Return the task that multiplies one dense matrix."""
    return _task_of(_matrix, format_)


def gate_up(format_: Format) -> Any:
    """Return the task of experts' gate and up projections with SwiGLU."""
    return _task_of(_gate_up, format_)


def down(format_: Format) -> Any:
    """Return the task of experts' down projections."""
    return _task_of(_down, format_)


def blocks(outputs: int) -> int:
    """Return the number of tasks of a matrix with this many rows."""
    return -(-outputs // TASK_ROWS)
