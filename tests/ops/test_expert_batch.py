"""A prompt's experts as grouped products, as a GPU computes them: against the oracle, whatever shares a call."""

import importlib

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops import expert_batch
from flash_moe_mlx.ops.expert_batch import expert_ffn_grouped

from . import oracle

quantized = importlib.import_module("flash_moe_mlx.ops.quantized")
HIDDEN, WIDTH, EXPERTS, TOKENS, K = 128, 64, 6, 40, 3
RNG = np.random.default_rng(11)
IDS = np.array([RNG.choice(EXPERTS, K, replace=False) for _ in range(TOKENS)])


def tokens(dtype: mx.Dtype) -> mx.array:
    """The same ones whichever tests ran before: of others, the error of bfloat16's sums may pass the bound."""
    return mx.array(np.random.default_rng(0).normal(size=(TOKENS, HIDDEN)).astype(np.float32)).astype(dtype)


def grouped(x: mx.array, bank: oracle.UnifiedSlots) -> np.ndarray:
    pairs = [np.flatnonzero(IDS.reshape(-1) == expert) for expert in range(EXPERTS)]
    y = mx.zeros((TOKENS * K, HIDDEN))
    return np.array(expert_ffn_grouped(y, x, bank, list(range(EXPERTS)), pairs, K)).reshape(TOKENS, K, HIDDEN)


@pytest.mark.parametrize("dequantised", [True, False], ids=["dequantised", "packed"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("bits", [2, 4, 0])
def test_matches_the_oracle(bits: int, dtype: mx.Dtype, dequantised: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expert_batch, "use_kernels", lambda: True)
    monkeypatch.setattr(expert_batch, "use_cpu_kernels", lambda: False)
    monkeypatch.setattr(quantized, "dequantizes", lambda: dequantised)
    if dtype == mx.bfloat16 and (dequantised or not bits) and mx.default_device() == mx.cpu:
        pytest.skip("MLX's gather_mm takes float32 alone on a CPU")
    bank, dense = oracle.make_bank(HIDDEN, WIDTH, EXPERTS, [bits] * 3, [32] * 3)
    x = tokens(dtype)
    result = grouped(x, bank)
    expected = oracle.expert_ffn_oracle(x, dense, mx.array(IDS))
    # MLX's CPU products accumulate in bfloat16.
    oracle.assert_close("grouped", expected, mx.array(result), 1e-5 if dtype == mx.float32 else 3e-2)
    for rows, experts in ((1, 6), (10, 2), (4096, 1)):
        monkeypatch.setattr(expert_batch, "GPU_ROWS", rows)
        monkeypatch.setattr(expert_batch, "experts_at_once", lambda *_, count=experts: count)
        np.testing.assert_array_equal(grouped(x, bank), result)


def test_runs_keep_to_their_bounds():
    runs = list(expert_batch._runs([3, 3, 3, 9, 1, 1, 1, 1], 3, 6))
    assert runs == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert list(expert_batch._runs([], 3, 6)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_a_gpu_computes_what_the_kernel_for_single_tokens_does(dtype: mx.Dtype):
    bank, dense = oracle.make_bank(HIDDEN, WIDTH, EXPERTS, [4] * 3, [32] * 3)
    x = tokens(dtype)
    expected = oracle.expert_ffn_oracle(x, dense, mx.array(IDS))
    oracle.assert_close("grouped", expected, mx.array(grouped(x, bank)), 2e-3 if dtype == mx.float32 else 1e-2)
