"""Passes over the rows of a prompt, for which MLX would use one thread and a temporary per operation."""

import mlx.core as mx
import numpy as np

from .arrays import Output, floats
from .elementwise import CHANNELS, add_scaled, rms_scale, sigmoid
from .jit import VECTORISED, compiled
from .kernels import TASK_ROWS
from .memory_ir import add_one
from .threads import run

_ABSENT = np.empty((0, 0), np.float32)


def _combine(y, weights, shared, gate, residual, out, progress):  # type: ignore[no-untyped-def]
    """Combine one token per task. y is (T, K, H), weights (T, K), gate (T, 1); absent arrays have size 0."""
    tokens, experts, hidden = y.shape
    counter = progress.ctypes.data
    total = np.empty(CHANNELS, np.float32)
    while True:
        t = add_one(counter)
        if t >= tokens:
            break
        for first in range(0, hidden, CHANNELS):
            count = min(CHANNELS, hidden - first)
            total[:] = np.float32(0.0)
            for k in range(experts):
                part, weight = y[t, k, first : first + count], weights[t, k]
                add_scaled(total[:count], part, weight)
            if shared.size:
                part, weight = shared[t, first : first + count], np.float32(1.0)
                if gate.size:
                    weight = sigmoid(gate[t, 0])
                add_scaled(total[:count], part, weight)
            target = out[t, first : first + count]
            if residual.size:
                part = residual[t, first : first + count]
                for i in range(count):
                    target[i] = total[i] + part[i]
            else:
                for i in range(count):
                    target[i] = total[i]
        add_one(counter + 8)
    return tokens


def _norm_gated(x, gate, weight, eps, out, progress):  # type: ignore[no-untyped-def]
    """Normalise TASK_ROWS rows per task. x, gate and out are (R, D), weight (D,)."""
    rows, dims = x.shape
    counter = progress.ctypes.data
    tasks = (rows + TASK_ROWS - 1) // TASK_ROWS
    while True:
        task = add_one(counter)
        if task >= tasks:
            break
        for row in range(task * TASK_ROWS, min((task + 1) * TASK_ROWS, rows)):
            source, z, target = x[row], gate[row], out[row]
            scale = rms_scale(source, eps)
            for i in range(dims):
                target[i] = source[i] * scale * weight[i] * (z[i] * sigmoid(z[i]))
        add_one(counter + 8)
    return tasks


_combine_kernel = compiled(_combine, fastmath=VECTORISED)
_norm_gated_kernel = compiled(_norm_gated, fastmath=VECTORISED)


def moe_combine(
    y: mx.array,
    weights: mx.array,
    shared: mx.array | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
    dtype: mx.Dtype,
) -> mx.array:
    """Compute ``ops.moe_combine`` in ``dtype``."""
    mx.eval([array for array in (y, weights, shared, shared_gate, residual) if array is not None])  # together
    out = Output(y.shape[0], y.shape[2])
    parts = (_ABSENT if array is None else floats(array) for array in (shared, shared_gate, residual))
    run(_combine_kernel, floats(y), floats(weights), *parts, out.array, alone=y.shape[0] == 1)
    return out.result(dtype)


def rms_norm_gated(x: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Compute ``ops.rms_norm_gated``."""
    mx.eval(x, gate, weight)  # together
    dims = x.shape[-1]
    out = Output(*x.shape)
    rows = (part.reshape(-1, dims) for part in (floats(x), floats(gate)))
    run(_norm_gated_kernel, *rows, floats(weight), np.float32(eps), out.array.reshape(-1, dims))
    return out.result(x.dtype)
