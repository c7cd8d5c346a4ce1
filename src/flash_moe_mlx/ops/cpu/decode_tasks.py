"""Tasks of a ``Program`` for one token in a layer: norms, convolution, delta rule, attention, router.

All numbers are float32. Every function takes the address of its arguments, one int64 each in the order that its
docstring lists, and the number of the task. Tasks of one operation write to different places.
"""

import math

import numba
import numpy as np

from ..numerics import L2_EPS
from .elementwise import CHANNELS, add_scaled, exponential, permute_for_dots, rms_scale, sigmoid
from .int8_ir import round_to_int8
from .jit import VECTORISED, serial, task
from .memory_ir import load_f32, pointer

SPLIT = 256
"""Keys per attention task. A constant, because bits must not depend on the number of threads."""

_EPS = np.float32(L2_EPS)
_LOWEST = np.float32(-3.4e38)


@serial
def words(address, count):  # type: ignore[no-untyped-def]
    """Return ``count`` int64 at an address as an array."""
    return numba.carray(pointer(address), (count,), np.int64)


@serial
def floats_at(address, count):  # type: ignore[no-untyped-def]
    """Return ``count`` float32 at an address as an array."""
    return numba.carray(pointer(address), (count,), np.float32)


def _norm(args, _):  # type: ignore[no-untyped-def]
    """Compute ``x += added``, unless that is 0, and ``y = rms_norm(x) * weight``.

    Arguments: x, added, weight, size, eps, y.
    """
    a = words(args, 6)
    x, weight, y = floats_at(a[0], a[3]), floats_at(a[2], a[3]), floats_at(a[5], a[3])
    if a[1]:
        added = floats_at(a[1], a[3])
        for i in range(len(x)):
            x[i] += added[i]
    scale = rms_scale(x, load_f32(args, 8))
    for i in range(len(x)):
        y[i] = x[i] * scale * weight[i]


def _permute(args, number):  # type: ignore[no-untyped-def]
    """Run ``permute_for_dots`` on one row per task, row ranks[number].

    Arguments: x, size, lane weights, factors, group size, ordered, sums, ranks.
    """
    a = words(args, 8)
    row = words(a[7], number + 1)[number] if a[7] else 0
    size, groups = a[1], a[1] // a[4]
    x = numba.carray(pointer(a[0] + 4 * row * size), (1, size), np.float32)
    ordered = numba.carray(pointer(a[5] + 4 * row * size), (1, size), np.float32)
    sums = numba.carray(pointer(a[6] + 4 * row * groups), (1, groups), np.float32)
    permute_for_dots(x, a[2], floats_at(a[3], max(a[2], 1)), a[4], ordered, sums)


def _round(args, number):  # type: ignore[no-untyped-def]
    """Run ``round_to_int8`` on one row per task, row ranks[number].

    Arguments: x, size, group size, rounded, sums, ranks.
    """
    a = words(args, 6)
    size, groups = a[1], a[1] // a[2]
    row = words(a[5], number + 1)[number] if a[5] else 0
    rounded = numba.carray(pointer(a[3] + row * size), (size,), np.int8)
    sums = numba.carray(pointer(a[4] + 8 * row * groups), (2, groups), np.float32)
    round_to_int8(floats_at(a[0] + 4 * row * size, size), a[2], rounded, sums)


def _gather(args, _):  # type: ignore[no-untyped-def]
    """Compute ``y[i] = x[index[i]]``. Arguments: x, index, size, y."""
    a = words(args, 4)
    index, y = words(a[1], a[2]), floats_at(a[3], a[2])
    for i in range(len(y)):
        y[i] = load_f32(a[0], index[i])


def _convolve(args, number):  # type: ignore[no-untyped-def]
    """Compute SiLU of a causal convolution, CHANNELS per task, and shift the window by one token.

    Arguments: x, window, weight, channels, taps, y.
    """
    a = words(args, 6)
    channels, taps, first = a[3], a[4], number * CHANNELS
    count = min(CHANNELS, channels - first)
    x, y = floats_at(a[0] + 4 * first, count), floats_at(a[5] + 4 * first, count)
    weight = floats_at(a[2] + 4 * first * taps, count * taps)
    for i in range(count):
        y[i] = x[i] * weight[i * taps + taps - 1]
    for tap in range(taps - 1):
        past = floats_at(a[1] + 4 * (tap * channels + first), count)
        for i in range(count):
            y[i] += past[i] * weight[i * taps + tap]
        if tap:
            before = floats_at(a[1] + 4 * ((tap - 1) * channels + first), count)
            before[:] = past
    if taps > 1:
        floats_at(a[1] + 4 * ((taps - 2) * channels + first), count)[:] = x
    for i in range(count):
        y[i] *= sigmoid(y[i])


def _delta(args, head):  # type: ignore[no-untyped-def]
    """Compute one step of the gated delta rule in place, then ``rms_norm(y) * silu(z)``; one value head per task.

    Arguments: qkv, a, b, A_log, dt_bias, state, z, norm weight, k heads, v heads, k dim, v dim, eps, y.
    """
    a = words(args, 14)
    k_heads, v_heads, k_dim, v_dim = a[8], a[9], a[10], a[11]
    key = head // (v_heads // k_heads)
    q, k = floats_at(a[0] + 4 * key * k_dim, k_dim), floats_at(a[0] + 4 * (k_heads + key) * k_dim, k_dim)
    v = floats_at(a[0] + 4 * (2 * k_heads * k_dim + head * v_dim), v_dim)
    z, weight = floats_at(a[6] + 4 * head * v_dim, v_dim), floats_at(a[7], v_dim)
    y = floats_at(a[13] + 4 * head * v_dim, v_dim)
    qq = kk = qk = np.float32(0.0)
    for i in range(k_dim):
        qq += q[i] * q[i]
        kk += k[i] * k[i]
        qk += q[i] * k[i]
    q_scale = np.float32(1.0) / (math.sqrt(qq + _EPS) * math.sqrt(np.float32(k_dim)))
    k_scale = np.float32(1.0) / math.sqrt(kk + _EPS)
    unit = np.empty((2, k_dim), np.float32)
    for i in range(k_dim):
        unit[0, i], unit[1, i] = q[i] * q_scale, k[i] * k_scale
    qk *= q_scale * k_scale
    step = load_f32(a[1], head) + load_f32(a[4], head)
    positive = step if step > np.float32(0.0) else np.float32(0.0)
    softplus = positive + math.log1p(math.exp(-abs(step)))
    decay = np.float32(math.exp(-math.exp(load_f32(a[3], head)) * softplus))
    beta = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-load_f32(a[2], head))))
    for row in range(v_dim):
        s = floats_at(a[5] + 4 * (head * v_dim + row) * k_dim, k_dim)
        along_k = along_q = np.float32(0.0)
        for i in range(k_dim):
            along_q += s[i] * unit[0, i]
            along_k += s[i] * unit[1, i]
        change = (v[row] - decay * along_k) * beta
        for i in range(k_dim):
            s[i] = decay * s[i] + change * unit[1, i]
        y[row] = decay * along_q + change * qk
    scale = rms_scale(y, load_f32(args, 24))
    for i in range(v_dim):
        y[i] = y[i] * scale * weight[i] * (z[i] * sigmoid(z[i]))


@serial
def _rotate(x, scale, weight, cos, sin, half, y):  # type: ignore[no-untyped-def]
    """Compute ``y = x * scale * weight`` and rotate its first 2 * half values in pairs (i, i + half)."""
    for i in range(len(x)):
        y[i] = x[i] * scale * weight[i]
    for i in range(half):
        low, high = y[i], y[i + half]
        y[i] = low * cos[i] - high * sin[i]
        y[i + half] = high * cos[i] + low * sin[i]


def _place_heads(args, head):  # type: ignore[no-untyped-def]
    """Normalise and rotate queries and keys, and write keys and values to the cache; one head per task, q's first.

    Keys and values go to row ``at`` of the cache, whose heads are ``stride`` floats apart.

    Arguments: q and gate, k, v, q weight, k weight, cos, sin, heads, kv heads, dim, half, eps, q, keys, values, stride,
    at.
    """
    a = words(args, 17)
    heads, dim, half, eps = a[7], a[9], a[10], load_f32(args, 22)
    cos, sin = floats_at(a[5], half), floats_at(a[6], half)
    if head < heads:
        x, y = floats_at(a[0] + 8 * head * dim, dim), floats_at(a[12] + 4 * head * dim, dim)
        _rotate(x, rms_scale(x, eps), floats_at(a[3], dim), cos, sin, half, y)
    else:
        head -= heads
        to = 4 * (head * a[15] + a[16] * dim)
        x = floats_at(a[1] + 4 * head * dim, dim)
        _rotate(x, rms_scale(x, eps), floats_at(a[4], dim), cos, sin, half, floats_at(a[13] + to, dim))
        floats_at(a[14] + to, dim)[:] = floats_at(a[2] + 4 * head * dim, dim)


