"""The implementation that a dispatcher runs."""

from importlib import import_module
from math import prod

import mlx.core as mx
import pytest

from flash_moe_mlx.ops.backend import backend, use_kernels
from flash_moe_mlx.ops.dequant_matvec import dequant_matvec
from flash_moe_mlx.ops.expert_ffn import expert_ffn
from flash_moe_mlx.ops.expert_ffn_combine import expert_ffn_combine
from flash_moe_mlx.ops.gated_delta import gated_delta
from flash_moe_mlx.ops.gated_delta_step import Columns, gated_delta_conv_step
from flash_moe_mlx.ops.gpu import kernel_source
from flash_moe_mlx.ops.moe_combine import moe_combine
from flash_moe_mlx.ops.norm import Norm
from flash_moe_mlx.ops.norm_matvec import Matrix, matvec_residual, norm_matvec
from flash_moe_mlx.ops.qk_norm_rope import Heads, qk_norm_rope, rotation
from flash_moe_mlx.ops.router_topk import router_topk

from .oracle import make_bank


@pytest.fixture
def gpu_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend that there is a GPU; returns the names of the kernels that were launched."""
    names: list[str] = []

    def launch(kernel, inputs, outputs, grid):
        names.append(kernel.name)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(kernel_source, "launch", launch)
    monkeypatch.setattr(import_module("flash_moe_mlx.ops.backend"), "backend", lambda: "metal")
    return names


def run_all() -> None:
    bank, _ = make_bank(64, 64, 2, (4, 4, 4), (64, 64, 64))
    slots = mx.zeros((1, 2), mx.uint32)
    expert_ffn_combine(mx.zeros((1, 64)), bank, slots, mx.zeros((1, 2)), None, None, None)
    y = expert_ffn(mx.zeros((1, 64)), bank, slots)
    moe_combine(y, mx.zeros((1, 2)), None, None, None)
    packed = mx.quantize(mx.zeros((8, 64)), group_size=64, bits=4)
    dequant_matvec(mx.zeros((1, 64)), *packed, bits=4, group_size=64)
    q, v, a = mx.zeros((1, 2, 1, 32)), mx.zeros((1, 2, 1, 32)), mx.zeros((1, 2, 1))
    one, state = mx.zeros((1,)), mx.zeros((1, 1, 32, 32))
    gated_delta(q, q, v, a, a, one, one, state)
    projected, conv, norm = mx.zeros((1, 130)), mx.zeros((1, 3, 96)), Norm(mx.ones((32,)), 1e-6)
    columns = Columns(0, 32, 32, 64, 96, 32, 128, 129, 1)
    gated_delta_conv_step(projected, columns, conv, mx.zeros((96, 4)), one, one, state, norm)
    matrix = Matrix(*packed, 4, 64)
    x = norm_matvec(mx.zeros((1, 64)), Norm(mx.ones((64,)), 1e-6), matrix)
    matvec_residual(mx.zeros((1, 64)), matrix, x)
    router_topk(x, 8, 2, True)
    qk_norm_rope(mx.zeros((1, 64)), Heads(1, 1, 32, 0, 32, 32), norm, norm, rotation(0, 16, 1e4))


ALL = [
    "expert_gate_up",
    "expert_down_combine",
    "expert_gate_up",
    "expert_down",
    "moe_combine",
    "dequant_matvec",
    "gated_delta",
    "gated_delta_conv_step",
    "norm_matvec",
    "matvec_residual",
    "router_topk",
    "qk_norm_rope",
]


def test_a_gpu_runs_the_kernels(gpu_launches):
    run_all()
    assert gpu_launches == ALL


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_threadgroups_are_small_on_metal(bits: int, monkeypatch: pytest.MonkeyPatch):
    """Metal allows a kernel with many registers fewer threads than 512."""
    monkeypatch.setattr(import_module("flash_moe_mlx.ops.dequant_matvec"), "backend", lambda: "metal")
    make = import_module("flash_moe_mlx.ops.dequant_matvec").matvec_kernel.__wrapped__  # without what is remembered
    kernel, _ = make(mx.bfloat16, mx.bfloat16, 4096, 4096, 1, bits, 64)
    assert prod(kernel.threadgroup) <= 256


def test_the_switch_runs_the_references(gpu_launches, monkeypatch):
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")
    run_all()
    assert gpu_launches == []
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "0")
    run_all()
    assert gpu_launches == ALL


def test_the_cpu_launches_nothing(monkeypatch):
    monkeypatch.setattr(kernel_source, "launch", None)
    with mx.stream(mx.cpu):
        run_all()


def test_what_the_kernels_do_not_know_runs_the_reference(gpu_launches):
    bank, _ = make_bank(64, 64, 2, (4, 4, 0), (64, 64, 0))
    expert_ffn(mx.zeros((1, 64)), bank, mx.zeros((1, 2), mx.uint32))
    q, a, one = mx.zeros((1, 1, 1, 24)), mx.zeros((1, 1, 1)), mx.zeros((1,))
    gated_delta(q, q, q, a, a, one, one, None)
    moe_combine(mx.zeros((1, 2, 6)), mx.zeros((1, 2)), None, None, None)
    assert gpu_launches == []


def test_many_rows_are_a_matrix_product(gpu_launches):
    packed = mx.quantize(mx.random.normal((8, 64)), group_size=64, bits=4)
    y = dequant_matvec(mx.random.normal((9, 64)), *packed, bits=4, group_size=64)
    assert y.shape == (9, 8)
    assert gpu_launches == []


def test_backend_names_the_default_device():
    with mx.stream(mx.cpu):
        assert backend() == "cpu"
        assert not use_kernels()
    if mx.metal.is_available() or (hasattr(mx, "cuda") and mx.cuda.is_available()):
        with mx.stream(mx.gpu):
            assert backend() in ("metal", "cuda")
            assert use_kernels()


@pytest.mark.gpu
def test_dispatchers_run_on_the_gpu():
    with mx.stream(mx.gpu):
        run_all()
        mx.synchronize()
