"""The innermost product: a few rows times 32 outputs, all sums in vector registers.

Written in LLVM's own terms, since what a loop becomes is otherwise the vectoriser's choice. The
compiler cuts the vectors to what the processor has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 16
"""Outputs of one vector."""
TILE = 2 * LANES
"""Outputs of one call."""
MAX_ROWS = 8
"""Rows of one call at most: their 16 sums and the weights fit into 32 registers."""

_NEAR, _FAR = 48, 256
"""Steps of the sum by which weights are asked for before their turn, into the first cache and into
the second, which takes more requests at a time; found by trying."""

FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)


# numba passes the arguments by name and reads no annotations.
def _multiply_tile(typingctx, x, rows, w, first, size, out, places):  # type: ignore[no-untyped-def]
    """out[place : place + 32] = sum over i < size of x[row + i] * w[first + i], for each row.

    Every sum runs over i in order, so a row's result does not depend on its mates.

    Args:
        x, out: float32 arrays, C-contiguous; `rows` and `places` are tuples of as many offsets
            into them, in elements.
        w: packed weights (`linear.pack`), [.., size, 32] float32 or [.., size, 16] uint32;
            `first` is the offset of the tile's first element.
    """
    if not isinstance(rows, types.UniTuple) or len(rows) != len(places):
        raise TypingError("multiply_tile needs as many rows as places")
    signature = types.void(x, rows, w, first, size, out, places)
    is_half = isinstance(w.dtype, types.Integer)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Sequence[Any]) -> Any:
        def data(index: int) -> Any:
            return context.make_array(sig.args[index])(context, builder, args[index]).data

        count = len(rows)
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        name = f"llvm.fmuladd.v{LANES}f32"
        add = cgutils.get_or_insert_function(builder.module, kind, name)
        x_rows = [builder.gep(data(0), [o]) for o in cgutils.unpack_tuple(builder, args[1], count)]
        weights = builder.gep(data(2), [args[3]])
        targets = [builder.gep(data(5), [o]) for o in cgutils.unpack_tuple(builder, args[6], count)]
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(count)]
        step = LANES if is_half else TILE
        with cgutils.for_range(builder, args[4]) as loop:
            place = _place(builder, weights, loop, step)
            for ahead, level in ((_NEAR, 1), (_FAR, 2)):
                later = ir.Constant(loop.index.type, ahead * step)
                prefetch(builder, builder.gep(place, [later]), level)
            pair = _widened(builder, place) if is_half else _loaded(builder, place)
            for row, accumulators in zip(x_rows, sums, strict=True):
                factor = splat(builder, builder.load(builder.gep(row, [loop.index])))
                for weight, accumulator in zip(pair, accumulators, strict=True):
                    total = builder.load(accumulator)
                    builder.store(builder.call(add, [weight, factor, total]), accumulator)
        for target, accumulators in zip(targets, sums, strict=True):
            for half, accumulator in enumerate(accumulators):
                at = builder.gep(target, [ir.Constant(ir.IntType(64), half * LANES)])
                vector = builder.bitcast(at, FLOATS.as_pointer())
                builder.store(builder.load(accumulator), vector, align=4)
        return context.get_dummy_value()

    return signature, codegen


def _widen_tile(typingctx, w, first, size, wide):  # type: ignore[no-untyped-def]
    """wide [size * 32] float32 = a tile of packed bfloat16, as float32 is packed.

    Args:
        w: packed weights, [.., size, 16] uint32; `first` is the offset of the tile's first element.
    """
    signature = types.void(w, first, size, wide)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Sequence[Any]) -> Any:
        def data(index: int) -> Any:
            return context.make_array(sig.args[index])(context, builder, args[index]).data

        weights, target = builder.gep(data(0), [args[1]]), data(3)
        with cgutils.for_range(builder, args[2]) as loop:
            for half, vector in enumerate(_widened(builder, _place(builder, weights, loop, LANES))):
                at = builder.add(
                    builder.mul(loop.index, ir.Constant(loop.index.type, TILE)),
                    ir.Constant(loop.index.type, half * LANES),
                )
                place = builder.bitcast(builder.gep(target, [at]), FLOATS.as_pointer())
                builder.store(vector, place, align=4)
        return context.get_dummy_value()

    return signature, codegen


multiply_tile: Any = intrinsic(_multiply_tile)
widen_tile: Any = intrinsic(_widen_tile)


def _place(builder: ir.IRBuilder, base: Any, loop: Any, step: int) -> Any:
    return builder.gep(base, [builder.mul(loop.index, ir.Constant(loop.index.type, step))])


def prefetch(builder: ir.IRBuilder, place: Any, level: int = 1) -> None:
    """Asks for a line of memory, to be in the cache of this level."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    read, near, data = (ir.Constant(word, n) for n in (0, 4 - level, 1))
    builder.call(fetch, [builder.bitcast(place, byte), read, near, data])


def splat(builder: ir.IRBuilder, value: Any) -> Any:
    alone = builder.insert_element(
        ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
    )
    every = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(alone, ir.Constant(FLOATS, ir.Undefined), every)


def _loaded(builder: ir.IRBuilder, place: Any) -> list[Any]:
    halves = (builder.gep(place, [ir.Constant(ir.IntType(64), n * LANES)]) for n in range(2))
    return [builder.load(builder.bitcast(half, FLOATS.as_pointer()), align=4) for half in halves]


def _widened(builder: ir.IRBuilder, place: Any) -> list[Any]:
    """16 words hold the bfloat16 of outputs 0 to 15 in their lower halves, of the rest above."""
    words = builder.load(builder.bitcast(place, WORDS.as_pointer()), align=4)
    low = builder.shl(words, ir.Constant(WORDS, [16] * LANES))
    high = builder.and_(words, ir.Constant(WORDS, [0xFFFF0000] * LANES))
    return [builder.bitcast(low, FLOATS), builder.bitcast(high, FLOATS)]
