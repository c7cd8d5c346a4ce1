"""Vector code for the hot loops, written as LLVM IR: 16 lanes, explicit fused multiply-adds.

LLVM's own vectoriser sums each group of weights to a scalar, which costs as much as the products. Here a
row keeps 16 partial sums to its end. The order of all operations is fixed, so bits do not depend on the number of
rows, tokens or threads. LLVM splits the vectors to the width that the processor has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VI32, _VF32 = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)

BF16, F16, F32, E8M0, E4M3 = 0, 1, 2, 3, 4
"""Codes of the floating-point formats that kernels read as they are stored."""

FLOAT_BYTES = (2, 2, 4, 1, 1)
DENSE_FIELDS = 4
"""Vectors of 16 weights per step of an unquantised row."""


def lane_weights(bits: int) -> int:
    """Return how many consecutive weights of a row one lane takes per step: those of a word, or of 3 or 5 bytes."""
    return {2: 16, 3: 8, 4: 8, 5: 8, 6: 4, 8: 4}[bits]


def field_shifts(bits: int) -> list[int]:
    """Return the bit at which each of a lane's weights begins in the 32-bit word that holds it."""
    if bits == 5:
        return [0, 5, 10, 15, 4, 9, 14, 19]
    return [bits * field for field in range(lane_weights(bits))]


def field_scales(bits: int) -> list[float]:
    """Return the factor on x of each field. Weights are masked in place instead of shifted; powers of 2 are exact."""
    return [1.0 if _is_top(bits, shift) else 2.0**-shift for shift in field_shifts(bits)]


def _is_top(bits: int, shift: int) -> bool:
    return shift + bits == 32