def _attend(args, number):  # type: ignore[no-untyped-def]
    """Attend to SPLIT keys of one kv head per task.

    ``partial`` has shape (splits, heads, dim + 2): weighted sums of values, then the highest score and the sum of
    weights.

    Arguments: q, keys, values, stride, length, heads, kv heads, dim, scale, partial.
    """
    a = words(args, 10)
    length, heads, kv_heads, dim = a[4], a[5], a[6], a[7]
    split, kv_head = number // kv_heads, number % kv_heads
    first, share, scale = split * SPLIT, heads // kv_heads, load_f32(args, 16)
    count = min(SPLIT, length - first)
    if count <= 0:
        return
    weights = np.empty((share, SPLIT), np.float32)
    offset = 4 * (kv_head * a[3] + first * dim)
    for j in range(count):
        key = floats_at(a[1] + offset + 4 * j * dim, dim)
        for h in range(share):
            q = floats_at(a[0] + 4 * (kv_head * share + h) * dim, dim)
            total = np.float32(0.0)
            for i in range(dim):
                total += q[i] * key[i]
            weights[h, j] = total * scale
    for h in range(share):
        out = floats_at(a[9] + 4 * (split * heads + kv_head * share + h) * (dim + 2), dim + 2)
        out[:] = np.float32(0.0)
        highest, total = _LOWEST, np.float32(0.0)
        for j in range(count):
            highest = max(highest, weights[h, j])
        for j in range(count):
            weights[h, j] = exponential(weights[h, j] - highest)
            total += weights[h, j]
        out[dim], out[dim + 1] = highest, total
    for j in range(count):
        value = floats_at(a[2] + offset + 4 * j * dim, dim)
        for h in range(share):
            out = floats_at(a[9] + 4 * (split * heads + kv_head * share + h) * (dim + 2), dim)
            w = weights[h, j]
            for i in range(dim):
                out[i] += w * value[i]


def _join(args, head):  # type: ignore[no-untyped-def]
    """Combine a head's splits, in order, and multiply with ``sigmoid(gate)``; one head per task.

    Arguments: partial, length, heads, dim, q and gate, y.
    """
    a = words(args, 6)
    heads, dim = a[2], a[3]
    y = floats_at(a[5] + 4 * head * dim, dim)
    gate = floats_at(a[4] + 4 * (2 * head + 1) * dim, dim)
    y[:] = np.float32(0.0)
    highest, total = _LOWEST, np.float32(0.0)
    splits = (a[1] + SPLIT - 1) // SPLIT
    for split in range(splits):
        top = np.float32(load_f32(a[0], (split * heads + head) * (dim + 2) + dim))
        if top > highest:
            highest = top
    for split in range(splits):
        part = floats_at(a[0] + 4 * (split * heads + head) * (dim + 2), dim + 2)
        fade = exponential(part[dim] - highest)
        total += fade * part[dim + 1]
        for i in range(dim):
            y[i] += fade * part[i]
    for i in range(dim):
        y[i] = y[i] / total * sigmoid(gate[i])


def _choose(args, _):  # type: ignore[no-untyped-def]
    """Apply softmax to the router's logits and pick the K most probable experts, most probable first.

    Of equals the one with the higher index comes first, as in ``route``. If the softmax is not finite, ids are -1.

    Arguments: logits, experts, K, normalise, ids, weights.
    """
    a = words(args, 6)
    logits, ids, weights = floats_at(a[0], a[1]), words(a[4], a[2]), floats_at(a[5], a[2])
    highest, total = _LOWEST, np.float32(0.0)
    for i in range(len(logits)):
        highest = max(highest, logits[i])
    for i in range(len(logits)):
        logits[i] = exponential(logits[i] - highest)
        total += logits[i]
    if not (total > np.float32(0.0) and total < np.float32(np.inf)):
        ids[:] = -1
        return
    chosen = np.float32(0.0)
    for rank in range(len(ids)):
        best = 0
        for i in range(1, len(logits)):
            if logits[i] >= logits[best]:
                best = i
        ids[rank], weights[rank] = best, logits[best]
        chosen += logits[best]
        logits[best] = np.float32(-1.0)
    for rank in range(len(ids)):
        weights[rank] /= chosen if a[3] else total


def _combine(args, number):  # type: ignore[no-untyped-def]
    """Compute ``hidden += sum_k weights_k y_k + sigmoid(gate) shared``, in the router's order; CHANNELS per task.

    Arguments: y, K, size, weights, shared, gate, hidden.
    """
    a = words(args, 7)
    size, first = a[2], number * CHANNELS
    count = min(CHANNELS, size - first)
    hidden, shared = floats_at(a[6] + 4 * first, count), floats_at(a[4] + 4 * first, count)
    total = np.zeros(CHANNELS, np.float32)
    for k in range(a[1]):
        y, weight = floats_at(a[0] + 4 * (k * size + first), count), load_f32(a[3], k)
        add_scaled(total[:count], y, weight)
    gate = sigmoid(load_f32(a[5], 0))
    for i in range(count):
        hidden[i] += total[i] + gate * shared[i]


norm, permute, round_x, gather, convolve, delta, place_heads, attend, join, choose, combine = (
    task(function, fastmath=VECTORISED)
    for function in (
        _norm,
        _permute,
        _round,
        _gather,
        _convolve,
        _delta,
        _place_heads,
        _attend,
        _join,
        _choose,
        _combine,
    )
)
