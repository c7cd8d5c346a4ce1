"""Kernels mean the same in every process, whatever it compiled or loaded before."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher

import flash_moe_mlx.ops.cpu
from flash_moe_mlx.ops.cpu.kernels import Format, matvec_kernel, tiles_kernel
from flash_moe_mlx.ops.cpu.product_tasks import down, gate_up, matrix
from flash_moe_mlx.ops.cpu.vector_ir import BF16

FORMAT = Format(4, 64, BF16)


def kernels() -> Iterator[Any]:
    """All that modules name, and those that are made for a format."""
    for module in pkgutil.iter_modules(flash_moe_mlx.ops.cpu.__path__):
        names = vars(importlib.import_module(f"{flash_moe_mlx.ops.cpu.__name__}.{module.name}"))
        yield from (value for value in names.values() if isinstance(value, Dispatcher | CFunc))
    for make in (matvec_kernel, tiles_kernel, matrix, gate_up, down):
        yield make(FORMAT)


def function_of(kernel: Any) -> Any:
    return kernel.py_func if isinstance(kernel, Dispatcher) else kernel._pyfunc


def test_functions_that_kernels_call_are_inlined():
    """Of copies that several kernels brought, each optimised differently, the linker took the first loaded."""
    called = {
        function_of(kernel).__globals__[name]
        for kernel in kernels()
        for name in function_of(kernel).__code__.co_names
        if isinstance(function_of(kernel).__globals__.get(name), Dispatcher)
    }
    assert len(called) > 10
    for kernel in called:
        assert kernel.targetoptions["forceinline"], function_of(kernel).__name__
