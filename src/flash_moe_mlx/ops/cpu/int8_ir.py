"""Products of 4-bit weights with x in 8 bits: integer sums per group, as in llama.cpp. Lossy, therefore opt-in."""

from collections.abc import Callable

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

from .jit import serial
from .vector_ir import LANES, Emitter, Step, make_group_dots

INT8_STEP = 128
"""Weights per step of a row: 64 bytes."""

_I32, _F32 = ir.IntType(32), ir.FloatType()
_VI32, _VF32 = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_NIBBLES = 0x0F0F0F0F


def _constant(value: int) -> ir.Value:
    return ir.Constant(_VI32, [value] * LANES)


def _add_products(emit: Emitter, total: ir.Value, weights: ir.Value, x: ir.Value, vnni: bool) -> ir.Value:
    """Add to each lane of ``total`` the sum of its four unsigned bytes times four signed ones."""
    builder = emit.builder
    if vnni:
        type_ = ir.FunctionType(_VI32, [_VI32] * 3)
        function = cgutils.get_or_insert_function(builder.module, type_, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(function, [total, weights, x])
    for byte in range(4):
        unsigned = builder.and_(builder.lshr(weights, _constant(8 * byte)), _constant(0xFF))
        signed = builder.ashr(builder.shl(x, _constant(24 - 8 * byte)), _constant(24))
        total = builder.add(total, builder.mul(unsigned, signed))
    return total


def make_int8_dots(group_size: int, kind: int, rows: int, *, vnni: bool | None = None) -> Callable[..., None]:
    """Build the ``dots`` of ``make_quantized_dots`` for 4-bit weights, with x and sums from ``round_to_int8``.

    Integer sums are exact, so bits do not depend on whether the processor has an instruction for them.

    Args:
        group_size: Number of weights that share a scale and a bias.
        kind: Floating-point format of scales and biases.
        rows: Number of rows multiplied at once.
        vnni: Whether to use AVX-512 VNNI; None asks the processor.
    """
    taken = INT8_STEP // group_size
    has_vnni = binding.get_host_cpu_features().get("avx512vnni", False) if vnni is None else vnni

    def products_of(emit: Emitter, step: Step) -> tuple[list[ir.Value], ir.Value, ir.Value]:
        builder = emit.builder
        base = emit.offset(step.x, emit.scaled(step.index, INT8_STEP))
        even, odd = emit.load(_VI32, base), emit.load(_VI32, emit.offset(base, INT8_STEP // 2))
        group = emit.scaled(step.index, taken)
        x_scales = emit.offset(step.sums, emit.scaled(step.groups, 4), emit.scaled(group, 4))
        products = []
        for start in step.rows:
            stored = emit.load(_VI32, emit.offset(start, emit.scaled(step.index, INT8_STEP // 2)))
            low = builder.and_(stored, _constant(_NIBBLES))
            high = builder.and_(builder.lshr(stored, _constant(4)), _constant(_NIBBLES))
            total = _add_products(emit, _constant(0), low, even, has_vnni)
            products.append(builder.sitofp(_add_products(emit, total, high, odd, has_vnni), _VF32))
        return products, group, emit.load(ir.VectorType(_F32, taken), x_scales)

    return make_group_dots(products_of, taken, kind, rows)


@serial
def round_to_int8(x, group_size, rounded, sums):  # type: ignore[no-untyped-def]
    """Round a row of x to 8 bits, with one scale per group.

    Args:
        x: Row of x. Shape (inputs,), float32; inputs is a multiple of INT8_STEP.
        group_size: Number of values that share a scale.
        rounded: Result, shape (inputs,), int8. Of each INT8_STEP values, first those that are multiplied with the low
            halves of the weights' bytes, then those for the high halves.
        sums: Result, shape (2, groups), float32: sum of the rounded x of each group, and its scale.
    """
    for group in range(len(x) // group_size):
        first = group * group_size
        largest = poison = np.float32(0.0)
        for i in range(first, first + group_size):
            largest = max(largest, abs(x[i]))
            poison += x[i] * np.float32(0.0)
        scale = largest / np.float32(127.0) + poison  # NaN if a value is NaN or infinite, which the maximum ignores
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
        total = 0
        for i in range(first, first + group_size):
            value = int(np.floor(x[i] * inverse + np.float32(0.5)))
            total += value
            place = i % INT8_STEP
            rounded[i - place + place % 2 * (INT8_STEP // 2) + place // 2] = value
        sums[0, group], sums[1, group] = scale * np.float32(total), scale
