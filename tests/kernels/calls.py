"""One call of every kernel through its wrapper, at a small but complete configuration."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.dequant_matvec import dequant_matvec_kernel
from flash_moe_mlx.ops.dequantize import dense_experts
from flash_moe_mlx.ops.expert_ffn import expert_ffn_kernel
from flash_moe_mlx.ops.expert_ffn_combine import expert_ffn_combine_kernel
from flash_moe_mlx.ops.fetch_records import NOT_IN_SLOT, fetch_records_kernel, halves_of, host_records
from flash_moe_mlx.ops.gated_delta import gated_delta_kernel
from flash_moe_mlx.ops.gated_delta_step import Columns, gated_delta_conv_step_kernel
from flash_moe_mlx.ops.gpu import kernel_source
from flash_moe_mlx.ops.moe_combine import moe_combine_kernel
from flash_moe_mlx.ops.norm import Norm
from flash_moe_mlx.ops.norm_matvec import Gate, Matrix, matvec_residual_kernel, norm_matvec_kernel
from flash_moe_mlx.ops.qk_norm_rope import Heads, qk_norm_rope_kernel, rotation
from flash_moe_mlx.ops.router_topk import router_topk_kernel

from ..ops.oracle import make_bank

BF16 = mx.bfloat16
HIDDEN, WIDTH, K = 384, 256, 3


def norm(size: int, dtype: mx.Dtype = BF16) -> Norm:
    return Norm(mx.random.normal((size,)).astype(dtype), 1e-6)


def experts() -> mx.array:
    bank, _ = make_bank(HIDDEN, WIDTH, 4, (4, 4, 4), (64, 64, 64))
    return expert_ffn_kernel(mx.random.normal((1, HIDDEN)).astype(BF16), bank, mx.array([[2, 0, 2]], mx.uint32))


def layer() -> mx.array:
    bank, _ = make_bank(HIDDEN, WIDTH, 4, (4, 4, 4), (64, 64, 64))
    shared, _ = make_bank(HIDDEN, WIDTH, 1, (4, 4, 4), (64, 64, 64))
    x, residual = (mx.random.normal((2, HIDDEN)).astype(BF16) for _ in range(2))
    slots, weights = mx.array([[2, 0, 2], [1, 3, 0]], mx.uint32), mx.random.uniform(shape=(2, K))
    gate = mx.random.normal((2, 5))
    return expert_ffn_combine_kernel(x, bank, slots, weights, shared, gate, residual, norm(HIDDEN))


def matvec() -> mx.array:
    packed, scales, biases = mx.quantize(mx.random.normal((40, HIDDEN)).astype(BF16), group_size=64, bits=4)
    return dequant_matvec_kernel(mx.random.normal((2, HIDDEN)), packed, scales, biases, bits=4, group_size=64)


def combine() -> mx.array:
    shared, residual = (mx.random.normal((2, HIDDEN)).astype(BF16) for _ in range(2))
    y, weights, gate = mx.random.normal((2, K, HIDDEN)), mx.random.uniform(shape=(2, K)), mx.random.normal((2, 1))
    return moe_combine_kernel(y, weights, shared, gate.astype(BF16), residual)


def delta() -> mx.array:
    shapes = [(2, 32), (2, 32), (4, 40), (4,), (4,)]
    arrays = [mx.random.normal((2, 19, *shape)).astype(BF16) for shape in shapes]
    mask = mx.arange(19)[None] >= mx.array([[0], [3]])
    return gated_delta_kernel(*arrays, mx.zeros((4,)), mx.ones((4,)), mx.random.normal((2, 4, 40, 32)), mask)[1]


def delta_conv() -> mx.array:
    channels = 2 * 2 * 32 + 4 * 40
    columns = Columns(0, 64, 32, 128, channels, 80, channels + 160, channels + 164, 2)
    projected, conv_state, weight = (mx.random.normal(shape).astype(BF16) for shape in
                                     ((2, channels + 168), (2, 3, channels), (channels, 4)))  # fmt: skip
    state = mx.random.normal((2, 4, 40, 32))
    return gated_delta_conv_step_kernel(
        projected, columns, conv_state, weight, mx.zeros((4,)), mx.ones((4,)), state, norm(40)
    )[2]  # fmt: skip


def matrix(outputs: int) -> Matrix:
    packed = mx.quantize(mx.random.normal((outputs, HIDDEN)).astype(BF16), group_size=64, bits=4)
    return Matrix(*packed, 4, 64)


def joined() -> mx.array:
    return norm_matvec_kernel(mx.random.normal((2, HIDDEN)).astype(BF16), norm(HIDDEN), matrix(40), mx.float32)


def output_projection() -> mx.array:
    x, gates, residual = (mx.random.normal((2, size)).astype(BF16) for size in (HIDDEN, 2 * HIDDEN + 64, 40))
    return matvec_residual_kernel(x, matrix(40), residual, Gate(gates, 64, 64, 128))


def router() -> mx.array:
    return router_topk_kernel(mx.random.normal((2, 41)), 40, K, True, mx.arange(40)[::-1].astype(mx.uint32))[1]


def rope() -> mx.array:
    heads = Heads(4, 2, 64, 0, 128, 512)
    turns = mx.concatenate([rotation(7, 16, 1e4), rotation(8, 16, 1e4)])
    return qk_norm_rope_kernel(mx.random.normal((2, 768)).astype(BF16), heads, norm(64), norm(64), turns)[0]


def dequantized() -> mx.array:
    bank, _ = make_bank(HIDDEN, WIDTH, 4, (4, 4, 4), (64, 64, 64))
    return dense_experts(bank, "up_proj", mx.array([2, 0], mx.uint32), BF16)


FETCHED = np.random.default_rng(4).integers(0, 2**32, 200).astype(np.uint32), np.zeros(4 * 40, np.uint32)


def fetched() -> mx.array:
    memory, slots = FETCHED
    addresses = memory.ctypes.data + np.array([[3, 200], [77, 401]], np.uint64)
    records = host_records(addresses, [0, 64], 160, 160)
    assert records is not None
    table = mx.array([NOT_IN_SLOT, NOT_IN_SLOT, 1, 2, 3, 0, 1, 2], mx.uint32)
    ids, landing = mx.array([[1, 5]], mx.uint32), mx.array([2, 3], mx.uint32)
    return fetch_records_kernel(ids, table, landing, halves_of(slots.ctypes.data), records, mx.zeros((1,)))


CALLS: dict[str, Callable[[], mx.array]] = {
    "dequantize": dequantized,
    "fetch_records": fetched,
    "expert_gate_up": layer,
    "expert_down": experts,
    "expert_down_combine": layer,
    "dequant_matvec": matvec,
    "moe_combine": combine,
    "gated_delta": delta,
    "gated_delta_conv_step": delta_conv,
    "norm_matvec": joined,
    "matvec_residual": output_projection,
    "router_topk": router,
    "qk_norm_rope": rope,
}
"""A wrapper's call for each kernel file."""


def record(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Any, ...]:
    """Return the arguments that the wrapper passes to ``kernel_source.launch`` for one kernel."""
    launches: dict[str, tuple[Any, ...]] = {}

    def launch(kernel: kernel_source.Kernel, inputs: Any, outputs: Any, grid: Any) -> list[mx.array]:
        launches[kernel.name] = (kernel, inputs, outputs, grid)
        return [mx.random.normal(shape).astype(dtype) for shape, dtype in outputs]

    mx.random.seed(0)
    monkeypatch.setattr(kernel_source, "launch", launch)
    CALLS[name]()
    monkeypatch.undo()
    return launches[name]
