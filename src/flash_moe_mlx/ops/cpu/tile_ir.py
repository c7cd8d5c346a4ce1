"""Vector code for matrix products: weights are unpacked into a tile that stays in the cache, then multiplied.

A tile is (k, NR) float32: k weights of NR rows of the matrix, so that NR outputs are computed side by side.
Each output is one chain of fused multiply-adds over k, so its bits do not depend on the number of rows of x.
"""

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .coded_ir import LANE_CODES, instructions, values
from .vector_ir import BF16, F16, F32, LANES, Emitter

NR = 64
"""Outputs per tile."""

MR = 4
"""Rows of x multiplied at once: their MR * NR / 16 sums stay in registers."""

PACK_BLOCK = 32
"""Weights unpacked at once: the smallest group."""

_I1, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VI1, _VI32, _VF32 = ir.VectorType(_I1, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def _words(emit: Emitter, rows: list[ir.Value], base: ir.Value, count: int) -> list[ir.Value]:
    """Load ``count`` consecutive words of each of 16 rows, as one vector of all rows per word.

    Four or two words of a row are loaded at once and transposed in registers: inserting them one by one would take
    more instructions.
    """
    words: list[ir.Value] = []
    while len(words) < count:
        width = next(width for width in (4, 2, 1) if width <= count - len(words))
        type_, at = ir.VectorType(_I32, width), emit.offset(base, 4 * len(words))
        loaded = [emit.load(type_, emit.builder.add(row, at)) for row in rows]
        words += _transposed(emit, loaded, width)
    return words


def _transposed(emit: Emitter, rows: list[ir.Value], width: int) -> list[ir.Value]:
    """Transpose 16 vectors of ``width`` words into ``width`` vectors of 16, within quarters of a vector."""

    def quarters(a: ir.Value, b: ir.Value, picks: tuple[int, ...]) -> ir.Value:
        """Pick in each quarter from the four words of a (0 to 3) and those of b (4 to 7)."""
        return emit.pick(a, b, [4 * quarter + pick % 4 + pick // 4 * LANES for quarter in range(4) for pick in picks])

    if width == 1:
        return [emit.joined(rows)]
    if width == 2:
        first, last = (
            emit.joined([row for i in range(0, LANES, 4) for row in rows[i + j : i + j + 2]]) for j in (0, 2)
        )
        return [quarters(first, last, picks) for picks in ((0, 2, 4, 6), (1, 3, 5, 7))]
    a, b, c, d = (emit.joined(rows[j::4]) for j in range(4))
    low, high = (0, 4, 1, 5), (2, 6, 3, 7)
    words = []
    for half in (low, high):
        ab, cd = quarters(a, b, half), quarters(c, d, half)
        words += [quarters(ab, cd, (0, 1, 4, 5)), quarters(ab, cd, (2, 3, 6, 7))]
    return words


def _affine_values(emit: Emitter, words: list[ir.Value], bits: int) -> list[ir.Value]:
    """Convert the PACK_BLOCK weights of 16 rows to floats."""
    builder = emit.builder

    def constant(value: int) -> ir.Value:
        return ir.Constant(_VI32, [value] * LANES)

    values = []
    for index in range(PACK_BLOCK):
        word, shift = divmod(index * bits, 32)
        field = builder.lshr(words[word], constant(shift)) if shift else words[word]
        if shift + bits > 32:
            field = builder.or_(field, builder.shl(words[word + 1], constant(32 - shift)))
        values.append(builder.uitofp(builder.and_(field, constant((1 << bits) - 1)), _VF32))
    return values


def _dense_values(emit: Emitter, words: list[ir.Value], kind: int) -> list[ir.Value]:
    builder = emit.builder
    if kind == F32:
        return [builder.bitcast(word, _VF32) for word in words]
    sixteen, high_half = ir.Constant(_VI32, [16] * LANES), ir.Constant(_VI32, [0xFFFF0000] * LANES)
    values = []
    for word in words:
        if kind == BF16:
            low, high = builder.shl(word, sixteen), builder.and_(word, high_half)
            values += [builder.bitcast(low, _VF32), builder.bitcast(high, _VF32)]
        else:
            low = builder.and_(word, ir.Constant(_VI32, [0xFFFF] * LANES))
            values += [emit.half(low), emit.half(builder.lshr(word, sixteen))]
    return values


def _coded_values(emit: Emitter, words: list[ir.Value], how: str) -> list[ir.Value]:
    """Look up the PACK_BLOCK values of 16 rows of 4-bit codes."""
    return [values(emit, words[index // LANE_CODES], index % LANE_CODES, how) for index in range(PACK_BLOCK)]


def make_unpack(bits: int, kind: int, group_size: int, *, coded: bool = False) -> Callable[..., None]:
    """Build ``unpack(weights, row_bytes, last, first_block, blocks, scales, biases, tile)``.

    The function unpacks ``blocks`` blocks of 32 weights, beginning with ``first_block``, of the 16 rows at address
    ``weights`` into 16 columns of the tile. Rows after ``last`` are copies of it. ``scales`` and ``biases`` are float32
    of shape (groups, NR), at this column. All arguments are int64.

    Args:
        bits: Bits per weight; 0 for unquantised rows.
        kind: Floating-point format of unquantised rows.
        group_size: Number of weights that share a scale; may be half a block if ``coded``.
        coded: Whether the rows hold E2M1 codes.
    """
    blocks_a_group, groups_a_block = max(group_size // PACK_BLOCK, 1), max(PACK_BLOCK // max(group_size, 1), 1)
    how = instructions() if coded else ""
    words_a_block = bits if bits else {BF16: 16, F16: 16, F32: 32}[kind]

    @intrinsic
    def unpack(  # type: ignore[no-untyped-def]
        typing_context, weights, row_bytes, last, first_block, blocks, scales, biases, tile
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            weights, row_bytes, last, first_block, blocks, scales, biases, tile = arguments
            rows = []
            for lane in range(LANES):
                row = builder.select(builder.icmp_signed("<", _I64(lane), last), _I64(lane), last)
                rows.append(builder.add(weights, builder.mul(row, row_bytes)))
            with cgutils.for_range(builder, blocks) as loop:
                block = builder.add(loop.index, first_block)
                base = emit.scaled(block, words_a_block * 4)
                words = _words(emit, rows, base, words_a_block)
                if coded:
                    group = emit.scaled(block, groups_a_block)
                    each = [
                        emit.load(_VF32, emit.offset(scales, emit.scaled(group, NR * 4), i * NR * 4), align=4)
                        for i in range(groups_a_block)
                    ]
                    found = _coded_values(emit, words, how)
                    unpacked = [
                        builder.fmul(value, each[i * groups_a_block // PACK_BLOCK]) for i, value in enumerate(found)
                    ]
                elif bits:
                    group = builder.udiv(block, _I64(blocks_a_group))
                    at = emit.scaled(group, NR * 4)
                    scale, bias = (emit.load(_VF32, builder.add(part, at), align=4) for part in (scales, biases))
                    unpacked = [emit.fma(value, scale, bias) for value in _affine_values(emit, words, bits)]
                else:
                    unpacked = _dense_values(emit, words, kind)
                out = emit.offset(tile, emit.scaled(loop.index, PACK_BLOCK * NR * 4))
                for index, value in enumerate(unpacked):
                    emit.store(value, emit.offset(out, index * NR * 4))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return unpack


def make_multiply(rows: int, *, gathered: bool = False) -> Callable[..., None]:
    """Build ``multiply(x, x_stride, tile, tile_stride, count, y, y_stride, outputs, start)``.

    The function adds ``x[:rows, :count] @ tile[:count]`` to y, of which only the first ``outputs`` columns exist.
    ``start`` is 0 to add to y, -1 to start from zero, or the address of NR float32 to start from. Strides are in
    bytes, and all arguments int64.

    Args:
        rows: Number of rows of x.
        gathered: Whether x and y are addresses of the rows' addresses. Strides are then offsets into the rows.
    """
    vectors = NR // LANES

    @intrinsic
    def multiply(  # type: ignore[no-untyped-def]
        typing_context, x, x_stride, tile, tile_stride, count, y, y_stride, outputs, start
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            x, x_stride, tile, tile_stride, count, y, y_stride, outputs, start = arguments

            def places(base: ir.Value, stride: ir.Value) -> list[ir.Value]:
                if gathered:
                    return [emit.offset(emit.load(_I64, emit.offset(base, 8 * row)), stride) for row in range(rows)]
                return [emit.offset(base, builder.mul(_I64(row), stride)) for row in range(rows)]

            sources, targets = places(x, x_stride), places(y, y_stride)
            masks = []
            for vector in range(vectors):
                lanes = ir.Constant(_VI32, [vector * LANES + lane for lane in range(LANES)])
                masks.append(builder.icmp_signed("<", lanes, emit.splat(builder.trunc(outputs, _I32))))
            zero = ir.Constant(_VF32, [0.0] * LANES)
            sums = [[emit.variable(zero) for _ in range(vectors)] for _ in range(rows)]

            def each(action: Callable[[int, int], None]) -> None:
                for row in range(rows):
                    for vector in range(vectors):
                        action(row, vector)

            def load_y(row: int, vector: int) -> None:
                address = emit.offset(targets[row], vector * LANES * 4)
                builder.store(emit.masked_load(address, masks[vector]), sums[row][vector])

            def load_start(row: int, vector: int) -> None:
                value = emit.load(_VF32, emit.offset(start, vector * LANES * 4), align=4)
                builder.store(value, sums[row][vector])

            with builder.if_then(builder.icmp_signed("==", start, _I64(0))):
                each(load_y)
            with builder.if_then(builder.icmp_signed(">", start, _I64(0))):
                each(load_start)
            with cgutils.for_range(builder, count) as loop:
                column = emit.offset(tile, builder.mul(loop.index, tile_stride))
                weights = [emit.load(_VF32, emit.offset(column, v * LANES * 4), align=4) for v in range(vectors)]
                at = emit.scaled(loop.index, 4)
                for row in range(rows):
                    value = emit.load(_F32, builder.add(sources[row], at), align=4)
                    factor = emit.splat(value)
                    for vector in range(vectors):
                        total = sums[row][vector]
                        builder.store(emit.fma(factor, weights[vector], builder.load(total)), total)

            def store_y(row: int, vector: int) -> None:
                address = emit.offset(targets[row], vector * LANES * 4)
                emit.masked_store(builder.load(sums[row][vector]), address, masks[vector])

            each(store_y)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply
