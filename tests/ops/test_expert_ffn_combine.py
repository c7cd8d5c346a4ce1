from contextlib import contextmanager
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.expert_ffn import expert_ffn_kernel
from flash_moe_mlx.ops.expert_ffn_combine import (
    MAX_WIDTH,
    choose_spread,
    expert_ffn_combine,
    expert_ffn_combine_kernel,
    expert_ffn_combine_reference,
    shared_expert,
)
from flash_moe_mlx.ops.gpu.geometry import CHUNK, choose_lanes
from flash_moe_mlx.ops.moe_combine import moe_combine_kernel
from flash_moe_mlx.ops.norm import Norm

from .oracle import RELATIVE_RMS, assert_close, expert_ffn_oracle, make_bank, wide

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


@contextmanager
def kernels_chosen():
    """Make dispatchers choose the kernels, wherever these run."""
    module = import_module("flash_moe_mlx.ops.expert_ffn_combine")
    before, module.use_kernels = module.use_kernels, lambda: True
    try:
        yield
    finally:
        module.use_kernels = before


def inputs(case: tuple) -> tuple:
    hidden, width, bits, group_size, tokens, experts, dtype, bias, present = case
    bank, dense = make_bank(hidden, width, 4, (bits,) * 3, (group_size,) * 3, expert_bias=bias, alter=False)
    x = mx.random.normal((tokens, hidden)).astype(dtype)
    slots = mx.random.randint(0, 4, (tokens, experts)).astype(mx.uint32)
    weights = mx.softmax(mx.random.normal((tokens, experts)), axis=-1)
    shapes = {"s": (tokens, hidden), "g": (tokens, 1), "r": (tokens, hidden)}
    extra = [mx.random.normal(shape).astype(dtype) if key in present else None for key, shape in shapes.items()]
    return bank, dense, (x, bank, slots, weights, *extra)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_has_the_bits_of_the_two_it_replaces(case, kernels):
    _, _, arguments = inputs(case)
    x, bank, slots, *rest = arguments
    fused = expert_ffn_combine_kernel(*arguments)
    apart = moe_combine_kernel(expert_ffn_kernel(x, bank, slots), *rest)
    assert fused.dtype == apart.dtype
    assert np.array_equal(wide(fused), wide(apart))
    assert np.isfinite(wide(fused)).all()


# H, I and bits of the routed experts, Is and bits of gate, up and down of the shared one, group size, T, K, dtype
SHARED_CASES = {
    "same-K8-H128-I128-bf16": (128, 128, (4, 4, 4), 128, (4, 4, 4), 64, 1, 8, BF16),
    "same-K2-H2048-I64-T3-f32": (2048, 64, (4, 4, 4), 64, (4, 4, 4), 64, 3, 2, F32),
    "bits8-K3-H192-I128-f32": (192, 128, (4, 4, 4), 128, (8, 8, 8), 64, 2, 3, F32),
    "wider-K4-H96-I64-f32": (96, 64, (4, 4, 4), 160, (4, 4, 6), 32, 1, 4, F32),
    "narrower-K10-H64-I1024-bf16": (64, 1024, (2, 2, 2), 96, (3, 4, 4), 32, 1, 10, BF16),
}


@pytest.mark.parametrize("case", SHARED_CASES.values(), ids=SHARED_CASES)
def test_computes_norm_and_shared_expert_with_the_bits_of_each_apart(case, kernels):
    hidden, width, bits, shared_width, shared_bits, group_size, tokens, experts, dtype = case
    bank, dense = make_bank(hidden, width, 4, bits, (group_size,) * 3, alter=False)
    shared, shared_dense = make_bank(hidden, shared_width, 1, shared_bits, (group_size,) * 3, alter=False)
    x = (mx.random.normal((tokens, hidden)) * 3).astype(dtype)
    residual = mx.random.normal((tokens, hidden)).astype(dtype)
    norm = Norm(mx.random.normal((hidden,)).astype(dtype), 1e-6)
    slots = mx.random.randint(0, 4, (tokens, experts)).astype(mx.uint32)
    weights = mx.softmax(mx.random.normal((tokens, experts)), axis=-1)
    logits = mx.random.normal((tokens, 7))
    arguments = (x, bank, slots, weights, shared, logits, residual, norm)
    out = expert_ffn_combine_kernel(*arguments)
    with kernels_chosen():
        alone = shared_expert(x, shared, bank.layout, norm)
    apart = moe_combine_kernel(
        expert_ffn_kernel(x, bank, slots, norm=norm), weights, alone, mx.contiguous(logits[:, -1:]), residual
    )
    assert np.array_equal(wide(out), wide(apart))

    normed = mx.array(wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6) * wide(norm.weight))
    expected = np.einsum("tk,tkh->th", wide(weights), expert_ffn_oracle(normed, dense, slots))
    own = expert_ffn_oracle(normed, shared_dense, mx.zeros((tokens, 1), mx.uint32))[:, 0]
    expected += own / (1 + np.exp(-wide(logits)[:, -1:])) + wide(residual)
    assert_close("combined", expected, out)
    with mx.stream(mx.cpu):
        assert_close("reference", expected, expert_ffn_combine_reference(*arguments), max(1e-5, RELATIVE_RMS[dtype]))


def test_a_slot_that_does_not_exist_is_not_read(kernels):
    """An expert that is not in memory has a slot past the end in the table: its result is thrown away."""
    _, _, (x, bank, _, weights, *rest) = inputs(CASES["K4-H256-I128-bits4-bf16"])
    absent, last = (mx.array([[0, slot, 1, 2]], mx.uint32) for slot in (2**32 - 1, 3))
    results = [wide(expert_ffn_combine_kernel(x, bank, slots, weights, *rest)) for slots in (absent, last)]
    assert np.array_equal(*results)


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


def test_the_widest_experts_fit_into_threadgroup_memory():
    for width in (64, 512, 1024, 1536, 2048, MAX_WIDTH // CHUNK * CHUNK):
        for experts in range(1, 34):
            for hidden in (64, 2048, 4096):
                spread = choose_spread(hidden, width, choose_lanes(width // CHUNK), experts)
                staged = spread.simd_groups * (width // CHUNK) * (CHUNK + 4)
                assert 4 * (staged + experts * spread.tile_rows) <= 32768
                assert spread.simd_groups * spread.rounds >= experts
                assert 32 * spread.simd_groups <= 512
