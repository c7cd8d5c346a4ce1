"""Scaled dot-product attention, block by block of keys with a running softmax: no matrix of scores.

MLX's CPU backend takes 3 s for 256 queries and 2048 keys of 16 heads of 256, and writes all scores. Here a task
takes ROWS rows (tokens of the heads that share keys) and passes over the keys KEYS at a time.
"""

import mlx.core as mx
import numpy as np

from .arrays import Output, address, floats
from .elementwise import exponential
from .jit import VECTORISED, compiled
from .memory_ir import add_one, load_f32, load_u8
from .threads import run
from .tile_ir import MR, NR, PACK_BLOCK, make_multiply, make_unpack
from .vector_ir import F32, LANES, make_dense_dots

ROWS = 128
"""Rows of queries per task: their sums and a block of scores stay in the second-level cache."""

KEYS = NR

DOT_ROWS = 16
"""Up to this many rows, keys and values are read in place: copying them into tiles would cost more."""

MASKED = np.float32(-3.4e38)
"""Score of a masked key, as MLX's: a row without any key becomes an average, not NaN."""

NO_MASK, CAUSAL, ARRAY = 0, 1, 2

_unpack = make_unpack(0, F32, PACK_BLOCK)
_dots, _one_dot = make_dense_dots(F32, 4), make_dense_dots(F32, 1)
_multiply, _multiply_one = make_multiply(MR), make_multiply(1)


