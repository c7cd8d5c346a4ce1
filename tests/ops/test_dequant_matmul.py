import importlib

import mlx.core as mx
import numpy as np
import pytest

from .oracle import assert_close, dequantize, quantize, wide

module = importlib.import_module("flash_moe_mlx.ops.dequant_matmul")

TOLERANCE = {mx.float32: 1e-3, mx.bfloat16: 4e-3}
"""cuBLAS multiplies float32 in TF32; weights are rounded to bfloat16 where x is."""


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(_cpu_and_seed, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA, on whatever there is."""
    monkeypatch.setattr(module, "dequantizes", lambda: True)
    with mx.stream(getattr(mx, request.param)):
        yield


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bits", "outputs", "rows"), [(4, 200, 9), (2, 128, 33), (8, 96, 64), (3, 70, 17)])
def test_tiles_give_the_matrix_product(bits, outputs, rows, dtype, lazy, device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 128 * 64)  # 64 outputs a tile
    packed, scales, biases = quantize(mx.random.normal((outputs, 128)), bits, 64, mx.bfloat16)
    x = mx.random.normal((rows, 128)).astype(dtype)
    y = module.dequant_matmul(x, packed, scales, biases, bits=bits, group_size=64, lazy=lazy)
    assert y.dtype == dtype and y.shape == (rows, outputs)
    assert_close("tiles", wide(x) @ dequantize(packed, scales, biases, bits).T, y, TOLERANCE[dtype])


def test_without_tiles_it_is_mlx_own_product():
    packed, scales, biases = quantize(mx.random.normal((40, 128)), 4, 64, mx.bfloat16)
    x = mx.random.normal((12, 128))
    expected = mx.quantized_matmul(
        x, packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=4
    )
    assert np.array_equal(module.dequant_matmul(x, packed, scales, biases, bits=4, group_size=64), expected)


@pytest.mark.parametrize(("hidden", "width"), [(2048, 512), (4096, 1024), (64, 32)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_passing_records_fit_besides_what_two_runs_of_products_take(hidden: int, width: int, bits: int, device: None):
    record = 3 * hidden * width * bits // 8 + 3 * hidden * width // 64 * 4
    count = module.passing_records(record, hidden, width)
    dense = 2 * 3 * module.experts_at_once(hidden, width) * hidden * width * 2  # bfloat16
    assert 2 <= count <= 2 * module.experts_at_once(hidden, width)
    assert count * record + dense <= module.product_scratch_bytes(0, hidden, width)
