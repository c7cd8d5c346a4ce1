"""The gated delta rule and its convolution, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from ..oracle import assert_close, conv_oracle, gated_delta_oracle, wide

pytest.importorskip("numba")

from flash_moe_mlx.ops.cpu import delta
from flash_moe_mlx.ops.gated_delta import conv1d_silu_reference


def inputs(batch: int, steps: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int) -> list[mx.array]:
    """q, k and v as slices of one array, as the convolution hands them over; then a, b, A_log, dt_bias, state."""
    channels = 2 * k_heads * k_dim + v_heads * v_dim
    mixed = mx.random.normal((batch, steps, channels))
    q, k, v = mx.split(mixed, [k_heads * k_dim, 2 * k_heads * k_dim], axis=-1)
    return [
        q.reshape(batch, steps, k_heads, k_dim),
        k.reshape(batch, steps, k_heads, k_dim),
        v.reshape(batch, steps, v_heads, v_dim),
        mx.random.normal((batch, steps, v_heads)),
        mx.random.normal((batch, steps, v_heads)),
        mx.random.normal((v_heads,)),
        mx.random.normal((v_heads,)),
        mx.random.normal((batch, v_heads, v_dim, k_dim)),
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 4, 32, 32), (2, 5, 2, 4, 64, 33), (1, 40, 1, 1, 20, 17), (1, 3, 4, 4, 128, 128)], ids=str
)
def test_matches(shape, masked):
    arrays = inputs(*shape)
    mask = mx.random.uniform(shape=shape[:2]) > 0.4 if masked else None
    before = np.array(arrays[-1])
    y, state = delta.gated_delta(*arrays, mask)
    expected_y, expected_state = gated_delta_oracle(*map(wide, arrays), None if mask is None else np.array(mask))
    if mask is None or bool(mask.any()):
        assert_close("y", expected_y, y)
    assert_close("state", expected_state, state)
    assert np.array_equal(np.array(arrays[-1]), before), "the caller's state must stay what it was"


def test_starts_from_zeros():
    arrays = inputs(2, 3, 1, 2, 32, 32)
    arrays[-1] = mx.zeros_like(arrays[-1])
    y, state = delta.gated_delta(*arrays)
    other_y, other_state = delta.gated_delta(*arrays[:-1], None)
    assert np.array_equal(np.array(y), np.array(other_y))
    assert np.array_equal(np.array(state), np.array(other_state))


def test_steps_one_by_one_give_the_same_bits():
    arrays = inputs(1, 6, 2, 4, 64, 32)
    y, state = delta.gated_delta(*arrays)
    own = arrays[-1]
    for t in range(6):
        one, own = delta.gated_delta(*(array[:, t : t + 1] for array in arrays[:5]), *arrays[5:7], own)
        assert np.array_equal(np.array(one)[:, 0], np.array(y)[:, t])
    assert np.array_equal(np.array(own), np.array(state))


def test_extreme_gates_stay_finite():
    arrays = inputs(1, 4, 1, 2, 32, 32)
    arrays[3] = mx.array([[[300.0, -300.0]] * 4])
    arrays[4] = mx.array([[[100.0, -100.0]] * 4])
    y, state = delta.gated_delta(*arrays)
    expected_y, expected_state = gated_delta_oracle(*map(wide, arrays), None)
    assert_close("y", expected_y, y)
    assert_close("state", expected_state, state)


@pytest.mark.parametrize(("batch", "steps", "channels", "taps"), [(1, 1, 1030, 4), (2, 2, 40, 4), (2, 9, 24, 3)])
def test_convolution_matches(batch, steps, channels, taps):
    x, state = mx.random.normal((batch, steps, channels)), mx.random.normal((batch, taps - 1, channels))
    weight = mx.random.normal((channels, taps, 1))
    y, new_state = delta.conv1d_silu(x, state, weight)
    expected_y, expected_state = conv_oracle(wide(x), wide(state), wide(weight)[..., 0])
    assert_close("y", expected_y, y)
    assert np.array_equal(wide(new_state), expected_state)


@pytest.mark.parametrize("lengths", [None, [4, 1], [0, 2]])
@pytest.mark.parametrize("masked", [False, True])
def test_convolution_of_padded_rows_matches(lengths, masked):
    x, state, weight = mx.random.normal((2, 4, 48)), mx.random.normal((2, 3, 48)), mx.random.normal((48, 4))
    mask = mx.array([[False, True, True, True], [True, True, False, False]]) if masked else None
    lengths = None if lengths is None else mx.array(lengths)
    y, new_state = delta.conv1d_silu(x, state, weight, mask, lengths)
    expected_y, expected_state = conv1d_silu_reference(x, state, weight, mask, lengths)
    assert_close("y", wide(expected_y), y)
    assert np.array_equal(np.array(new_state), np.array(expected_state))
