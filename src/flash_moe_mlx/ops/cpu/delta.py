"""The gated delta rule and its convolution: state rows stay in the first-level cache while tokens pass by."""

import math

import mlx.core as mx
import numpy as np

from ..numerics import L2_EPS
from .arrays import Output, address, empty, floats, view
from .elementwise import CHANNELS, sigmoid
from .jit import VECTORISED, compiled, serial
from .memory_ir import add_one, load_f32
from .threads import run

STATE_ROWS = 16
"""Rows of a head's state per task."""

_EPS = np.float32(L2_EPS)


@serial
def _normalise(q, k, heads, dims, ratio, a, b, a_log, dt_bias, keys, gates):  # type: ignore[no-untyped-def]
    """Compute unit queries and keys, decay, beta and q.k of each token and head.

    q and k are (address, stride of a row, stride of a token) in floats. Results are keys, shape (B, T, heads, 2, dims),
    and gates, shape (B, T, value heads, 3): decay, beta, q.k.
    """
    batch, steps = keys.shape[:2]
    for row in range(batch):
        for t in range(steps):
            for head in range(heads):
                at_q = q[0] + 4 * (row * q[1] + t * q[2] + head * dims)
                at_k = k[0] + 4 * (row * k[1] + t * k[2] + head * dims)
                qq = kk = qk = np.float32(0.0)
                for i in range(dims):
                    qi, ki = load_f32(at_q, i), load_f32(at_k, i)
                    qq += qi * qi
                    kk += ki * ki
                    qk += qi * ki
                q_scale = np.float32(1.0) / (math.sqrt(qq + _EPS) * math.sqrt(np.float32(dims)))
                k_scale = np.float32(1.0) / math.sqrt(kk + _EPS)
                for i in range(dims):
                    keys[row, t, head, 0, i] = load_f32(at_q, i) * q_scale
                    keys[row, t, head, 1, i] = load_f32(at_k, i) * k_scale
                for value_head in range(head * ratio, (head + 1) * ratio):
                    z = a[row, t, value_head] + dt_bias[value_head]
                    softplus = max(z, np.float32(0.0)) + math.log1p(math.exp(-abs(z)))
                    gates[row, t, value_head, 0] = math.exp(-math.exp(a_log[value_head]) * softplus)
                    gates[row, t, value_head, 1] = 1.0 / (1.0 + math.exp(-b[row, t, value_head]))
                    gates[row, t, value_head, 2] = qk * q_scale * k_scale


