"""Vector code, 16 lanes wide, for matrices whose 4-bit codes index a table of values (E2M1 of mxfp4 and nvfp4).

The table replaces ``q * scale + bias``: one permutation looks up the values of 16 lanes, on processors that have it. A
lane takes eight consecutive weights, as in `vector_ir`. Rows may lie apart, for matrices whose rows alternate.
"""

from collections.abc import Callable, Sequence

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .vector_ir import FLOAT_BYTES, LANES, Emitter, signature_of

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7; those of 8 to 15 are negative."""

CODE_BITS = 4
LANE_CODES = 8
"""Codes per word: consecutive weights of a row that a lane takes."""

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VI8, _VI32, _VF32 = ir.VectorType(_I8, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_HALF_I32, _HALF_F32 = ir.VectorType(_I32, LANES // 2), ir.VectorType(_F32, LANES // 2)


def _constant(value: int) -> ir.Value:
    return ir.Constant(_VI32, [value] * LANES)


def _call(emit: Emitter, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    type_ = ir.FunctionType(result, [argument.type for argument in arguments])
    return emit.builder.call(cgutils.get_or_insert_function(emit.builder.module, type_, name), arguments)


def instructions() -> str:
    """Name the widest permutation of floats that this processor has: "avx512f", "avx2" or ""."""
    features = binding.get_host_cpu_features()
    return next((name for name in ("avx512f", "avx2") if features.get(name, False)), "")


def values(emit: Emitter, words: ir.Value, field: int, how: str) -> ir.Value:
    """Look up one code of each of 16 words, the ``field``-th from the low end, as float32."""
    builder = emit.builder
    shift = CODE_BITS * field
    index = builder.lshr(words, _constant(shift)) if shift else words
    if how == "avx512f":  # permutations use only the low four bits of an index
        table = ir.Constant(_VF32, [*E2M1, *(-value for value in E2M1)])
        return _call(emit, "llvm.x86.avx512.permvar.sf.512", _VF32, [table, index])
    if how == "avx2":
        table = ir.Constant(_HALF_F32, E2M1)
        halves = [emit.shuffle(index, list(range(first, first + LANES // 2))) for first in (0, LANES // 2)]
        found = [_call(emit, "llvm.x86.avx2.permps", _HALF_F32, [table, half]) for half in halves]
        magnitude = builder.bitcast(emit.joined(found), _VI32)
    else:
        code = builder.and_(index, _constant(7))
        exponent, mantissa = builder.lshr(code, _constant(1)), builder.and_(code, _constant(1))
        # Twice the value, an integer: the mantissa, with its leading one where the exponent isn't 0.
        normal = builder.shl(builder.or_(mantissa, _constant(2)), builder.sub(exponent, _constant(1)))
        doubled = builder.select(builder.icmp_unsigned("==", exponent, _constant(0)), mantissa, normal)
        half = ir.Constant(_VF32, [0.5] * LANES)
        magnitude = builder.bitcast(builder.fmul(builder.uitofp(doubled, _VF32), half), _VI32)
    left = 32 - CODE_BITS - shift
    sign = builder.and_(builder.shl(words, _constant(left)) if left else words, _constant(0x80000000))
    return builder.bitcast(builder.or_(magnitude, sign), _VF32)


def _fields(emit: Emitter, vectors: list[ir.Value]) -> list[ir.Value]:
    """Rearrange 128 consecutive values into 8 vectors, the i-th of which holds each lane's i-th value of eight."""
    even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
    groups = [vectors]
    while len(groups) < LANE_CODES:
        # Lists in the order of the bits that are split off so far, the lowest first.
        groups = [
            [emit.pick(a, b, picks) for a, b in zip(group[::2], group[1::2], strict=True)]
            for picks in (even, odd)
            for group in groups
        ]
    return [group[0] for group in groups]


