import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flash_moe_mlx.ops.norm import Norm
from flash_moe_mlx.ops.qk_norm_rope import Heads, qk_norm_rope_kernel, qk_norm_rope_reference, rotation

from .oracle import assert_close, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16
EPS = 1e-6

# Hq, Hk, D, rotary dimensions, T, dtype
CASES = {
    "heads16x2-256-rotary64-bf16": (16, 2, 256, 64, 1, BF16),
    "heads3x2-64-rotary16-T2-f32": (3, 2, 64, 16, 2, F32),
    "heads4x1-40-rotary40-f32": (4, 1, 40, 40, 1, F32),
    "heads2x2-128-rotary32-f16": (2, 2, 128, 32, 1, F16),
}


def oracle(x: np.ndarray, weight: np.ndarray, positions: list[int], rotary: int, base: float) -> np.ndarray:
    v = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight
    half = rotary // 2
    angles = np.array(positions)[:, None] * base ** (-np.arange(half) / half)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    one, two = v[..., :half].copy(), v[..., half:rotary].copy()
    v[..., :half], v[..., half:rotary] = one * cosine - two * sine, two * cosine + one * sine
    return v


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_oracle(case, kernels):
    queries, keys, size, rotary, tokens, dtype = case
    heads = Heads(queries, keys, size, 4, 2 * size, 4 + 2 * size * queries)
    projected = mx.random.normal((tokens, 4 + size * (2 * queries + 2 * keys))).astype(dtype)
    q_norm, k_norm = (Norm(mx.random.normal((size,)).astype(dtype), EPS) for _ in range(2))
    positions = [100_003, 7][:tokens]
    turns = mx.concatenate([rotation(position, rotary, 1e7) for position in positions])
    q, k = qk_norm_rope_kernel(projected, heads, q_norm, k_norm, turns)
    rows = wide(projected)[:, 4:]
    q_rows = rows[:, : 2 * size * queries].reshape(tokens, queries, 2, size)[:, :, 0]
    k_rows = rows[:, 2 * size * queries : 2 * size * queries + size * keys].reshape(tokens, keys, size)
    expected = [
        oracle(x, wide(norm.weight), positions, rotary, 1e7) for x, norm in ((q_rows, q_norm), (k_rows, k_norm))
    ]
    assert (q.dtype, k.dtype) == (dtype, dtype)
    assert_close("queries", expected[0], q)
    assert_close("keys", expected[1], k)
    with mx.stream(mx.cpu):
        for reference, own in zip(
            qk_norm_rope_reference(projected, heads, q_norm, k_norm, turns), expected, strict=True
        ):
            assert_close("reference", own, reference)


def test_turns_as_mlx_does():
    x = mx.random.normal((1, 1, 1, 64))
    heads = Heads(1, 1, 64, 0, 64, 64)
    ones = Norm(mx.ones((64,)), 0.0)
    q, _ = qk_norm_rope_reference(mx.concatenate([x, x], -1).reshape(1, -1), heads, ones, ones, rotation(23, 32, 1e4))
    expected = nn.RoPE(32, base=1e4)(mx.fast.rms_norm(x, None, 0.0), offset=23)
    assert np.allclose(np.array(q).ravel(), np.array(expected).ravel(), atol=1e-5)
