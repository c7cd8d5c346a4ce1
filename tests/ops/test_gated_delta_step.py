import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.gated_delta_step import (
    Columns,
    gated_delta_conv_step_kernel,
    gated_delta_conv_step_reference,
    has_step_kernel,
)
from flash_moe_mlx.ops.norm import Norm

from .oracle import assert_close, conv_oracle, gated_delta_oracle, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16
EPS = 1e-6

# B, Hk, Hv, Dk, Dv, taps, dtype
CASES = {
    "heads2x4-128": (1, 2, 4, 128, 128, 4, F32),
    "heads1x2-64x40": (2, 1, 2, 64, 40, 4, F32),
    "heads4x8-32x96-bf16": (2, 4, 8, 32, 96, 4, BF16),
    "heads2x2-96x64-taps3": (1, 2, 2, 96, 64, 3, F32),
    "heads2x4-128-f16": (1, 2, 4, 128, 128, 4, F16),
    "heads1x1-192x80": (1, 1, 1, 192, 80, 4, F32),
    "heads1x2-64x256": (1, 1, 2, 64, 256, 4, F32),
}


def apart(k_heads: int, v_heads: int, k_dim: int, v_dim: int) -> Columns:
    """One projection behind the other: qkv, z, b, a, as Qwen3.5 stores them."""
    keys, values = k_heads * k_dim, v_heads * v_dim
    share, b = v_heads // k_heads, 2 * keys + 2 * values
    return Columns(0, keys, k_dim, 2 * keys, 2 * keys + values, share * v_dim, b, b + v_heads, share)


def by_key_head(k_heads: int, v_heads: int, k_dim: int, v_dim: int) -> Columns:
    """q, k, v, z of each key head, then b, a of each, as Qwen3-Next stores them."""
    share = v_heads // k_heads
    values, pitch = share * v_dim, 2 * (k_dim + share * v_dim)
    b = k_heads * pitch
    return Columns(0, k_dim, pitch, 2 * k_dim, 2 * k_dim + values, pitch, b, b + share, 2 * share)


@pytest.mark.parametrize("layout", [apart, by_key_head])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_oracle(case, layout, kernels):
    batch, k_heads, v_heads, k_dim, v_dim, taps, dtype = case
    keys, values, share = k_heads * k_dim, v_heads * v_dim, v_heads // k_heads
    columns = layout(k_heads, v_heads, k_dim, v_dim)
    projected = mx.random.normal((batch, 2 * keys + 2 * values + 2 * v_heads)).astype(dtype)
    channels = 2 * keys + values
    conv_state = mx.random.normal((batch, taps - 1, channels)).astype(dtype)
    conv_weight = mx.random.normal((channels, taps)).astype(dtype)
    A_log, dt_bias = mx.random.normal((v_heads,)), mx.random.normal((v_heads,))
    state = mx.random.normal((batch, v_heads, v_dim, k_dim))
    norm = Norm(mx.random.normal((v_dim,)).astype(dtype), EPS)
    arguments = (projected, columns, conv_state, conv_weight, A_log, dt_bias, state, norm)
    y, new_conv_state, new_state = gated_delta_conv_step_kernel(*arguments)

    rows = wide(projected)
    if layout is apart:
        parts = np.split(rows, np.cumsum([keys, keys, values, values, v_heads]), axis=-1)
    else:
        heads = rows[:, : -2 * v_heads].reshape(batch, k_heads, -1)
        split = np.split(heads, np.cumsum([k_dim, k_dim, share * v_dim]), axis=-1)
        gates = np.split(rows[:, -2 * v_heads :].reshape(batch, k_heads, -1), 2, axis=-1)
        parts = [part.reshape(batch, -1) for part in (*split, *gates)]
    q, k, v, z, b, a = (part[:, None] for part in parts)
    mixed, expected_conv_state = conv_oracle(np.concatenate([q, k, v], -1), wide(conv_state), wide(conv_weight))
    sizes = ((k_heads, k_dim), (k_heads, k_dim), (v_heads, v_dim))
    q, k, v = (
        part.reshape(batch, 1, *size)
        for part, size in zip(np.split(mixed, [keys, 2 * keys], axis=-1), sizes, strict=True)
    )
    expected, expected_state = gated_delta_oracle(q, k, v, a, b, wide(A_log), wide(dt_bias), wide(state), None)
    expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + EPS) * wide(norm.weight)
    gate = z.reshape(expected.shape)
    expected = (expected * gate / (1 + np.exp(-gate))).reshape(batch, -1)

    # The convolution's output is rounded to the dtype of x, as between two separate operations.
    state_limit = {F32: 2e-6, BF16: 4e-3, F16: 1e-3}[dtype]
    assert y.dtype == dtype
    assert_close("y", expected, y)
    assert_close("state", expected_state, new_state, state_limit)
    assert np.array_equal(wide(new_conv_state), expected_conv_state)
    with mx.stream(mx.cpu):
        reference = gated_delta_conv_step_reference(*arguments)
        assert_close("y and reference", wide(reference[0]), y, {F32: 1e-5, BF16: 6e-3, F16: 1e-3}[dtype])
        assert_close("reference's state", expected_state, reference[2], max(state_limit, 1e-5))


def test_heads_whose_state_does_not_fit_into_registers_are_left_to_others():
    """A GPU that can't give 512 threads so many registers would not run the kernel at all."""
    assert has_step_kernel(128, 128)
    assert has_step_kernel(64, 256)
    assert not has_step_kernel(192, 256)
    assert not has_step_kernel(24, 32)
