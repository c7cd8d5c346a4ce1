import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.gated_delta import (
    conv1d_silu,
    gated_delta_kernel,
    gated_delta_reference,
)

from .oracle import assert_close, conv_oracle, gated_delta_oracle, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16

# B, T, Hk, Hv, Dk, Dv, dtype
CASES = {
    "T1-heads2x4-128": (1, 1, 2, 4, 128, 128, F32),
    "T37-heads1x2-64x40": (2, 37, 1, 2, 64, 40, F32),
    "T5-heads4x8-32x96-bf16": (2, 5, 4, 8, 32, 96, BF16),
    "T3-heads2x2-96x64": (1, 3, 2, 2, 96, 64, F32),
    "T33-heads2x4-128-f16": (1, 33, 2, 4, 128, 128, F16),
    "T16-heads1x1-192": (3, 16, 1, 1, 192, 128, F32),
}


def inputs(batch: int, steps: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, dtype: mx.Dtype):
    shapes = [(k_heads, k_dim), (k_heads, k_dim), (v_heads, v_dim), (v_heads,), (v_heads,)]
    arrays = [mx.random.normal((batch, steps, *shape)).astype(dtype) for shape in shapes]
    arrays[3] = arrays[3] * 4  # decays from nearly one to nearly nought
    return [*arrays, mx.random.normal((v_heads,)), mx.random.normal((v_heads,))], mx.random.normal(
        (batch, v_heads, v_dim, k_dim)
    )


def left_padding(batch: int, steps: int) -> mx.array:
    return mx.array(np.arange(steps)[None] >= np.arange(batch)[:, None])


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_matches_the_oracle(case, masked: bool, kernels):
    arrays, state = inputs(*case)
    mask = left_padding(*case[:2]) if masked else None
    y, new_state = gated_delta_kernel(*arrays, state, mask)
    expected_y, expected_state = gated_delta_oracle(
        *(wide(array) for array in arrays), wide(state), None if mask is None else np.array(mask)
    )
    assert y.dtype == case[6]
    assert_close("y", expected_y, y)
    assert_close("state", expected_state, new_state)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_matches_the_oracle(case, masked: bool):
    arrays, state = inputs(*case)
    mask = left_padding(*case[:2]) if masked else None
    y, new_state = gated_delta_reference(*arrays, state, mask)
    expected_y, expected_state = gated_delta_oracle(
        *(wide(array) for array in arrays), wide(state), None if mask is None else np.array(mask)
    )
    assert_close("y", expected_y, y)
    assert_close("state", expected_state, new_state)


@pytest.mark.parametrize("steps", [(1, 36), (16, 21), (36, 1)], ids=str)
def test_a_prompt_in_two_parts(steps: tuple[int, int], kernels):
    """The recurrence has no chunks, so where a prompt is cut changes no bit."""
    arrays, state = inputs(1, 37, 1, 2, 64, 32, F32)
    whole_y, whole_state = gated_delta_kernel(*arrays, state)
    first = [array[:, : steps[0]] for array in arrays[:5]]
    second = [array[:, steps[0] :] for array in arrays[:5]]
    first_y, middle = gated_delta_kernel(*first, *arrays[5:], state)
    second_y, last = gated_delta_kernel(*second, *arrays[5:], middle)
    assert np.array_equal(np.array(last), np.array(whole_state))
    assert np.array_equal(np.concatenate([first_y, second_y], 1), np.array(whole_y))


def test_no_state_is_a_state_of_zeros(kernels):
    arrays, state = inputs(1, 2, 1, 2, 32, 32, F32)
    y, _ = gated_delta_kernel(*arrays, None)
    zero_y, _ = gated_delta_kernel(*arrays, mx.zeros_like(state))
    reference_y, _ = gated_delta_reference(*arrays, None)
    assert np.array_equal(np.array(y), np.array(zero_y))
    assert_close("y", wide(reference_y), y)


def test_conv_in_parts_and_masked():
    x, state, weight = mx.random.normal((2, 7, 12)), mx.random.normal((2, 3, 12)), mx.random.normal((12, 4, 1))
    y, last = conv1d_silu(x, state, weight)
    expected_y, expected_state = conv_oracle(wide(x), wide(state), wide(weight)[..., 0])
    assert_close("y", expected_y, y)
    assert np.array_equal(wide(last), expected_state)
    middle = state
    for t in range(7):
        one, middle = conv1d_silu(x[:, t : t + 1], middle, weight)
        assert np.array_equal(np.array(one)[:, 0], np.array(y)[:, t])
    assert np.array_equal(np.array(middle), np.array(last))
    mask = left_padding(2, 7)
    masked_y, _ = conv1d_silu(x, state, weight, mask)
    expected_y, _ = conv_oracle(wide(x) * np.array(mask)[..., None], wide(state), wide(weight)[..., 0])
    assert_close("masked y", expected_y, masked_y)


def test_conv_state_of_rows_padded_on_the_right():
    x, state, weight = mx.random.normal((2, 5, 4)), mx.random.normal((2, 3, 4)), mx.random.normal((4, 4))
    _, last = conv1d_silu(x, state, weight, lengths=mx.array([2, 5]))
    for row, length in enumerate((2, 5)):
        _, alone = conv1d_silu(x[row : row + 1, :length], state[row : row + 1], weight)
        assert np.array_equal(np.array(alone)[0], np.array(last)[row])
