"""Passes over a prompt's rows, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from ..oracle import assert_close, wide
from ..test_moe_combine import CASES, F32, inputs, oracle

pytest.importorskip("numba")

from flash_moe_mlx.ops.cpu import rows
from flash_moe_mlx.ops.moe_combine import moe_combine
from flash_moe_mlx.ops.numerics import output_dtype
from flash_moe_mlx.ops.rms_norm_gated import rms_norm_gated_reference

MANY = {"K8-H2056-T700": (700, 8, 2056, F32, "sgr"), "no-tokens": (0, 4, 64, F32, "sgr")}


@pytest.mark.parametrize("case", [*CASES.values(), *MANY.values()], ids=[*CASES, *MANY])
def test_combine_matches_the_oracle(case):
    arrays = inputs(*case)
    y, _, shared, _, residual = arrays
    out = moe_combine(*arrays)
    assert out.dtype == output_dtype(y, shared, residual)
    assert out.shape == (case[0], case[2])
    if case[0]:
        assert_close("moe_combine", oracle(*arrays), out)


def test_combine_adds_in_the_routers_order():
    y = mx.array([[[1e8] * 40, [1.0] * 40, [-1e8] * 40]] * 3)
    assert moe_combine(y, mx.ones((3, 3)), None, None, None).tolist() == [[0.0] * 40] * 3
    assert moe_combine(y[:, [0, 2, 1]], mx.ones((3, 3)), None, None, None).tolist() == [[1.0] * 40] * 3


def test_a_tokens_bits_do_not_depend_on_the_others():
    arrays = inputs(90, 6, 1100, F32, "sgr")
    whole = np.array(moe_combine(*arrays))
    for token in (0, 41, 89):
        assert np.array_equal(np.array(moe_combine(*(array[token : token + 1] for array in arrays)))[0], whole[token])


def norm_oracle(x: np.ndarray, gate: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gate / (1 + np.exp(-gate))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (2, 33, 4, 128), (1, 300, 8, 20)], ids=str)
def test_norm_matches_the_oracle(shape, dtype):
    """The gate is a slice, as the split of a projection hands it over."""
    x, gate = (mx.random.normal((*shape[:-1], 2 * shape[-1])).astype(dtype)[..., shape[-1] :] for _ in range(2))
    weight = mx.random.uniform(0.5, 2, (shape[-1],)).astype(dtype)
    x, gate = 3 * x, 3 * gate
    expected = norm_oracle(*map(wide, (x, gate, weight)), 1e-6)
    out = rows.rms_norm_gated(x, gate, weight, 1e-6)
    assert out.dtype == dtype
    assert_close("rms_norm_gated", expected, out)
    if dtype == mx.float32:
        assert_close("reference", expected, rms_norm_gated_reference(x, gate, weight, 1e-6))


def test_norm_of_zeros_and_large_gates():
    x = mx.array([[0.0] * 32, [1e18] * 32, [1.0] * 32])
    gate = mx.array([[1.0] * 32, [-200.0] * 32, [200.0] * 32])
    out = np.array(rows.rms_norm_gated(x, gate, mx.ones((32,)), 1e-6))
    assert np.isfinite(out).all()
    assert (np.abs(out[:2]) < 1e-30).all()
    np.testing.assert_allclose(out[2], 200, rtol=1e-5)