def _delta(keys, gates, v, v_row, v_step, mask, state, y, progress):  # type: ignore[no-untyped-def]
    """Advance rows of the state, in place, by all tokens.

    With S k and S q of the state before the token, ``y = g S q + delta q.k``: one pass reads a row, one writes it.
    mask has shape (B, T), or (0, 0) if every token counts.
    """
    batch, steps, k_heads, _, dims = keys.shape
    heads, rows = state.shape[1:3]
    ratio, blocks = heads // k_heads, (rows + STATE_ROWS - 1) // STATE_ROWS
    counter = progress.ctypes.data
    tasks = batch * heads * blocks
    while True:
        task = add_one(counter)
        if task >= tasks:
            break
        n, head, first = task // blocks // heads, task // blocks % heads, task % blocks * STATE_ROWS
        for row in range(first, min(first + STATE_ROWS, rows)):
            s = state[n, head, row]
            for t in range(steps):
                if mask.size and not mask[n, t]:
                    y[n, t, head, row] = np.float32(0.0)
                    continue
                q, k = keys[n, t, head // ratio, 0], keys[n, t, head // ratio, 1]
                decay, beta, qk = gates[n, t, head, 0], gates[n, t, head, 1], gates[n, t, head, 2]
                along_k = along_q = np.float32(0.0)
                for i in range(dims):
                    along_k += s[i] * k[i]
                    along_q += s[i] * q[i]
                value = load_f32(v, n * v_row + t * v_step + head * rows + row)
                delta = (value - decay * along_k) * beta
                for i in range(dims):
                    s[i] = decay * s[i] + delta * k[i]
                y[n, t, head, row] = decay * along_q + delta * qk
        add_one(counter + 8)
    return tasks


def _convolve(x, x_row, x_step, window, weight, mask, y, progress):  # type: ignore[no-untyped-def]
    """Compute a depthwise convolution with SiLU. window is (B, taps - 1, C), weight (C, taps), y (B, T, C)."""
    batch, steps, channels = y.shape
    taps = weight.shape[1]
    blocks = (channels + CHANNELS - 1) // CHANNELS
    counter = progress.ctypes.data
    tasks = batch * steps * blocks
    zeros = np.zeros(CHANNELS, np.float32)
    while True:
        task = add_one(counter)
        if task >= tasks:
            break
        n, t, first = task // blocks // steps, task // blocks % steps, task % blocks * CHANNELS
        count = min(CHANNELS, channels - first)
        out = y[n, t, first : first + count]
        out[:] = np.float32(0.0)
        for tap in range(taps):
            past = t + tap - (taps - 1)
            if past < 0:
                source = window[n, taps - 1 + past].ctypes.data + 4 * first
            elif mask.size and not mask[n, past]:
                source = zeros.ctypes.data
            else:
                source = x + 4 * (n * x_row + past * x_step + first)
            taken = weight.ctypes.data + 4 * (first * taps + tap)
            for i in range(count):
                out[i] += load_f32(taken, taps * i) * load_f32(source, i)
        for i in range(count):
            out[i] *= sigmoid(out[i])
        add_one(counter + 8)
    zeros[0] = np.float32(0.0)  # keeps it alive: the loop has only its address
    return tasks


_delta_kernel = compiled(_delta, fastmath=VECTORISED)
_convolve_kernel = compiled(_convolve, fastmath=VECTORISED)


def _strided(array: mx.array) -> np.ndarray:
    """Return an array (B, T, ...) as float32 with contiguous tokens, without copying a slice of channels."""
    if array.dtype != mx.float32:
        return floats(array)
    taken = np.asarray(array)
    inner = taken[:1, :1]
    return taken if inner.flags.c_contiguous else np.ascontiguousarray(taken)


def _place(array: np.ndarray) -> tuple[int, int, int]:
    """Return the address, and the number of floats from row to row and from token to token."""
    return address(array), array.strides[0] // 4, array.strides[1] // 4


def _mask(mask: mx.array | None) -> np.ndarray:
    return np.empty((0, 0), np.bool_) if mask is None else np.array(mask).astype(np.bool_)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute ``ops.gated_delta``. Cost: reads and writes the state once, and q and k once per row of the state."""
    batch, steps, k_heads, k_dim = q.shape
    v_heads, v_dim = v.shape[2:]
    keys, gates = empty(batch, steps, k_heads, 2, k_dim), empty(batch, steps, v_heads, 3)
    mx.eval(q, k, v, a, b)  # together: each evaluation switches to MLX's thread and back, about 0.1 ms
    queries, own_keys, values = _strided(q), _strided(k), _strided(v)
    _normalise(
        _place(queries),
        _place(own_keys),
        k_heads,
        k_dim,
        v_heads // k_heads,
        floats(a),
        floats(b),
        floats(A_log),
        floats(dt_bias),
        keys,
        gates,
    )
    shape = (batch, v_heads, v_dim, k_dim)
    if state is None:
        new_state = mx.zeros(shape, mx.float32)
        mx.eval(new_state)
    else:
        new_state = mx.array(floats(state))  # a copy: the caller's must not change
    y = Output(batch, steps, v_heads, v_dim)
    rows = view(new_state, np.float32).reshape(shape)
    run(_delta_kernel, keys, gates, *_place(values), _mask(mask), rows, y.array)
    return y.result(q.dtype), new_state


def conv1d_silu(
    x: mx.array,
    conv_state: mx.array,
    weight: mx.array,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute ``ops.conv1d_silu``."""
    batch, steps, channels = x.shape
    taps = weight.shape[1]
    inputs, window, kept = _strided(x), floats(conv_state.astype(x.dtype)), _mask(mask)
    y = Output(batch, steps, channels)
    run(_convolve_kernel, *_place(inputs), window, floats(weight).reshape(channels, taps), kept, y.array)
    new_state = np.empty((batch, taps - 1, channels), np.float32)
    ends = [steps] * batch if lengths is None else np.clip(np.array(lengths), 0, steps).tolist()
    for n, end in enumerate(ends):
        old = min(max(taps - 1 - end, 0), taps - 1)
        new_state[n, :old] = window[n, end : end + old]
        start = end - (taps - 1 - old)
        new_state[n, old:] = inputs[n, start:end]
        if mask is not None:
            new_state[n, old:][~kept[n, start:end]] = 0.0
    return y.result(x.dtype), mx.array(new_state).astype(conv_state.dtype)
