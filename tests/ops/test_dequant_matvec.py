import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import ShapeError
from flash_moe_mlx.ops.dequant_matvec import dequant_matvec, dequant_matvec_kernel, dequant_matvec_reference

from .oracle import REFERENCE_RMS, RELATIVE_RMS, assert_close, dequantize, quantize, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16

# bits, group size, H, N, M, dtype of x, dtype of scales
CASES = [
    (4, 64, 64, 8, 1, F32, BF16),
    (4, 64, 256, 70, 1, F32, BF16),
    (4, 32, 96, 33, 3, F32, F32),
    (4, 128, 384, 40, 8, F32, F16),
    (4, 64, 4096, 37, 1, BF16, BF16),
    (4, 64, 1536, 40, 2, BF16, BF16),
    (4, 32, 2080, 40, 7, F16, F16),
    (4, 64, 8256, 9, 5, F32, BF16),
    (2, 32, 96, 40, 1, F32, BF16),
    (2, 64, 512, 130, 1, F32, BF16),
    (2, 32, 64, 40, 4, F32, BF16),
    (2, 128, 4096, 24, 1, BF16, BF16),
    (2, 64, 1088, 24, 6, F16, F16),
    (3, 64, 320, 50, 2, F32, BF16),
    (3, 32, 2048, 20, 1, BF16, BF16),
    (5, 32, 64, 40, 1, F32, F32),
    (5, 128, 1280, 20, 5, BF16, BF16),
    (6, 64, 192, 40, 5, F32, F16),
    (6, 32, 2080, 20, 1, F16, F16),
    (8, 128, 4352, 20, 1, F32, BF16),
    (8, 64, 64, 300, 1, BF16, BF16),
    (8, 32, 1120, 20, 8, F32, F32),
]


def case_id(case: tuple) -> str:
    bits, group_size, columns, outputs, rows, x, scales = case
    names = {F32: "f32", BF16: "bf16", F16: "f16"}
    return f"bits{bits}-G{group_size}-H{columns}-N{outputs}-M{rows}-{names[x]}-{names[scales]}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_matches_the_oracle(case, kernels):
    bits, group_size, columns, outputs, rows, dtype, scale_dtype = case
    weight = mx.random.normal((outputs, columns))
    weight[0, :group_size] = 0
    weight[: outputs // 2] *= 64
    weight[: outputs // 3] *= 2.0**-10
    packed, scales, biases = quantize(weight, bits, group_size, scale_dtype)
    x = mx.random.normal((rows, columns)).astype(dtype)
    y = dequant_matvec_kernel(x, packed, scales, biases, bits=bits, group_size=group_size)
    assert y.dtype == dtype
    assert_close("kernel", wide(x) @ dequantize(packed, scales, biases, bits).T, y)
    with mx.stream(mx.cpu):
        reference = dequant_matvec_reference(x, packed, scales, biases, bits=bits, group_size=group_size)
        assert_close("kernel and reference", wide(reference), y, max(REFERENCE_RMS, RELATIVE_RMS[dtype]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exponent", [-30, 30])
def test_small_and_large_x(bits: int, exponent: int, kernels):
    """Backends unpack weights in units of their own, which must not cost range that x has in any model."""
    packed, scales, biases = quantize(mx.random.normal((24, 256)), bits, 64, BF16)
    x = mx.random.normal((2, 256)) * 2.0**exponent
    y = dequant_matvec_kernel(x, packed, scales, biases, bits=bits, group_size=64)
    assert_close("kernel", wide(x) @ dequantize(packed, scales, biases, bits).T, y)


def test_rows_in_several_axes(kernels):
    packed, scales, biases = mx.quantize(mx.random.normal((40, 64)), group_size=64, bits=4)
    x = mx.random.normal((2, 3, 64))
    y = dequant_matvec_kernel(x, packed, scales, biases, bits=4, group_size=64)
    assert_close("kernel", wide(x) @ dequantize(packed, scales, biases, 4).T, y)


def test_every_weight_reaches_its_column(kernels):
    """Unit vectors pick single weights: a wrong shift or column shows as a wrong value, not as noise."""
    packed, scales, biases = mx.quantize(mx.random.normal((8, 64)), group_size=32, bits=4)
    dense = dequantize(packed, scales, biases, 4)
    for first in range(0, 64, 8):
        x = mx.array(np.eye(64, dtype=np.float32)[first : first + 8])
        y = dequant_matvec_kernel(x, packed, scales, biases, bits=4, group_size=32)
        assert np.abs(wide(y) - dense[:, first : first + 8].T).max() < 1e-6


@pytest.mark.parametrize(
    ("bits", "group_size", "message"), [(7, 64, "weight must be"), (4, 16, "scales"), (8, 64, "weight must be")]
)
def test_refuses_what_it_was_not_quantised_with(bits: int, group_size: int, message: str):
    packed, scales, biases = mx.quantize(mx.random.normal((8, 128)), group_size=64, bits=4)
    with pytest.raises(ShapeError, match=message):
        dequant_matvec_kernel(mx.zeros((1, 128)), packed, scales, biases, bits=bits, group_size=group_size)


def test_refuses_groups_it_does_not_know():
    with pytest.raises(ShapeError, match="in groups of 32, 64 or 128"):
        dequant_matvec_kernel(
            mx.zeros((1, 256)), mx.zeros((8, 32), mx.uint32), mx.zeros((8, 1)), mx.zeros((8, 1)), bits=4, group_size=256
        )


def test_tiny_matrices_are_left_to_mlx():
    """Metal would get them in its constant address space, which the body's device pointers can't hold."""
    packed = mx.quantize(mx.random.normal((1, 64)), group_size=64, bits=4)
    with pytest.raises(ShapeError, match="at least 8 elements"):
        dequant_matvec_kernel(mx.ones((1, 64)), *packed, bits=4, group_size=64)
    assert dequant_matvec(mx.ones((1, 64)), *packed, bits=4, group_size=64).shape == (1, 1)


def test_reference_sums_in_float32():
    """MLX's own bfloat16 product on the CPU sums in bfloat16 and is off by per cents."""
    packed, scales, biases = quantize(mx.random.normal((16, 4096)), 4, 64, BF16)
    x = mx.random.normal((1, 4096)).astype(BF16)
    y = dequant_matvec(x, packed, scales, biases, bits=4, group_size=64)
    assert_close("reference", wide(x) @ dequantize(packed, scales, biases, 4).T, y)
