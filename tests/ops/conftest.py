"""Backends of kernels in tests: the CPU through OpenCL, in every order of SIMD groups, or on a real GPU."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.gpu import kernel_source

from ..kernels import opencl

NAN = float("nan")


def launch_in_every_order(*arguments: Any) -> list[mx.array]:
    """Run a kernel with its SIMD groups in each order; all must give the same bits."""
    orders = {order: opencl.launch(*arguments, order=order) for order in opencl.SIMD_ORDERS}
    first = orders["ascending"]
    for order, results in orders.items():
        for result, expected in zip(results, first, strict=True):
            same = np.array_equal(opencl.to_numpy(result), opencl.to_numpy(expected), equal_nan=True)
            assert same, f"{arguments[0].name}: SIMD groups in {order} order must give the bits of ascending order"
    return first


@contextmanager
def on_gpu(launch: Callable[..., list[mx.array]]):
    """Outputs hold NaN before the kernel runs."""
    kernel_source.launch = lambda *arguments: launch(*arguments, init_value=NAN)
    try:
        yield
    finally:
        kernel_source.launch = launch


@pytest.fixture(params=["opencl", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(_cpu_and_seed, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Makes the ``*_kernel`` functions run somewhere, their outputs poisoned with NaN."""
    if request.param == "opencl":
        if opencl.opencl() is None:
            pytest.skip("needs the OpenCL CPU runtime of the dev extra (Linux x86-64)")
        monkeypatch.setattr(kernel_source, "launch", launch_in_every_order)
        yield
    else:
        with on_gpu(kernel_source.launch), mx.stream(mx.gpu):
            yield


@pytest.fixture(autouse=True)
def _cpu_and_seed():
    """The references and the inputs' making run on the CPU everywhere; ``kernels`` moves to the GPU itself."""
    with mx.stream(mx.cpu):
        mx.random.seed(0)
        yield
