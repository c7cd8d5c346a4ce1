import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.norm import Norm
from flash_moe_mlx.ops.norm_matvec import (
    Gate,
    Matrix,
    matvec_residual,
    matvec_residual_kernel,
    norm_matvec,
    norm_matvec_kernel,
)

from .oracle import assert_close, dequantize, quantize, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16
EPS = 1e-6

# H, N, bits, group size, T, dtype of x, dtype of scales
CASES = {
    "H64-N8-bits4-f32": (64, 8, 4, 64, 1, F32, BF16),
    "H2048-N72-bits4-bf16": (2048, 72, 4, 64, 1, BF16, BF16),
    "H96-N1031-bits4-T3-f32": (96, 1031, 4, 32, 3, F32, F32),
    "H4352-N40-bits8-f32": (4352, 40, 8, 64, 1, F32, BF16),
    "H256-N257-bits8-T2-f16": (256, 257, 8, 64, 2, F16, F16),
    "H128-N33-bits3-f32": (128, 33, 3, 32, 1, F32, BF16),
    "H640-N24-bits2-bf16": (640, 24, 2, 128, 1, BF16, BF16),
    "H192-N16-bits6-f32": (192, 16, 6, 64, 5, F32, BF16),
}


def inputs(case: tuple) -> tuple[mx.array, Matrix, np.ndarray]:
    columns, outputs, bits, group_size, tokens, dtype, scale_dtype = case
    packed = quantize(mx.random.normal((outputs, columns)) * columns**-0.5, bits, group_size, scale_dtype)
    x = mx.random.normal((tokens, columns)) * mx.array([[0.01], [1.0], [30.0], [1.0], [2.0]])[:tokens]
    return x.astype(dtype), Matrix(*packed, bits, group_size), dequantize(*packed, bits)


def norm_oracle(x: mx.array, weight: mx.array) -> np.ndarray:
    return wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + EPS) * wide(weight)


@pytest.mark.parametrize("wide_result", [False, True], ids=["as-x", "f32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_norm_matvec_matches_the_oracle(case, wide_result: bool, kernels):
    x, matrix, dense = inputs(case)
    norm = Norm(mx.random.normal((case[0],)).astype(case[5]), EPS)
    dtype = F32 if wide_result else x.dtype
    y = norm_matvec_kernel(x, norm, matrix, dtype)
    assert y.dtype == dtype
    expected = norm_oracle(x, norm.weight) @ dense.T
    assert_close("kernel", expected, y)
    with mx.stream(mx.cpu):
        assert_close("reference", expected, norm_matvec(x, norm, matrix, F32), 1e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matvec_residual_matches_the_oracle(case, gated: bool, kernels):
    x, matrix, dense = inputs(case)
    tokens, columns = x.shape
    residual = mx.random.normal((tokens, case[1])).astype(x.dtype)
    head = 32
    gates = mx.random.normal((tokens, 2 * columns + 7)).astype(x.dtype)
    gate = Gate(gates, 7 + head, head, 2 * head) if gated else None
    out = matvec_residual_kernel(x, matrix, residual, gate)
    assert out.dtype == x.dtype
    left = wide(x)
    if gated:
        logits = wide(gates)[:, 7:].reshape(tokens, -1, 2, head)[:, :, 1].reshape(tokens, columns)
        left = left / (1 + np.exp(-logits))
    expected = left @ dense.T + wide(residual)
    assert_close("kernel", expected, out)
    with mx.stream(mx.cpu):
        own = matvec_residual(x.astype(F32), matrix, residual, gate)
        assert_close("reference", expected, own, 1e-5)


def test_a_token_of_zeros_stays_finite(kernels):
    x, matrix, _ = inputs(CASES["H64-N8-bits4-f32"])
    y = norm_matvec_kernel(mx.zeros_like(x), Norm(mx.ones((64,)), EPS), matrix, F32)
    assert np.array_equal(np.array(y), np.zeros((1, 8)))
