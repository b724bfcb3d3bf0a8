"""Products of short vectors, as attention needs them for the head of a token.

In LLVM's own terms, like `tile`: what becomes of a short loop over a length that is known late is
otherwise mostly tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from momaserve.kernels.cpu.tile import FLOATS, LANES, WORDS, prefetch, splat

_FLOAT = ir.FloatType()
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_SHIFTS = ir.Constant(WORDS, [16] * LANES)


# numba passes the arguments by name and reads no annotations.
def _dots(typingctx, x, start, w, places, size, ahead):  # type: ignore[no-untyped-def]
    """For each place the sum over i < size of x[start + i] * w[place + i], float32.

    Args:
        x: float32 array, C-contiguous; `start` is an offset in elements.
        w: float32 or, as bfloat16, uint16 array, C-contiguous; `places` is a tuple of offsets.
        ahead: how far behind the places is what will be needed soon, in elements; it is asked of
            memory. It may be nothing's: such a place is never read.
    """
    if not isinstance(places, types.UniTuple):
        raise TypingError("dots needs a tuple of places")
    result = types.UniTuple(types.float32, len(places))
    signature = result(x, start, w, places, size, ahead)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Sequence[Any]) -> Any:
        data = _data_of(context, builder, sig, args)
        row = builder.gep(data(0), [args[1]])
        others = [builder.gep(data(2), [o]) for o in cgutils.unpack_tuple(builder, args[3])]
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        vectors = [cgutils.alloca_once_value(builder, zero) for _ in others]
        sums = [cgutils.alloca_once(builder, _FLOAT) for _ in others]

        def whole(i: Any) -> None:
            factor = _vector(builder, row, i)
            for other, total in zip(others, vectors, strict=True):
                prefetch(builder, builder.gep(other, [builder.add(i, args[5])]))
                product = _fma(builder, factor, _vector(builder, other, i), builder.load(total))
                builder.store(product, total)

        def single(i: Any) -> None:
            factor = _number(builder, row, i)
            for other, total in zip(others, sums, strict=True):
                product = _fma(builder, factor, _number(builder, other, i), builder.load(total))
                builder.store(product, total)

        def between() -> None:
            kind = ir.FunctionType(_FLOAT, [_FLOAT, FLOATS])
            name = f"llvm.vector.reduce.fadd.v{LANES}f32"
            add = cgutils.get_or_insert_function(builder.module, kind, name)
            for vector, total in zip(vectors, sums, strict=True):
                arguments = [ir.Constant(_FLOAT, 0.0), builder.load(vector)]
                builder.store(builder.call(add, arguments, fastmath=("reassoc",)), total)

        _stride(builder, args[4], whole, between, single)
        return context.make_tuple(builder, result, [builder.load(total) for total in sums])

    return signature, codegen


def _add_scaled(typingctx, factors, w, places, size, out, start, ahead):  # type: ignore[no-untyped-def]
    """out[start + i] += sum over j of factors[j] * w[places[j] + i], for i < size.

    Args:
        factors: a tuple of float32.
        w, places, ahead: as in `dots`.
        out: float32 array, C-contiguous, that is not `w`; `start` is an offset in elements.
    """
    if not isinstance(places, types.UniTuple) or len(places) != len(factors):
        raise TypingError("add_scaled needs as many places as factors")
    signature = types.void(factors, w, places, size, out, start, ahead)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Sequence[Any]) -> Any:
        data = _data_of(context, builder, sig, args)
        scales = cgutils.unpack_tuple(builder, args[0])
        wide = [splat(builder, scale) for scale in scales]
        others = [builder.gep(data(1), [o]) for o in cgutils.unpack_tuple(builder, args[2])]
        row = builder.gep(data(4), [args[5]])

        def whole(i: Any) -> None:
            total = _vector(builder, row, i)
            for factor, other in zip(wide, others, strict=True):
                prefetch(builder, builder.gep(other, [builder.add(i, args[6])]))
                total = _fma(builder, factor, _vector(builder, other, i), total)
            at = builder.bitcast(builder.gep(row, [i]), FLOATS.as_pointer())
            builder.store(total, at, align=4)

        def single(i: Any) -> None:
            total = _number(builder, row, i)
            for factor, other in zip(scales, others, strict=True):
                total = _fma(builder, factor, _number(builder, other, i), total)
            builder.store(total, builder.gep(row, [i]))

        _stride(builder, args[3], whole, lambda: None, single)
        return context.get_dummy_value()

    return signature, codegen


dots: Any = intrinsic(_dots)
add_scaled: Any = intrinsic(_add_scaled)


def _data_of(
    context: Any, builder: ir.IRBuilder, sig: Any, args: Sequence[Any]
) -> Callable[[int], Any]:
    def data(index: int) -> Any:
        return context.make_array(sig.args[index])(context, builder, args[index]).data

    return data


def _stride(
    builder: ir.IRBuilder,
    size: Any,
    whole: Callable[[Any], None],
    between: Callable[[], None],
    single: Callable[[Any], None],
) -> None:
    """`whole` for the start of each full vector below `size`, then `single` for what is left."""
    lanes = ir.Constant(size.type, LANES)
    count = builder.sdiv(size, lanes)
    with cgutils.for_range(builder, count) as loop:
        whole(builder.mul(loop.index, lanes))
    between()
    with cgutils.for_range(builder, size, start=builder.mul(count, lanes)) as loop:
        single(loop.index)


def _fma(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(x.type, [x.type] * 3)
    name = "llvm.fmuladd.f32" if x.type == _FLOAT else f"llvm.fmuladd.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x, y, z])


def _vector(builder: ir.IRBuilder, base: Any, i: Any) -> Any:
    """16 numbers from base[i] on, as float32."""
    place = builder.gep(base, [i])
    if base.type.pointee == _FLOAT:
        return builder.load(builder.bitcast(place, FLOATS.as_pointer()), align=4)
    halves = builder.load(builder.bitcast(place, _HALVES.as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, WORDS), _SHIFTS), FLOATS)


def _number(builder: ir.IRBuilder, base: Any, i: Any) -> Any:
    value = builder.load(builder.gep(base, [i]))
    if base.type.pointee == _FLOAT:
        return value
    word = ir.IntType(32)
    return builder.bitcast(builder.shl(builder.zext(value, word), ir.Constant(word, 16)), _FLOAT)
