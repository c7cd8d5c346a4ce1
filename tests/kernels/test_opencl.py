"""The OpenCL bench itself: it is there where it must be, and it runs what it says."""

import os
import platform
import sys

import mlx.core as mx
import numpy as np
import pytest

from . import opencl
from .calls import CALLS, record

IN_CI = os.environ.get("CI") == "true" and sys.platform == "linux" and platform.machine() == "x86_64"


@pytest.mark.skipif(not IN_CI, reason="only CI must have the OpenCL CPU runtime")
def test_ci_has_the_runtime():
    """Without it every proof of the kernels would be skipped in silence."""
    assert opencl.opencl() is not None


@pytest.mark.skipif(opencl.opencl() is None, reason="needs the OpenCL CPU runtime of the dev extra")
def test_simd_groups_have_32_lanes_and_other_numbers_in_other_orders(monkeypatch: pytest.MonkeyPatch):
    kernel, inputs, outputs, grid = record(monkeypatch, "dequant_matvec")
    outputs = [((grid[1] * grid[0],), mx.uint32)]
    body = (
        "const uint group = threadgroup_position_in_grid.y * SIMD_GROUPS + simdgroup_index_in_threadgroup;\n"
        "y[get_global_linear_id()] = group * 100 + thread_index_in_simdgroup;\n"
    )
    seen = {
        order: np.array(
            opencl.launch(kernel, inputs, outputs, grid, order=order, edit=lambda helpers, _: (helpers, body))
        )
        for order in opencl.SIMD_ORDERS
    }
    first = np.array([group * 100 + lane for group in range(kernel.threadgroup[1]) for lane in range(32)])
    for order, numbers in seen.items():
        assert sorted(numbers[0][: first.size]) == sorted(first), order
    assert (seen["ascending"][0][: first.size] == first).all()
    assert len({tuple(numbers[0]) for numbers in seen.values()}) == len(opencl.SIMD_ORDERS)


@pytest.mark.skipif(opencl.opencl() is None, reason="needs the OpenCL CPU runtime of the dev extra")
@pytest.mark.parametrize("name", CALLS)
def test_the_body_is_the_files(name: str, monkeypatch: pytest.MonkeyPatch):
    """The text that runs contains the body that MLX gets, character for character."""
    kernel, inputs, outputs, _ = record(monkeypatch, name)
    text = opencl.source(kernel, inputs, outputs)
    assert opencl.kernel_source.generate(name, "metal")[1] in text