def _product(x, x_stride, rows, tile, tile_stride, count, y, y_stride, outputs, start):  # type: ignore[no-untyped-def]
    for row in range(0, rows - MR + 1, MR):
        _multiply(x + row * x_stride, x_stride, tile, tile_stride, count, y + row * y_stride, y_stride, outputs, start)
    for row in range(rows // MR * MR, rows):
        at = y + row * y_stride
        _multiply_one(x + row * x_stride, x_stride, tile, tile_stride, count, at, y_stride, outputs, start)


_product_kernel = compiled(_product, inline=True)


def _attend(queries, keys, values, sizes, mode, mask, scale, y, state):  # type: ignore[no-untyped-def]
    """Attend to all keys, ROWS rows of queries per task.

    Queries, keys and values are (address, bytes per row of the batch, per head, per token); y is (B, L, heads, D).
    sizes is (kv heads, keys); for mode ARRAY, mask is (address, bytes per row of the batch, per head, per token, per
    key).
    """
    batch, length, heads, dims = y.shape
    kv_heads, total = sizes
    share = heads // kv_heads
    blocks = (length * share + ROWS - 1) // ROWS
    counter = state.ctypes.data
    tasks = batch * kv_heads * blocks
    memory = np.empty(2 * ROWS * dims + ROWS * KEYS + dims * KEYS + 16, np.float32)
    base = (memory.ctypes.data + 63) // 64 * 64
    first_element = (base - memory.ctypes.data) // 4
    memory = memory[first_element:]
    query = memory[: ROWS * dims].reshape((ROWS, dims))
    sums = memory[ROWS * dims : 2 * ROWS * dims].reshape((ROWS, dims))
    scores = memory[2 * ROWS * dims : 2 * ROWS * dims + ROWS * KEYS].reshape((ROWS, KEYS))
    tile = base + 4 * (2 * ROWS * dims + ROWS * KEYS)
    tiles = memory[2 * ROWS * dims + ROWS * KEYS :]
    highest, weight = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    while True:
        task = add_one(counter)
        if task >= tasks:
            break
        n, kv_head, first = task // blocks // kv_heads, task // blocks % kv_heads, task % blocks * ROWS
        rows = min(ROWS, length * share - first)
        for row in range(rows):
            t, head = (first + row) // share, kv_head * share + (first + row) % share
            source = queries[0] + n * queries[1] + head * queries[2] + t * queries[3]
            for i in range(dims):
                query[row, i] = load_f32(source, i) * scale
                sums[row, i] = np.float32(0.0)
            highest[row], weight[row] = MASKED, np.float32(0.0)
        end = total
        if mode == CAUSAL:
            end = total - length + (first + rows - 1) // share + 1
        for start in range(0, end, KEYS):
            count = min(KEYS, total - start)
            key = keys[0] + n * keys[1] + kv_head * keys[2] + start * keys[3]
            if rows <= DOT_ROWS:
                for row in range(rows):
                    x, out = query[row].ctypes.data, scores[row].ctypes.data
                    for j in range(0, count // 4 * 4, 4):
                        _dots(key + j * keys[3], keys[3], x, 0, 0, 0, 0, dims // NR, out + 4 * j, 1)
                    for j in range(count // 4 * 4, count):
                        _one_dot(key + j * keys[3], keys[3], x, 0, 0, 0, 0, dims // NR, out + 4 * j, 1)
            else:
                for column in range(0, KEYS, LANES):
                    row = min(column, count - 1)
                    at, last = key + row * keys[3], count - 1 - row
                    _unpack(at, keys[3], last, 0, dims // PACK_BLOCK, 0, 0, tile + 4 * column)
                _product_kernel(
                    query.ctypes.data, 4 * dims, rows, tile, 4 * KEYS, dims, scores.ctypes.data, 4 * KEYS, KEYS, -1
                )
            for row in range(rows):
                t, head = (first + row) // share, kv_head * share + (first + row) % share
                s = scores[row]
                allowed = count
                if mode == CAUSAL:
                    allowed = min(count, total - length + t + 1 - start)
                for i in range(max(allowed, 0), KEYS):
                    s[i] = MASKED
                if mode == ARRAY:
                    allow = mask[0] + n * mask[1] + head * mask[2] + t * mask[3] + start * mask[4]
                    for i in range(count):
                        if not load_u8(allow, i * mask[4]):
                            s[i] = MASKED
                top = highest[row]
                for i in range(KEYS):
                    top = s[i] if s[i] > top else top
                for i in range(KEYS):
                    s[i] = exponential(s[i] - top)
                for i in range(count, KEYS):
                    s[i] = np.float32(0.0)  # even if every key is masked
                # Over all KEYS: the order of a sum must not depend on how many keys there are.
                added = np.float32(0.0)
                for i in range(KEYS):
                    added += s[i]
                fade = exponential(highest[row] - top)
                weight[row] = weight[row] * fade + added
                if top != highest[row]:
                    for i in range(dims):
                        sums[row, i] *= fade
                    highest[row] = top
            value = values[0] + n * values[1] + kv_head * values[2] + start * values[3]
            for column in range(0, dims, NR):
                place, stride = value + 4 * column, values[3]
                if rows > DOT_ROWS:
                    for j in range(count):
                        for i in range(NR):
                            tiles[j * NR + i] = load_f32(place + j * stride, i)
                    place, stride = tile, 4 * NR
                at = sums.ctypes.data + 4 * column
                _product_kernel(scores.ctypes.data, 4 * KEYS, rows, place, stride, count, at, 4 * dims, NR, 0)
        for row in range(rows):
            t, head = (first + row) // share, kv_head * share + (first + row) % share
            for i in range(dims):
                y[n, t, head, i] = sums[row, i] / weight[row]
        add_one(counter + 8)
    memory[0] = np.float32(0.0)  # keeps it alive: the loops have only its address
    return tasks


_attend_kernel = compiled(_attend, fastmath=VECTORISED)


def scratch_bytes(head_dim: int, threads: int) -> int:
    """Return the memory that one call takes besides its inputs and its result."""
    return 4 * threads * (2 * ROWS * head_dim + ROWS * KEYS + head_dim * KEYS)


def takes(queries: mx.array, mask: mx.array | str | None) -> bool:
    """Return whether ``attention`` supports these: head sizes that are multiples of 64, and no additive mask."""
    return queries.shape[-1] % NR == 0 and (not isinstance(mask, mx.array) or mask.dtype == mx.bool_)


def _place(array: mx.array) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return float32 memory of an array (B, heads, T, D), its address and strides; only D has to be contiguous."""
    memory = np.asarray(array) if array.dtype == mx.float32 else floats(array)
    if memory.strides[-1] != 4:
        memory = np.ascontiguousarray(memory)
    return memory, (address(memory), *memory.strides[:3])


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """Compute ``mx.fast.scaled_dot_product_attention``.

    Args:
        queries: Queries. Shape (B, Hq, L, D); D is a multiple of 64.
        keys: Keys. Shape (B, Hkv, S, D). Slices of a cache are read in place.
        values: Values. Shape (B, Hkv, S, D).
        scale: Factor on the scores.
        mask: "causal" (the last query sees all keys), a boolean array that broadcasts to (B, Hq, L, S), or None.

    Returns:
        The output. Shape (B, Hq, L, D), dtype of queries. The bits of a row depend on no other row, only on whether
        there are more than DOT_ROWS.

    Cost: reads keys and values once for each ROWS rows of queries; see ``scratch_bytes``.
    """
    batch, heads, length, dims = queries.shape
    kv_heads, total = keys.shape[1:3]
    mx.eval(queries, keys, values)  # together: each evaluation costs about 0.1 ms
    memory = [_place(array) for array in (queries, keys, values)]
    mode, allowed = NO_MASK, np.ones((1, 1, 1, 1), np.bool_)
    if isinstance(mask, mx.array):
        mode, allowed = ARRAY, np.array(mask)
    elif mask is not None:
        mode = CAUSAL
    allowed = np.broadcast_to(allowed, (batch, heads, length, total))
    mask_place = (address(allowed), *allowed.strides)
    y = Output(batch, length, heads, dims)
    places = [place for _, place in memory]
    run(_attend_kernel, *places, (kv_heads, total), mode, mask_place, np.float32(scale), y.array)
    return y.result(queries.dtype).transpose(0, 2, 1, 3)
