"""The CUDA source that mx.fast.cuda_kernel builds from a kernel file, written out without a GPU.

MLX makes it inside a call that needs a CUDA device. This is the same text, in front of which nvcc gets
the few declarations that the bodies use instead of MLX's own headers.
"""

from collections.abc import Sequence

import mlx.core as mx

from flash_moe_mlx.ops.gpu import kernel_source
from flash_moe_mlx.ops.gpu.kernel_source import Kernel

C_TYPES = {
    mx.float32: "float", mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.uint32: "uint32_t",
    mx.int32: "int32_t", mx.bool_: "bool", mx.uint8: "uint8_t",
}  # fmt: skip

STANDALONE = """
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace mlx::core::cu {
struct Shape {
  int32_t sizes[10];
  __device__ int32_t operator[](int axis) const { return sizes[axis]; }
};
}
"""
"""Stands in for mlx/backend/cuda/device/utils.cuh."""


def cuda_source(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    prelude: str = STANDALONE,
) -> str:
    """Complete source of one kernel.

    Args:
        kernel: Kernel; this and the next two are arguments of ``kernel_source.launch``.
        inputs: Arrays in the order of the signature.
        outputs: (shape, dtype) of each output.
        prelude: What comes before the dialect.
    """
    text = kernel_source.read_kernel(kernel.name)
    header, body = kernel_source.generate(kernel.name, "cuda")
    arguments = []
    for argument, array in zip(text.inputs, inputs, strict=True):
        arguments.append(f"const {C_TYPES[array.dtype]}* {argument}")
        if f"{argument}_shape" in body:
            arguments.append(f"const __grid_constant__ Shape {argument}_shape")
    for argument, (_, dtype) in zip(text.outputs, outputs, strict=True):
        arguments.append(f"{C_TYPES[dtype]}* {argument}")
    return (
        f"{prelude}{header}namespace mlx::core::cu {{\n__global__ void {kernel.name}({', '.join(arguments)}) {{\n"
        f"{kernel_source.declare(kernel.constants)}{body}}}\n}}\n"
    )
