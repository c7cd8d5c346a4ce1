"""Access to memory by address in kernels: stored numbers, arrays, functions, and counters shared by threads."""

from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .vector_ir import BF16, E4M3, E8M0, F16, F32, FLOAT_BYTES, LANES, Emitter, signature_of

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VI32, _VF32 = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def _make_load(kind: int) -> Callable[[int, int], float]:
    word = ir.IntType(8 * FLOAT_BYTES[kind])

    @intrinsic
    def load(typing_context, address, index):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            stored = builder.load(emit.element(word, *arguments), align=1, typ=word)
            vector = builder.bitcast(stored, ir.VectorType(word, 1))
            return builder.extract_element(emit.floats(vector, kind), _I32(0))

        return signature_of(2, types.float32), generate

    return load


load_bf16, load_f16, load_f32, load_e8m0, load_e4m3 = (_make_load(kind) for kind in (BF16, F16, F32, E8M0, E4M3))


@intrinsic
def load_u8(typing_context, address, index):  # type: ignore[no-untyped-def]
    """Load one byte as int64: ``load_u8(address, index)``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.zext(builder.load(Emitter(builder).element(_I8, *arguments), align=1, typ=_I8), _I64)

    return signature_of(2, types.int64), generate


@intrinsic
def store_f32(typing_context, address, index, value):  # type: ignore[no-untyped-def]
    """Store a float32: ``store_f32(address, index, value)``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.store(arguments[2], Emitter(builder).element(_F32, *arguments[:2]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def add_one(typing_context, address):  # type: ignore[no-untyped-def]
    """Increment an int64 atomically and return its previous value: ``add_one(address)``. Threads draw tasks with it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(arguments[0], ir.PointerType())
        return builder.atomic_rmw("add", pointer, _I64(1), "acq_rel")

    return signature_of(1, types.int64), generate


@intrinsic
def load_i64(typing_context, address):  # type: ignore[no-untyped-def]
    """Load an int64 atomically, with acquire ordering: ``load_i64(address)``. Sees what other threads finished."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(arguments[0], ir.PointerType())
        return builder.load_atomic(pointer, "acquire", 8, typ=_I64)

    return signature_of(1, types.int64), generate


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """Convert an address to a pointer for ``numba.carray``: ``pointer(address)``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return signature_of(1, types.voidptr), generate


@intrinsic
def call(typing_context, function, arguments_, task):  # type: ignore[no-untyped-def]
    """Call the function at an address with two int64: ``call(function, arguments, task)``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        type_ = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(arguments[0], type_.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return signature_of(3, types.void), generate
