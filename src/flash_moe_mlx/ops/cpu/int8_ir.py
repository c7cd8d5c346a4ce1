"""Products of 4-bit weights with x in 8 bits: integer sums a group, as llama.cpp's. Lossy, and asked for by name."""

from collections.abc import Callable

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import serial
from .vector_ir import F32, FLOAT_BYTES, LANES, Emitter, signature_of

INT8_STEP = 128
"""Weights of a row that a step takes: 64 bytes."""

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_VI32, _VF32 = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_NIBBLES = 0x0F0F0F0F


def _constant(value: int) -> ir.Value:
    return ir.Constant(_VI32, [value] * LANES)


def _add_products(emit: Emitter, total: ir.Value, weights: ir.Value, x: ir.Value, vnni: bool) -> ir.Value:
    """``total`` plus, a lane, the sum of its four unsigned bytes times four signed ones."""
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
    """Build ``dots`` as of ``make_quantized_dots`` for 4 bits, x and sums from ``round_to_int8``.

    Integer sums are exact, so bits do not depend on whether the processor has instructions for them (``vnni``; None
    asks it).
    """
    taken = INT8_STEP // group_size
    word, size = (_I32 if kind == F32 else _I16), FLOAT_BYTES[kind]
    has_vnni = binding.get_host_cpu_features().get("avx512vnni", False) if vnni is None else vnni

    @intrinsic
    def int8_dots(typing_context, weights, row_bytes, x, scales, biases, sums, groups, steps, out, apart):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            weights, row_bytes, x, scales, biases, sums, groups, steps, out, apart = arguments
            zero = ir.Constant(_VF32, [0.0] * LANES)
            totals = [emit.variable(zero) for _ in range(rows)]
            starts = [builder.add(weights, emit.scaled(builder.mul(row_bytes, apart), row)) for row in range(rows)]
            row_groups = [emit.scaled(builder.mul(groups, apart), size * row) for row in range(rows)]
            x_scales = emit.offset(sums, emit.scaled(groups, 4))
            with cgutils.for_range(builder, steps) as loop:
                base = emit.offset(x, emit.scaled(loop.index, INT8_STEP))
                even, odd = emit.load(_VI32, base), emit.load(_VI32, emit.offset(base, INT8_STEP // 2))
                group = emit.scaled(loop.index, taken)
                of_x = emit.load(ir.VectorType(_F32, taken), emit.offset(x_scales, emit.scaled(group, 4)))
                for row in range(rows):
                    stored = emit.load(_VI32, emit.offset(starts[row], emit.scaled(loop.index, INT8_STEP // 2)))
                    low = builder.and_(stored, _constant(_NIBBLES))
                    high = builder.and_(builder.lshr(stored, _constant(4)), _constant(_NIBBLES))
                    total = _add_products(emit, _constant(0), low, even, has_vnni)
                    total = _add_products(emit, total, high, odd, has_vnni)
                    at = emit.offset(scales, row_groups[row], emit.scaled(group, size))
                    few = builder.fmul(emit.floats(emit.load(ir.VectorType(word, taken), at), kind), of_x)
                    scale = emit.shuffle(few, [lane * taken // LANES for lane in range(LANES)])
                    product = emit.fma(builder.sitofp(total, _VF32), scale, builder.load(totals[row]))
                    builder.store(product, totals[row])
            emit.add_biases(totals, [emit.offset(biases, offset) for offset in row_groups], sums, groups, kind)
            for row in range(rows):
                emit.store(emit.sum(builder.load(totals[row])), emit.offset(out, emit.scaled(apart, 4 * row)))
            return context.get_dummy_value()

        return signature_of(10, types.void), generate

    return int8_dots


@serial
def round_to_int8(x, group_size, rounded, sums):  # type: ignore[no-untyped-def]
    """Round a row of x to 8 bits a group.

    Args:
        x: Shape (inputs,), float32, a multiple of INT8_STEP.
        group_size: Values that share a scale.
        rounded: Result, shape (inputs,), int8. Of each INT8_STEP values those that meet the low halves of the weights'
            bytes, in order, then those that meet the high halves.
        sums: Result, shape (2, groups), float32: sum of the rounded x of each group, and its scale.
    """
    for group in range(len(x) // group_size):
        first = group * group_size
        largest = np.float32(0.0)
        for i in range(first, first + group_size):
            largest = max(largest, abs(x[i]))
        scale = largest / np.float32(127.0)
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
        total = 0
        for i in range(first, first + group_size):
            value = int(np.floor(x[i] * inverse + np.float32(0.5)))
            total += value
            place = i % INT8_STEP
            rounded[i - place + place % 2 * (INT8_STEP // 2) + place // 2] = value
        sums[0, group], sums[1, group] = scale * np.float32(total), scale
