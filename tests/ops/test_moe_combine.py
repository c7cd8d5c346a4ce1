import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.moe_combine import moe_combine_kernel, moe_combine_reference

from .oracle import assert_close, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16

# T, K, H, dtype, which of shared, gate, residual are there
CASES = {
    "K4-H64-f32": (1, 4, 64, F32, "sgr"),
    "K1-H96-bf16-T3": (3, 1, 96, BF16, "sgr"),
    "K10-H4096-bf16": (1, 10, 4096, BF16, "sgr"),
    "K16-H260-f16-T2": (2, 16, 260, F16, "sgr"),
    "K8-H128-no-shared": (5, 8, 128, F32, "r"),
    "K3-H128-no-residual": (2, 3, 128, BF16, "sg"),
    "K3-H128-ungated": (2, 3, 128, F32, "sr"),
    "K8-H64-routed-only": (9, 8, 64, F32, ""),
}


def inputs(tokens: int, experts: int, hidden: int, dtype: mx.Dtype, present: str) -> list[mx.array | None]:
    shapes = {"s": (tokens, hidden), "g": (tokens, 1), "r": (tokens, hidden)}
    extra = [mx.random.normal(shape).astype(dtype) if key in present else None for key, shape in shapes.items()]
    return [mx.random.normal((tokens, experts, hidden)), mx.random.uniform(shape=(tokens, experts)), *extra]


def oracle(y: mx.array, weights: mx.array, shared, gate, residual) -> np.ndarray:
    total = np.einsum("tk,tkh->th", wide(weights), wide(y))
    if shared is not None:
        total += wide(shared) * (1 if gate is None else 1 / (1 + np.exp(-wide(gate))))
    return total if residual is None else total + wide(residual)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_matches_the_oracle(case, kernels):
    arrays = inputs(*case)
    out = moe_combine_kernel(*arrays)
    assert out.dtype == (case[3] if case[4] else F32)
    assert_close("kernel", oracle(*arrays), out)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_matches_the_oracle(case):
    arrays = inputs(*case)
    out = moe_combine_reference(*arrays)
    assert out.dtype == (case[3] if case[4] else F32)
    assert_close("reference", oracle(*arrays), out)


def test_adds_in_the_routers_order(kernels):
    """1e8 + 1 - 1e8 is 0 in float32 in this order and 1 in another: the order shows in the result."""
    y = mx.array([[[1e8] * 4, [1.0] * 4, [-1e8] * 4]])
    for combine in (moe_combine_kernel, moe_combine_reference):
        assert combine(y, mx.ones((1, 3)), None, None, None).tolist() == [[0.0] * 4]
        assert combine(y[:, [0, 2, 1]], mx.ones((1, 3)), None, None, None).tolist() == [[1.0] * 4]
