"""Runs a Metal kernel body, unmodified, on the CPU: compiled as C++ for OpenCL, with SIMD groups of 32.

``launch`` takes the arguments of ``kernel_source.launch``, so a test that puts it in its place runs the
real wrapper, with its real grid and constants, on the real body. Needs the Intel OpenCL CPU runtime
(PyPI: pyopencl intel-opencl-rt intel-cmplr-lib-rt tbb), which also runs on AMD processors.
"""

import atexit
import ctypes
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe_mlx.ops.gpu import kernel_source
from flash_moe_mlx.ops.gpu.kernel_source import Kernel

HERE = Path(__file__).resolve().parent
C_TYPES = {
    mx.float32: "float", mx.bfloat16: "bfloat16_t", mx.float16: "float16_t", mx.uint32: "uint32_t",
    mx.int32: "int32_t", mx.bool_: "uchar", mx.uint8: "uchar",
}  # fmt: skip
GUARD_BYTES = 65536
"""Bytes behind each array: of an output, those a kernel must leave alone; of an input, NaN that it must not read."""

MAX_CONSTANT_ELEMENTS = 8
"""MLX passes inputs of fewer elements in Metal's constant address space."""

SIMD_ORDERS = {"ascending": 0, "descending": 1, "rotated": 2}
"""How the SIMD groups are numbered; the runtime executes them in its own fixed order."""

POSITIONS = {"threadgroup_position_in_grid": "get_group_id", "thread_position_in_grid": "get_global_id"}
OPTIONS = ["-cl-std=CLC++2021", "-cl-opt-disable", "-cl-fp32-correctly-rounded-divide-sqrt"]


class BuildError(Exception):
    """The compiler refused a body."""


@cache
def opencl() -> Any:
    """Import pyopencl with the Intel CPU runtime of this environment; None where it is not installed.

    The runtime's libraries lie in the environment's lib folder, which the loader does not search. They are
    loaded here by path first, so that no LD_LIBRARY_PATH has to be set before Python starts.
    """
    folder = Path(sys.prefix) / "lib"
    runtime = folder / "libintelocl.so"
    if not runtime.exists():
        return None
    for pattern in ("libtbb.so.12", "libtbbmalloc.so.2", "libimf.so", "libintlc.so.5", "libirng.so", "libsvml.so"):
        if (folder / pattern).exists():
            ctypes.CDLL(str(folder / pattern), mode=ctypes.RTLD_GLOBAL)
    vendors = tempfile.mkdtemp(prefix="opencl-vendors-")
    atexit.register(shutil.rmtree, vendors, ignore_errors=True)
    (Path(vendors) / "intel-cpu.icd").write_text(f"{runtime}\n")
    os.environ["OCL_ICD_VENDORS"] = vendors
    try:
        import pyopencl
    except ImportError:
        return None
    return pyopencl


@cache
def context() -> Any:
    """A context of the CPU device."""
    cl = opencl()
    platform = next(p for p in cl.get_platforms() if "Intel" in p.name)
    return cl.Context(platform.get_devices())


@cache
def queue() -> Any:
    """A command queue of the CPU device."""
    return opencl().CommandQueue(context())


def to_numpy(array: mx.array) -> np.ndarray:
    """Bytes of an array, with bfloat16 as uint16."""
    array = mx.contiguous(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, order="C")


def from_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    made = mx.array(array)
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made


def numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    return to_numpy(mx.zeros((1,), dtype)).dtype


def source(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    edit: Any = None,
) -> str:
    """Complete OpenCL source of a kernel, with the signature that MLX would give it on Metal."""
    text = kernel_source.read_kernel(kernel.name)
    helpers, body = text.helpers, text.body
    if edit is not None:
        helpers, body = edit(helpers, body)
    arguments = []
    for argument, array in zip(text.inputs, inputs, strict=True):
        space = "constant" if array.size < MAX_CONSTANT_ELEMENTS else "device"
        arguments.append(f"const {space} {C_TYPES[array.dtype]}* {argument}")
        if f"{argument}_shape" in body:
            arguments.append(f"const constant int* {argument}_shape")
    for argument, (_, dtype) in zip(text.outputs, outputs, strict=True):
        arguments.append(f"device {C_TYPES[dtype]}* {argument}")
    arguments.append("uint simd_order")
    positions = "".join(
        f"fm_uint3 {attribute} = {{(uint){call}(0), (uint){call}(1), (uint){call}(2)}};\n"
        for attribute, call in POSITIONS.items()
    )
    dialect = (HERE / "dialect_opencl.h").read_text()
    return (
        f"{dialect}{helpers}"
        f"__attribute__((intel_reqd_sub_group_size(32))) kernel void {kernel.name}({', '.join(arguments)}) {{\n"
        f"{positions}{kernel_source.declare(kernel.constants)}{body}}}\n"
    )


@cache
def build(text: str) -> Any:
    """Compile a complete source.

    Raises:
        BuildError: With the compiler's messages.
    """
    cl = opencl()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pyopencl warns whenever the compiler prints that it is done
            return cl.Program(context(), text).build(options=OPTIONS)
    except cl.RuntimeError as error:
        raise BuildError(str(error)) from error


def launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
    *,
    order: str = "ascending",
    edit: Any = None,
) -> list[mx.array]:
    """Run a kernel. Outputs are NaN before, and NaN lies behind the inputs: a mutant may read it.

    Args:
        kernel: Kernel; this and the next three are arguments of ``kernel_source.launch``.
        inputs: Arrays in the order of the signature.
        outputs: (shape, dtype) of each output.
        grid: Threads in all.
        order: Which of SIMD_ORDERS numbers the SIMD groups.
        edit: Makes a mutant: (helpers, body) -> (helpers, body).

    Raises:
        BuildError: If the body does not compile.
    """
    cl = opencl()
    text = source(kernel, inputs, outputs, edit)
    program = build(text)
    make = cl.mem_flags.COPY_HOST_PTR
    arguments = []
    for argument, array in zip(kernel_source.read_kernel(kernel.name).inputs, inputs, strict=True):
        held = np.concatenate([to_numpy(array).reshape(-1).view(np.uint8), np.full(GUARD_BYTES, 0xFF, np.uint8)])
        arguments.append(cl.Buffer(context(), make, hostbuf=held))
        if f"int* {argument}_shape" in text:
            arguments.append(cl.Buffer(context(), make, hostbuf=np.array(array.shape, np.int32)))
    results = []
    for shape, dtype in outputs:
        poison = np.full(prod(shape) * dtype.size + GUARD_BYTES, 0xFF, np.uint8)
        results.append((poison, shape, dtype))
        arguments.append(cl.Buffer(context(), make, hostbuf=poison))
    rounded = tuple(-(-size // block) * block for size, block in zip(grid, kernel.threadgroup, strict=True))
    function = cl.Kernel(program, kernel.name)
    function(queue(), rounded, kernel.threadgroup, *arguments, np.uint32(SIMD_ORDERS[order]))
    arrays = []
    for (result, shape, dtype), buffer in zip(results, arguments[-len(results) :], strict=True):
        cl.enqueue_copy(queue(), result, buffer)
        queue().finish()
        assert (result[-GUARD_BYTES:] == 0xFF).all(), f"{kernel.name}: wrote past the end of an output"
        arrays.append(from_numpy(result[:-GUARD_BYTES].view(numpy_dtype(dtype)).reshape(shape), dtype))
    return arrays