class Emitter:
    """Shorthand for instructions of one IRBuilder."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def element(self, type_: ir.Type, address: ir.Value, index: ir.Value) -> ir.Value:
        """Return a pointer to an element. A loop needs one base throughout, or LLVM doesn't vectorise it."""
        return self.builder.gep(self.builder.inttoptr(address, ir.PointerType()), [index], source_etype=type_)

    def load(self, type_: ir.Type, address: ir.Value, align: int = 1) -> ir.Value:
        pointer = self.builder.inttoptr(address, ir.PointerType())
        return self.builder.load(pointer, align=align, typ=type_)

    def store(self, value: ir.Value, address: ir.Value, align: int = 4) -> None:
        self.builder.store(value, self.builder.inttoptr(address, ir.PointerType()), align=align)

    def masked_load(self, address: ir.Value, mask: ir.Value) -> ir.Value:
        """Load 16 floats, zero where the mask is false."""
        arguments = [self.builder.inttoptr(address, ir.PointerType()), _I32(4), mask, ir.Constant(_VF32, [0.0] * LANES)]
        return self._masked(_VF32, "llvm.masked.load.v16f32.p0", arguments)

    def masked_words(self, address: ir.Value, mask: ir.Value, word: ir.IntType) -> ir.Value:
        """Load 16 integers as they are stored, zero where the mask is false."""
        vector = ir.VectorType(word, LANES)
        pointer = self.builder.inttoptr(address, ir.PointerType())
        arguments = [pointer, _I32(1), mask, ir.Constant(vector, [0] * LANES)]
        return self._masked(vector, f"llvm.masked.load.v16i{word.width}.p0", arguments)

    def masked_store(self, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
        """Store 16 floats where the mask is true."""
        arguments = [value, self.builder.inttoptr(address, ir.PointerType()), _I32(4), mask]
        self._masked(ir.VoidType(), "llvm.masked.store.v16f32.p0", arguments)

    def _masked(self, result: ir.Type, name: str, arguments: list[ir.Value]) -> ir.Value:
        type_ = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, type_, name), arguments)

    def offset(self, address: ir.Value, *terms: ir.Value | int) -> ir.Value:
        for term in terms:
            address = self.builder.add(address, _I64(term) if isinstance(term, int) else term)
        return address

    def scaled(self, index: ir.Value, factor: int) -> ir.Value:
        return self.builder.mul(index, _I64(factor))

    def splat(self, scalar: ir.Value) -> ir.Value:
        vector = ir.VectorType(scalar.type, LANES)
        first = self.builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
        return self.builder.shuffle_vector(first, first, ir.Constant(_VI32, [0] * LANES))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        name = "llvm.fma.v16f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
        return self.builder.call(function, [a, b, c])

    def shuffle(self, vector: ir.Value, indices: list[int]) -> ir.Value:
        return self.pick(vector, vector, indices)

    def pick(self, a: ir.Value, b: ir.Value, indices: list[int]) -> ir.Value:
        """Return the elements at ``indices`` of two vectors, those of b numbered after those of a."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(indices)), indices))

    def joined(self, parts: list[ir.Value]) -> ir.Value:
        """Concatenate vectors of one length; their number must be a power of two."""
        while len(parts) > 1:
            width = 2 * parts[0].type.count
            parts = [self.pick(a, b, list(range(width))) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def sum(self, vector: ir.Value) -> ir.Value:
        """Sum all lanes, halving the vector each time."""
        width = LANES
        while width > 1:
            width //= 2
            low, high = self.shuffle(vector, list(range(width))), self.shuffle(vector, list(range(width, 2 * width)))
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, _I32(0))

    def variable(self, value: ir.Value) -> ir.Value:
        pointer = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, pointer)
        return pointer

    def field(self, word: ir.Value, bits: int, shift: int) -> ir.Value:
        """Return a weight as float, times 2**shift unless it is the word's top field."""
        vector = word.type
        if _is_top(bits, shift):
            word = self.builder.lshr(word, ir.Constant(vector, [shift] * LANES))
        else:
            word = self.builder.and_(word, ir.Constant(vector, [((1 << bits) - 1) << shift] * LANES))
        return self.builder.uitofp(word, _VF32)

    def floats(self, word: ir.Value, kind: int) -> ir.Value:
        """Convert a vector of stored numbers (i8, i16 or i32 lanes) to float32."""
        width = word.type.count
        if kind == F32:
            return self.builder.bitcast(word, ir.VectorType(_F32, width))
        integers = ir.VectorType(_I32, width)
        wide = self.builder.zext(word, integers)
        if kind == BF16:
            shifted = self.builder.shl(wide, ir.Constant(integers, [16] * width))
            return self.builder.bitcast(shifted, ir.VectorType(_F32, width))
        if kind == E8M0:
            exponent = self.builder.shl(wide, ir.Constant(integers, [23] * width))
            least = ir.Constant(integers, [1 << 22] * width)  # 2**-127
            zero = self.builder.icmp_unsigned("==", wide, ir.Constant(integers, [0] * width))
            return self.builder.bitcast(self.builder.select(zero, least, exponent), ir.VectorType(_F32, width))
        if kind == E4M3:
            builder, floats = self.builder, ir.VectorType(_F32, width)
            sign = builder.shl(builder.and_(wide, self._of(wide, 0x80)), self._of(wide, 24))
            magnitude = builder.shl(builder.and_(wide, self._of(wide, 0x7F)), self._of(wide, 20))
            # Moves the exponent's bias from 7 to 127. Subnormals, most scales of small weights, are converted as
            # integers: as float32 they would be subnormal too, and arithmetic with those takes over 100 cycles.
            normal = builder.add(magnitude, self._of(wide, 120 << 23))
            small = builder.uitofp(builder.and_(wide, self._of(wide, 7)), floats)
            small = builder.bitcast(builder.fmul(small, ir.Constant(floats, [2.0**-9] * width)), integers)
            bits = builder.select(builder.icmp_unsigned("<", magnitude, self._of(wide, 1 << 23)), small, normal)
            nan = builder.icmp_unsigned("==", magnitude, self._of(wide, 0x7F << 20))
            bits = builder.select(nan, self._of(wide, 0x7FC00000), bits)
            return builder.bitcast(builder.or_(bits, sign), floats)
        return self.half(wide)

    def _of(self, like: ir.Value, value: int) -> ir.Value:
        """Return a constant vector of the same type as another vector."""
        return ir.Constant(like.type, [value] * like.type.count)

    def half(self, wide: ir.Value) -> ir.Value:
        """Convert float16 in the low half of i32 lanes to float32 with integers, as not all processors can."""
        width = wide.type.count

        def constant(value: int) -> ir.Value:
            return ir.Constant(wide.type, [value] * width)

        builder, floats = self.builder, ir.VectorType(_F32, width)
        magnitude = builder.shl(builder.and_(wide, constant(0x7FFF)), constant(13))
        # Times 2**112 moves the exponent's bias from 15 to 127, subnormals included.
        scaled = builder.fmul(builder.bitcast(magnitude, floats), ir.Constant(floats, [2.0**112] * width))
        special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13))
        infinite = builder.or_(magnitude, constant(0x7F800000))
        bits = builder.select(special, infinite, builder.bitcast(scaled, wide.type))
        sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
        return builder.bitcast(builder.or_(bits, sign), floats)

    def add_biases(
        self, totals: list[ir.Value], biases: list[ir.Value], sums: ir.Value, groups: ir.Value, kind: int, excess: int
    ) -> None:
        """Add to the totals of several rows the products of their biases, stored as ``kind``, with the sums of x.

        With an ``excess``, that many times the scales are subtracted instead.
        """
        builder, (word, size) = self.builder, (_I32 if kind == F32 else _I16, FLOAT_BYTES[kind])
        vectors = builder.udiv(self.offset(groups, LANES - 1), _I64(LANES))
        with cgutils.for_range(builder, vectors) as loop:
            first = self.scaled(loop.index, LANES)
            left = builder.trunc(builder.sub(groups, first), _I32)
            mask = builder.icmp_signed("<", ir.Constant(_VI32, list(range(LANES))), self.splat(left))
            values = self.masked_load(self.offset(sums, self.scaled(first, 4)), mask)
            if excess:
                values = builder.fmul(values, ir.Constant(_VF32, [-float(excess)] * LANES))
            for total, row in zip(totals, biases, strict=True):
                stored = self.masked_words(self.offset(row, self.scaled(first, size)), mask, word)
                builder.store(self.fma(self.floats(stored, kind), values, builder.load(total)), total)

    def words(self, address: ir.Value, bits: int) -> list[ir.Value]:
        """Load the words of one step for all 16 lanes: one vector per field."""
        if bits in (2, 4, 8):
            return [self.load(_VI32, address)] * lane_weights(bits)
        stride = 5 if bits == 5 else 3
        raw = self.load(ir.VectorType(_I8, stride * LANES), address)
        parts = []
        for first in (0, 2) if bits == 5 else (0,):
            indices = [stride * lane + first + min(byte, 2) for lane in range(LANES) for byte in range(4)]
            parts += [self.builder.bitcast(self.shuffle(raw, indices), _VI32)] * 4
        return parts if bits != 3 else parts * 2


