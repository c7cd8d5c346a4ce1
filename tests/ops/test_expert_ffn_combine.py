from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.expert_ffn import expert_ffn_kernel
from flash_moe_mlx.ops.expert_ffn_combine import (
    MAX_WIDTH,
    expert_ffn_combine,
    expert_ffn_combine_kernel,
    expert_ffn_combine_reference,
)
from flash_moe_mlx.ops.gpu.geometry import CHUNK, choose_geometry
from flash_moe_mlx.ops.moe_combine import moe_combine_kernel

from .oracle import assert_close, expert_ffn_oracle, make_bank, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16

# H, I, bits, group size, T, K, dtype, expert biases, which of shared, gate, residual are there
CASES = {
    "K1-H64-I64-bits4-f32": (64, 64, 4, 64, 1, 1, F32, False, "sgr"),
    "K1-H64-I64-bits4-f32-residual": (64, 64, 4, 64, 2, 1, F32, False, "r"),
    "K4-H256-I128-bits4-bf16": (256, 128, 4, 64, 1, 4, BF16, False, "sgr"),
    "K3-H96-I160-bits4-T3-f32-bias": (96, 160, 4, 32, 3, 3, F32, True, "sr"),
    "K8-H128-I1088-bits4-f32": (128, 1088, 4, 64, 1, 8, F32, False, "r"),
    "K10-H320-I2048-bits4-bf16": (320, 2048, 4, 64, 1, 10, BF16, False, "sgr"),
    "K16-H64-I192-bits2-f16": (64, 192, 2, 64, 2, 16, F16, False, "sg"),
    "K3-H128-I1024-bits2-f32": (128, 1024, 2, 128, 1, 3, F32, False, ""),
    "K4-H64-I96-bits3-f32": (64, 96, 3, 32, 1, 4, F32, False, "sgr"),
    "K3-H64-I128-bits8-f32": (64, 128, 8, 64, 1, 3, F32, False, "sgr"),
}


def inputs(case: tuple) -> tuple:
    hidden, width, bits, group_size, tokens, experts, dtype, bias, present = case
    bank, dense = make_bank(hidden, width, 4, (bits,) * 3, (group_size,) * 3, expert_bias=bias, alter=False)
    x = mx.random.normal((tokens, hidden)).astype(dtype)
    slots = mx.random.randint(0, 4, (tokens, experts)).astype(mx.uint32)
    weights = mx.softmax(mx.random.normal((tokens, experts)), axis=-1)
    shapes = {"s": (tokens, hidden), "g": (tokens, 1), "r": (tokens, hidden)}
    extra = [mx.random.normal(shape).astype(dtype) if key in present else None for key, shape in shapes.items()]
    return bank, dense, (x, bank, slots, weights, *extra)


@pytest.mark.parametrize("rows", [1, 2], ids="rows{}".format)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_has_the_bits_of_the_two_it_replaces(case, rows: int, kernels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        import_module("flash_moe_mlx.ops.expert_ffn_combine"), "MIN_SIMD_GROUPS", 0 if rows == 2 else 2**31
    )
    _, _, arguments = inputs(case)
    x, bank, slots, *rest = arguments
    fused = expert_ffn_combine_kernel(*arguments)
    apart = moe_combine_kernel(expert_ffn_kernel(x, bank, slots), *rest)
    assert fused.dtype == apart.dtype
    assert np.array_equal(wide(fused), wide(apart))
    assert np.isfinite(wide(fused)).all()


@pytest.mark.parametrize("run", [expert_ffn_combine_reference, expert_ffn_combine])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_and_dispatcher_match_the_oracle(case, run):
    _, dense, arguments = inputs(case)
    x, _, slots, weights, shared, gate, residual = arguments
    expected = np.einsum("tk,tkh->th", wide(weights), expert_ffn_oracle(x, dense, slots))
    if shared is not None:
        expected += wide(shared) * (1 if gate is None else 1 / (1 + np.exp(-wide(gate))))
    if residual is not None:
        expected += wide(residual)
    out = run(*arguments)
    assert_close("combined", expected, out, 1e-5 if out.dtype == F32 else None)


def test_two_rows_of_the_widest_expert_fit_into_threadgroup_memory():
    for bits in (2, 3, 4, 5, 6, 8):
        made = choose_geometry("test", MAX_WIDTH, [(bits, 64)], rows=2, simd_groups=4)
        assert made.tile == MAX_WIDTH
        assert 2 * made.tile // CHUNK * (CHUNK + 4) * 4 <= 32768
