"""Attention against MLX's."""

import mlx.core as mx
import numpy as np
import pytest

from ..oracle import assert_close, wide

pytest.importorskip("numba")

from flash_moe_mlx.ops.cpu.attention import ROWS, _attend_kernel, attention, takes


def arrays(batch: int, heads: int, kv_heads: int, length: int, keys: int, dims: int) -> tuple[mx.array, ...]:
    """Queries, and keys and values as a cache hands them over: slices of longer arrays."""
    q = mx.random.normal((batch, length, heads, dims)).transpose(0, 2, 1, 3)
    k, v = (mx.random.normal((batch, kv_heads, keys + 5, dims))[:, :, :keys] for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("mask", [None, "causal", "array"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 2, 1, 200, 256),
        (2, 4, 2, 5, 9, 64),
        (1, 3, 1, ROWS, 133, 128),
        (2, 2, 2, 40, 64, 64),
        (1, 1, 1, 1, 1, 64),
    ],
    ids=str,
)
def test_matches(shape, mask):
    q, k, v = arrays(*shape)
    if mask == "array":
        mask = mx.random.uniform(shape=(shape[0], 1, shape[3], shape[4])) > 0.4
        mask[..., -1] = True
    scale = shape[-1] ** -0.5
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    assert_close("attention", wide(expected), attention(q, k, v, scale=scale, mask=mask))


def test_a_row_without_keys_is_finite():
    q, k, v = arrays(1, 2, 1, 3, 70, 64)
    mask = mx.zeros((3, 70), mx.bool_)
    y = attention(q, k, v, scale=0.1, mask=mask)
    assert_close("average", np.broadcast_to(wide(v).mean(2, keepdims=True), y.shape), y, 1e-5)


def test_large_scores_and_nan():
    q, k, v = arrays(1, 1, 1, 20, 100, 64)
    expected = mx.fast.scaled_dot_product_attention(q * 300, k, v, scale=1.0)
    assert_close("large", wide(expected), attention(q * 300, k, v, scale=1.0), 1e-4)
    q[:, :, 3] = float("nan")
    y = np.array(attention(q, k, v, scale=1.0))
    assert np.isnan(y[:, :, 3]).all()
    assert np.isfinite(np.delete(y, 3, axis=2)).all()


def test_bits_of_a_row_depend_on_no_later_key_or_row():
    q, k, v = arrays(1, 4, 2, 60, 160, 64)
    whole = np.array(attention(q, k, v, scale=0.125, mask="causal"))
    part = np.array(attention(q[:, :, :40], k[:, :, :140], v[:, :, :140], scale=0.125, mask="causal"))
    assert np.array_equal(part, whole[:, :, :40])


def test_takes_what_it_can():
    q = mx.zeros((1, 1, 1, 64))
    assert takes(q, None)
    assert takes(q, "causal")
    assert takes(q, mx.ones((1, 1), mx.bool_))
    assert not takes(q, mx.zeros((1, 1)))
    assert not takes(mx.zeros((1, 1, 1, 80)), None)


def test_is_compiled_once():
    q, k, v = arrays(1, 2, 1, 3, 70, 64)
    for mask in (None, "causal", mx.ones((3, 70), mx.bool_), mx.ones((1, 2, 3, 70), mx.bool_)):
        attention(q, k, v, scale=0.1, mask=mask)
    assert len(_attend_kernel.signatures) == 1
