"""Kernels of mxfp4, nvfp4 and int4 matrices against their dequantised weights, in float64."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.formats.expert_layout import Quantization
from flash_moe_mlx.formats.schemes import SCHEMES
from flash_moe_mlx.ops import quantized

pytest.importorskip("numba")

from flash_moe_mlx.ops.cpu import coded_ir
from flash_moe_mlx.ops.cpu.arrays import address, empty
from flash_moe_mlx.ops.cpu.elementwise import read_float
from flash_moe_mlx.ops.cpu.kernels import Format, format_of, permutation
from flash_moe_mlx.ops.cpu.matmul import Matrices, block_products, coded_matmul, row_products
from flash_moe_mlx.ops.cpu.vector_ir import E4M3, E8M0

MODES = {"mxfp4": 32, "nvfp4": 16, "int4": 32}
TOLERANCE = 2e-6


def make(mode: str, rows: int, inputs: int, seed: int = 0) -> tuple[dict[str, mx.array], Quantization]:
    mx.random.seed(seed)
    group = MODES[mode]
    if mode == "int4":
        words = mx.random.randint(0, 2**31 - 1, (rows, inputs // 8)).astype(mx.uint32) * 2 + 1
        parts = {"weight": words, "scales": mx.random.normal((rows, inputs // group)).astype(mx.bfloat16)}
    else:
        weight, scales = mx.quantize(mx.random.normal((rows, inputs)), group, 4, mode=mode)
        parts = {"weight": weight, "scales": scales}
    mx.eval(parts)
    return parts, Quantization(4, group, mode)


def expected(x: mx.array, parts: dict[str, mx.array], quantization: Quantization) -> np.ndarray:
    return np.array(x, np.float64) @ np.array(quantized.dequantize(parts, quantization), np.float64).T


def close(name: str, result: np.ndarray, reference: np.ndarray) -> None:
    error = np.sqrt(((np.array(result, np.float64) - reference) ** 2).mean() / (reference**2).mean())
    assert error < TOLERANCE, f"{name}: {error:.2e}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", [32, 64, 96, 128, 160, 352, 704])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 21])
def test_any_number_of_rows(mode: str, inputs: int, tokens: int):
    """Whole steps and what is left of them; one row at a time, and tiles; 70 outputs are no whole tile."""
    parts, quantization = make(mode, 70, inputs)
    x = mx.random.normal((tokens, inputs))
    close("product", np.array(coded_matmul(x, parts, quantization, 1.0)), expected(x, parts, quantization))
    if mode != "int4":
        close("times 3", np.array(coded_matmul(x, parts, quantization, 3.0)), 3 * expected(x, parts, quantization))


def test_widths_of_half_a_block():
    """nvfp4's groups of 16: no tiles."""
    parts, quantization = make("nvfp4", 20, 48)
    x = mx.random.normal((12, 48))
    close("product", np.array(coded_matmul(x, parts, quantization, 1.0)), expected(x, parts, quantization))


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("inputs", [64, 416])
@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
def test_alternating_rows(mode: str, inputs: int, tiles: bool):
    """Every other row of a matrix, with a bias and factors of its own."""
    parts, quantization = make(mode, 140, inputs)
    x = np.array(mx.random.normal((5, inputs)))
    bias = np.random.default_rng(1).normal(size=140).astype(np.float32)
    form = format_of(quantization, "U8", 2)
    stored = {name: np.frombuffer(memoryview(part).cast("B"), np.uint8) for name, part in parts.items()}
    full = expected(mx.array(x), parts, quantization)
    for which in (0, 1):
        places = {n: np.array([address(s) + which * s.nbytes // 140]) for n, s in stored.items()}
        matrices = Matrices(
            form, 70, places["weight"], places["scales"], None, np.array([0.37], np.float32),
            np.array([address(bias) + 4 * which]), 2,
        )  # fmt: skip
        y, each = empty(5, 70), np.arange(5)
        y[:] = np.nan
        zeros = np.zeros(5, np.int64)
        if tiles:
            block_products(x, matrices, zeros[:1], y, each, each, zeros[:1], np.array([5]))
        else:
            row_products(x, matrices, zeros, y, each, each)
        close(f"rows {which}", y, 0.37 * full[:, which::2] + bias[which::2])


@pytest.mark.parametrize("how", ["", "avx2", "avx512f"])
def test_every_way_to_look_values_up(how: str, monkeypatch: pytest.MonkeyPatch):
    """The same bits, whichever permutation the processor has."""
    order_of = ["", "avx2", "avx512f"]
    if order_of.index(how) > order_of.index(coded_ir.instructions()):
        pytest.skip(f"this processor has no {how}")
    from flash_moe_mlx.ops.cpu import kernels

    parts, quantization = make("mxfp4", 9, 224)
    x = mx.random.normal((1, 224))
    usual = np.array(coded_matmul(x, parts, quantization, 1.0))
    monkeypatch.setattr(coded_ir, "instructions", lambda: how)
    monkeypatch.setattr(Format, "name", property(lambda self: f"looked_up_{how}"))
    for cached in (kernels.product_rows_of, kernels.matvec_kernel):
        cached.cache_clear()
    try:
        np.testing.assert_array_equal(np.array(coded_matmul(x, parts, quantization, 1.0)), usual)
    finally:
        for cached in (kernels.product_rows_of, kernels.matvec_kernel):
            cached.cache_clear()


def test_scales_of_eight_bits():
    """All of MLX's values, but for NaN and the scales that no quantiser writes."""
    codes = np.arange(256, dtype=np.uint8)
    wide = np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))
    own = np.array([read_float(address(codes), i, E4M3) for i in range(256)], np.float32)
    np.testing.assert_array_equal(own, wide)
    powers = np.array([read_float(address(codes), i, E8M0) for i in range(255)])
    np.testing.assert_array_equal(powers, 2.0 ** (np.arange(255) - 127))


def test_subnormal_scales_take_no_subnormal_arithmetic():
    """Arithmetic with float32's subnormals takes over 100 cycles, so it is switched off here: it would give zeros."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'flash_moe_mlx[oracle]'")
    codes = np.arange(8, dtype=np.uint8)
    read_float(address(codes), 0, E4M3)  # compiled with the usual arithmetic
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't switch subnormals off")
    try:
        values = [read_float(address(codes), i, E4M3) for i in range(8)]
    finally:
        torch.set_flush_denormal(False)
    assert values == [i / 512 for i in range(8)]


def test_every_code():
    """16 codes in each of the eight places of a word."""
    words = np.array(
        [[sum(((code + place) % 16) << (4 * place) for place in range(8)) for code in range(16)]], np.uint32
    )
    parts = {"weight": mx.array(words), "scales": mx.full((1, 4), 127, mx.uint8)}
    for column in range(128):
        x = mx.zeros((1, 128))
        x[0, column] = 1
        code = (int(words[0, column // 8]) >> (4 * (column % 8))) & 15
        value = coded_ir.E2M1[code % 8] * (-1 if code > 7 else 1)
        assert coded_matmul(x, parts, Quantization(4, 32, "mxfp4"), 1.0).item() == value


def test_formats_have_names_of_their_own():
    """numba finds cached kernels by name."""
    formats = [
        format_of(Quantization(4, scheme.group_sizes[0], mode), "BF16", apart)
        for (mode, scheme), apart in product(SCHEMES.items(), (1, 2))
        if "cpu" in scheme.kernels and not scheme.base
    ]
    assert len({form.name for form in formats}) == len(formats)
    assert E4M3 in {form.kind for form in formats}
    assert permutation(formats[-1])[0] == 8
