"""The check of every kernel, with the kernels on the CPU through OpenCL, and what it says where one fails."""

from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe_mlx.lab.kernel_check import KernelCheck, check_kernels
from flash_moe_mlx.ops.backend import backend, references, use_reference
from flash_moe_mlx.ops.gpu import kernel_source

from ..kernels import opencl

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU, as far as the dispatchers can tell; returns the names of the kernels that were launched."""
    names: list[str] = []

    def launch(kernel, *arguments):
        names.append(kernel.name)
        return opencl.launch(kernel, *arguments)

    monkeypatch.delenv("FLASH_MOE_REFERENCE", raising=False)
    monkeypatch.setattr(kernel_source, "launch", launch)
    monkeypatch.setattr(import_module("flash_moe_mlx.ops.backend"), "backend", lambda: "metal")
    return names


@pytest.mark.skipif(opencl.opencl() is None, reason="needs the OpenCL CPU runtime of the dev extra (Linux x86-64)")
def test_every_kernel_is_checked_and_right(gpu: list[str]):
    checks = list(check_kernels())
    assert [check for check in checks if not check.ok] == []
    assert set(gpu) == {path.stem for path in KERNELS.glob("*.metal")} - {"fetch_records"}
    assert all(str(check).startswith("ok") for check in checks)


MESSAGE = "[metal::Device] Unable to build metal library from source\nprogram_source:12:3: error: unknown type"


def test_a_compilers_message_is_told_and_the_others_still_run(gpu: list[str], monkeypatch: pytest.MonkeyPatch):
    def launch(kernel, inputs, outputs, grid):
        if kernel.name == "router_topk":
            raise RuntimeError(MESSAGE)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(kernel_source, "launch", launch)
    checks = {check.name: check for check in check_kernels()}
    broken = checks["router_topk"]
    assert not broken.ok and broken.error == MESSAGE
    assert "program_source:12:3" in str(broken) and "FLASH_MOE_REFERENCE=1" in str(broken)
    wrong = checks["moe_combine"]
    assert not wrong.ok and wrong.error is None and "wrong by 1.0e+00" in str(wrong)


def test_the_cpus_own_kernels_are_checked_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FLASH_MOE_REFERENCE", raising=False)
    checks = list(check_kernels())
    assert len(checks) == len({check.name for check in checks}) >= 12
    assert all(check.ok for check in checks)


def test_references_are_forced_for_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FLASH_MOE_REFERENCE", raising=False)
    assert not use_reference()
    with references(), references():
        assert use_reference()
    assert not use_reference()
    assert backend() in ("cpu", "metal")


def test_a_difference_decides():
    assert KernelCheck("a", 1e-3, 0.1).ok
    assert not KernelCheck("a", 0.5, 0.1).ok
    assert not KernelCheck("a", float("nan"), 0.1).ok