def signature_of(argument_count: int, result: types.Type) -> Any:
    """Return the type of a function of ``argument_count`` int64."""
    return result(*[types.int64] * argument_count)


@dataclass(frozen=True)
class Step:
    """Values available in one step of the loop over a row's weights.

    Attributes:
        index: Number of the step.
        rows: Address of each row's first byte.
        x: Address of x.
        groups: Number of groups per row.
        sums: Address of the sums of x per group.
    """

    index: ir.Value
    rows: list[ir.Value]
    x: ir.Value
    groups: ir.Value
    sums: ir.Value


StepProducts = Callable[[Emitter, Step], tuple[list[ir.Value], ir.Value, ir.Value | None]]
"""Returns a step's products of q and x, 16 lanes per row; the step's first group; the scales of x's groups, or None."""


def make_group_dots(
    step_products: StepProducts, taken: int, kind: int, rows: int, excess: int = 0
) -> Callable[..., None]:
    """Build the ``dots`` of ``make_quantized_dots`` for any form of x.

    Args:
        step_products: Emits the products of one step.
        taken: Number of groups that a step touches.
        kind: Floating-point format of scales and biases.
        rows: Number of rows multiplied at once.
        excess: Number subtracted from each code instead of stored biases; ``biases`` is then the scales' address.
    """
    word, size = (_I32 if kind == F32 else _I16), FLOAT_BYTES[kind]

    @intrinsic
    def group_dots(typing_context, weights, row_bytes, x, scales, biases, sums, groups, steps, out, apart):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            weights, row_bytes, x, scales, biases, sums, groups, steps, out, apart = arguments
            totals = [emit.variable(ir.Constant(_VF32, [0.0] * LANES)) for _ in range(rows)]
            starts = [builder.add(weights, emit.scaled(builder.mul(row_bytes, apart), row)) for row in range(rows)]
            row_groups = [emit.scaled(builder.mul(groups, apart), size * row) for row in range(rows)]
            row_scales = [builder.add(scales, offset) for offset in row_groups]
            with cgutils.for_range(builder, steps) as loop:
                products, group, x_scales = step_products(emit, Step(loop.index, starts, x, groups, sums))
                for row in range(rows):
                    at = emit.offset(row_scales[row], emit.scaled(group, size))
                    few = emit.floats(emit.load(ir.VectorType(word, taken), at), kind)
                    if x_scales is not None:
                        few = builder.fmul(few, x_scales)
                    scale = emit.shuffle(few, [lane * taken // LANES for lane in range(LANES)])
                    builder.store(emit.fma(products[row], scale, builder.load(totals[row])), totals[row])
            emit.add_biases(totals, [builder.add(biases, offset) for offset in row_groups], sums, groups, kind, excess)
            for row in range(rows):
                emit.store(emit.sum(builder.load(totals[row])), emit.offset(out, emit.scaled(apart, 4 * row)))
            return context.get_dummy_value()

        return signature_of(10, types.void), generate

    return group_dots


def make_quantized_dots(bits: int, group_size: int, kind: int, rows: int, excess: int = 0) -> Callable[..., None]:
    """Build ``dots(weights, row_bytes, x, scales, biases, sums, groups, steps, out, apart)``.

    The function writes the sum of ``q * scale * x`` over whole steps plus that of ``bias * sum(x)`` over all groups.
    Its arguments are int64: the addresses of the first row's packed bytes, of x as ``permute_for_dots`` orders it, of
    the rows' scales and biases (stored as ``kind``, ``groups`` per row), of the sums of x per group and of the float32
    results; and the number of steps of 16 lanes. Rows are multiplied several at once, ``apart`` rows from each other:
    they share the loads of x and hide the multiplier's latency. A row's bits are the same as if it were alone.
    """
    step_weights = LANES * lane_weights(bits)
    groups_a_step, steps_a_group = step_weights // group_size, group_size // step_weights

    def products_of(emit: Emitter, step: Step) -> tuple[list[ir.Value], ir.Value, None]:
        at = emit.scaled(step.index, step_weights * bits // 8)
        words = [emit.words(emit.offset(start, at), bits) for start in step.rows]
        base = emit.offset(step.x, emit.scaled(step.index, step_weights * 4))
        products = [ir.Constant(_VF32, [0.0] * LANES)] * rows
        for field, shift in enumerate(field_shifts(bits)):
            values = emit.load(_VF32, emit.offset(base, field * LANES * 4), align=4)
            for row in range(rows):
                products[row] = emit.fma(emit.field(words[row][field], bits, shift), values, products[row])
        if groups_a_step:
            return products, emit.scaled(step.index, groups_a_step), None
        return products, emit.builder.udiv(step.index, _I64(steps_a_group)), None

    return make_group_dots(products_of, max(groups_a_step, 1), kind, rows, excess)


def make_dense_dots(kind: int, rows: int) -> Callable[..., None]:
    """Build the ``dots`` of ``make_quantized_dots`` for unquantised rows; x is in its own order, groups are unused."""
    word = _I32 if kind == F32 else _I16
    stride = LANES * FLOAT_BYTES[kind]

    @intrinsic
    def dense_dots(typing_context, weights, row_bytes, x, scales, biases, sums, groups, steps, out, apart):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            weights, row_bytes, x, _, _, _, _, steps, out, apart = arguments
            zero = ir.Constant(_VF32, [0.0] * LANES)
            totals = [[emit.variable(zero) for _ in range(DENSE_FIELDS)] for _ in range(rows)]
            starts = [builder.add(weights, emit.scaled(builder.mul(row_bytes, apart), row)) for row in range(rows)]
            with cgutils.for_range(builder, steps) as loop:
                at = emit.scaled(loop.index, DENSE_FIELDS * stride)
                base = emit.offset(x, emit.scaled(loop.index, DENSE_FIELDS * LANES * 4))
                for field in range(DENSE_FIELDS):
                    values = emit.load(_VF32, emit.offset(base, field * LANES * 4), align=4)
                    for row in range(rows):
                        stored = emit.load(ir.VectorType(word, LANES), emit.offset(starts[row], at, field * stride))
                        total = totals[row][field]
                        builder.store(emit.fma(emit.floats(stored, kind), values, builder.load(total)), total)
            for row in range(rows):
                fields = [builder.load(total) for total in totals[row]]
                pairs = builder.fadd(fields[0], fields[1]), builder.fadd(fields[2], fields[3])
                emit.store(emit.sum(builder.fadd(*pairs)), emit.offset(out, emit.scaled(apart, 4 * row)))
            return context.get_dummy_value()

        return signature_of(10, types.void), generate

    return dense_dots