def make_coded_dots(
    group_size: int, kind: int, rows: int, rows_apart: int, how: str | None = None
) -> Callable[..., None]:
    """Build the ``dots`` of ``make_quantized_dots`` for E2M1 codes, without biases and including partial steps.

    Args:
        group_size: Number of weights that share a scale: 16 or 32.
        kind: Floating-point format of the scales: E8M0 or E4M3.
        rows: Number of rows multiplied at once.
        rows_apart: Rows of scales from one row of the matrix to the next.
        how: Instructions to use, as ``instructions`` names them; None asks the processor.
    """
    step_weights = LANES * LANE_CODES
    taken, size = step_weights // group_size, FLOAT_BYTES[kind]
    found = instructions() if how is None else how

    @intrinsic
    def coded_dots(typing_context, weights, row_bytes, x, scales, biases, sums, groups, steps, out, apart):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            weights, row_bytes, x, scales, _, _, groups, steps, out, apart = arguments
            totals = [emit.variable(ir.Constant(_VF32, [0.0] * LANES)) for _ in range(rows)]
            starts = [builder.add(weights, emit.scaled(builder.mul(row_bytes, apart), row)) for row in range(rows)]
            row_scales = [
                builder.add(scales, emit.scaled(builder.mul(groups, apart), size * rows_apart * row))
                for row in range(rows)
            ]

            def add(row: int, words: ir.Value, fields: list[ir.Value], few: ir.Value) -> None:
                product = ir.Constant(_VF32, [0.0] * LANES)
                for field, x_values in enumerate(fields):
                    product = emit.fma(values(emit, words, field, found), x_values, product)
                scale = emit.shuffle(emit.floats(few, kind), [lane * taken // LANES for lane in range(LANES)])
                builder.store(emit.fma(product, scale, builder.load(totals[row])), totals[row])

            with cgutils.for_range(builder, steps) as loop:
                base = emit.offset(x, emit.scaled(loop.index, 4 * step_weights))
                fields = [emit.load(_VF32, emit.offset(base, 4 * LANES * i), align=4) for i in range(LANE_CODES)]
                at = emit.scaled(loop.index, step_weights * CODE_BITS // 8)
                group = emit.scaled(loop.index, taken * size)
                for row in range(rows):
                    few = emit.load(ir.VectorType(_I8, taken), emit.offset(row_scales[row], group))
                    add(row, emit.load(_VI32, emit.offset(starts[row], at)), fields, few)
            left = builder.sub(emit.scaled(groups, group_size), emit.scaled(steps, step_weights))
            with builder.if_then(builder.icmp_signed(">", left, _I64(0))):
                # The part beyond whole steps: x is not permuted there, and loads must not leave the row.
                counts = ir.Constant(_VI32, list(range(LANES)))

                def below(limit: ir.Value) -> ir.Value:
                    return builder.icmp_signed("<", counts, emit.splat(builder.trunc(limit, _I32)))

                base = emit.offset(x, emit.scaled(steps, 4 * step_weights))
                natural = [
                    emit.masked_load(emit.offset(base, 4 * LANES * i), below(builder.sub(left, _I64(LANES * i))))
                    for i in range(LANE_CODES)
                ]
                fields = _fields(emit, natural)
                lanes = builder.udiv(left, _I64(LANE_CODES))
                own = builder.sub(groups, emit.scaled(steps, taken))
                for row in range(rows):
                    at = emit.offset(starts[row], emit.scaled(steps, step_weights * CODE_BITS // 8))
                    words = emit.masked_words(at, below(lanes), _I32)
                    at = emit.offset(row_scales[row], emit.scaled(steps, taken * size))
                    few = emit.shuffle(emit.masked_words(at, below(own), _I8), list(range(taken)))
                    add(row, words, fields, few)
            for row in range(rows):
                emit.store(emit.sum(builder.load(totals[row])), emit.offset(out, emit.scaled(apart, 4 * row)))
            return context.get_dummy_value()

        return signature_of(10, types.void), generate

    return coded_dots
