import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.dequantize import dense_experts, dense_matrix

from .oracle import make_bank, quantize

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}


def rounded(dense: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.array(mx.array(dense.astype(np.float32)).astype(dtype).astype(mx.float32))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 64), (8, 128)])
def test_a_matrix_is_dequantised_and_rounded_once(bits: int, group_size: int, dtype: mx.Dtype, kernels):
    with mx.stream(mx.cpu):
        parts = quantize(mx.random.normal((70, 256)), bits, group_size, mx.bfloat16)
        exact = mx.dequantize(parts[0], *(p.astype(mx.float32) for p in parts[1:]), group_size=group_size, bits=bits)
    dense = dense_matrix(*parts, bits=bits, group_size=group_size, dtype=dtype)
    assert dense.dtype == dtype
    # MLX may add the bias without an fma: one unit in the last place of float32.
    np.testing.assert_allclose(
        np.array(dense.astype(mx.float32)),
        rounded(np.array(exact), dtype),
        rtol=8e-3 if dtype == mx.bfloat16 else 1e-3 if dtype == mx.float16 else 1e-5,
        atol=1e-6,
    )
    assert (np.array(dense.astype(mx.float32)) == rounded(np.array(exact), dtype)).mean() > 0.99 or dtype == mx.float32


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_experts_are_taken_out_of_their_records(projection: str, kernels):
    with mx.stream(mx.cpu):
        bank, exact = make_bank(256, 128, 5, [4, 2, 8], [64, 32, 64])
    dense = dense_experts(bank, projection, mx.array([4, 0, 3], mx.uint32), mx.float32)
    expected = exact[projection][[4, 0, 3]]
    np.testing.assert_allclose(np.array(dense), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
