"""Products with stored matrices, against float64 from the packed bits."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from ..oracle import assert_close, dequantize, quantize, wide

pytest.importorskip("numba")

import numba
from llvmlite import binding as llvm

from flash_moe_mlx.ops.cpu import matmul
from flash_moe_mlx.ops.cpu.arrays import address, view
from flash_moe_mlx.ops.cpu.int8_ir import make_int8_dots, round_to_int8
from flash_moe_mlx.ops.cpu.vector_ir import F32
from flash_moe_mlx.ops.dense_matmul import dense_matmul
from flash_moe_mlx.ops.dequant_matvec import dequant_matvec, dequant_matvec_reference

BITS = [2, 3, 4, 5, 6, 8]
GROUPS = [32, 64, 128]


def make(outputs: int, inputs: int, bits: int, group_size: int, dtype: mx.Dtype = mx.bfloat16):
    weight = mx.random.normal((outputs, inputs)) * inputs**-0.5
    weight[0, :group_size] = 0
    parts = quantize(weight, bits, group_size, dtype)
    mx.eval(parts)
    return parts, dequantize(*parts, bits)


def check(rows: int, outputs: int, inputs: int, bits: int, group_size: int, dtype: mx.Dtype = mx.bfloat16) -> None:
    parts, dense = make(outputs, inputs, bits, group_size, dtype)
    x = mx.random.normal((rows, inputs))
    y = matmul.quantized_matmul(x, *parts, bits=bits, group_size=group_size)
    assert_close("quantized_matmul", wide(x) @ dense.T, y)
    reference = wide(dequant_matvec_reference(x, *parts, bits=bits, group_size=group_size))
    assert_close("quantized_matmul and MLX", reference, y, 1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_a_row_matches(bits, group_size):
    """33 rows of the matrix: 4 at once, 16 a task, and one left; columns that are no whole steps."""
    for inputs in (group_size, 5 * group_size, 512):
        check(1, 33, inputs, bits, group_size)


@pytest.mark.parametrize("bits", BITS)
def test_many_rows_match(bits):
    """More than a tile of outputs and of columns, and rows that are no multiple of 4."""
    check(11, 67, 320, bits, 64)
    check(8, 67, 320, bits, 64)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("rows", [9, 300])
def test_long_prompts_match(rows, group_size):
    check(rows, 130, 384, 4, group_size)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_scales_are_read_as_they_are(dtype, rows):
    check(rows, 20, 192, 4, 64, dtype)


def test_float16_subnormals_infinities_and_nan():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    weight = mx.array(values.reshape(-1, 64))
    x = mx.array(np.eye(64, dtype=np.float32))
    with np.errstate(invalid="ignore"):
        y = np.array(matmul.dense_matmul(x[:8], weight))
        finite = np.isfinite(values.reshape(-1, 64)).all(axis=1)
        assert np.array_equal(y[:, finite], values.reshape(-1, 64)[finite, :8].T.astype(np.float32))
        assert not np.isfinite(y[:, ~finite]).any() or np.isnan(y[:, ~finite]).any()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("rows", [1, 3, 9, 70])
@pytest.mark.parametrize("shape", [(1, 32), (35, 96), (130, 512)], ids=str)
def test_unquantised_match(dtype, rows, shape):
    weight, x = mx.random.normal(shape).astype(dtype), mx.random.normal((rows, shape[1]))
    assert_close("dense_matmul", wide(x) @ wide(weight).T, matmul.dense_matmul(x, weight))


def test_odd_unquantised_widths_run_mlx():
    weight, x = mx.random.normal((7, 33)), mx.random.normal((5, 33))
    assert not matmul.takes_dense(weight)
    assert_close("dense_matmul", wide(x) @ wide(weight).T, dense_matmul(x, weight))


@pytest.mark.parametrize("rows", [range(1, 9), range(9, 40)], ids=["by row", "by tile"])
def test_bits_of_a_row_depend_on_no_other(rows):
    parts, _ = make(70, 320, 4, 64)
    x = mx.random.normal((rows[-1], 320))
    whole = np.array(matmul.quantized_matmul(x, *parts, bits=4, group_size=64))
    for count in rows:
        part = np.array(matmul.quantized_matmul(x[:count], *parts, bits=4, group_size=64))
        assert np.array_equal(part, whole[:count]), count


def test_shapes_dtypes_and_views():
    parts, dense = make(24, 128, 8, 32)
    x = mx.random.normal((2, 3, 256)).astype(mx.bfloat16)[..., ::2]
    y = dequant_matvec(x, *parts, bits=8, group_size=32)
    assert y.shape == (2, 3, 24)
    assert y.dtype == mx.bfloat16
    assert_close("a strided x", wide(x) @ dense.T, y)
    half = matmul.quantized_matmul(x[:0], *parts, bits=8, group_size=32)
    assert half.shape == (0, 3, 24)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [2, 10])
def test_nan_and_infinity_stay_in_their_row(bad, rows):
    parts, _ = make(40, 128, 4, 64)
    x = np.ones((rows, 128), np.float32)
    x[1, 5] = bad
    y = np.array(matmul.quantized_matmul(mx.array(x), *parts, bits=4, group_size=64))
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()


def test_two_threads_at_once():
    parts, _ = make(256, 512, 4, 64)
    x = mx.random.normal((4, 512))
    mx.eval(x)
    expected = np.array(matmul.quantized_matmul(x, *parts, bits=4, group_size=64))
    wrong: list[np.ndarray] = []

    def work() -> None:
        results = [np.array(matmul.quantized_matmul(x, *parts, bits=4, group_size=64)) for _ in range(50)]
        wrong.extend(result for result in results if not np.array_equal(result, expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_integer_products_do_not_hang_on_the_processor(group_size: int) -> None:
    """With and without instructions for them: the same bits, and those of exact arithmetic on the rounded x."""
    rng = np.random.default_rng(group_size)
    x = rng.normal(size=256).astype(np.float32)
    weight, scales, biases = mx.quantize(mx.array(rng.normal(size=(3, 256))), group_size=group_size, bits=4)
    groups = 256 // group_size
    rounded, sums = np.empty(256, np.int8), np.empty((2, groups), np.float32)
    round_to_int8(x, group_size, rounded, sums)
    # Of 128 values those at even places come first.
    restored = rounded.reshape(2, 2, 64).transpose(0, 2, 1).reshape(groups, group_size) * sums[1][:, None]
    assert np.abs(restored.reshape(-1) - x).max() <= 0.51 * sums[1].max()
    expected = np.array(mx.dequantize(weight, scales, biases, group_size=group_size, bits=4)) @ restored.reshape(-1)
    results = []
    for vnni in (False, *([True] if llvm.get_host_cpu_features().get("avx512vnni") else [])):
        dots = make_int8_dots(group_size, F32, 1, vnni=vnni)

        def row(weights, scales, biases, x, sums, groups, out, dots=dots):  # type: ignore[no-untyped-def]
            for i in range(3):
                offset = 4 * i * groups
                dots(weights + 128 * i, 128, x, scales + offset, biases + offset, sums, groups, 2, out + 4 * i, 1)

        y = np.empty(3, np.float32)
        memory = [view(part, np.uint8) for part in (weight, scales, biases)]
        numba.njit(row)(*(address(part) for part in (*memory, rounded, sums)), groups, address(y))
        results.append(y)
    assert np.abs(results[0] - expected).max() < 1e-4 * np.abs(expected).max()
    assert all(np.array_equal(results[0], other) for other in results)
