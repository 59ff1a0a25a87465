"""What compiled code does with memory and bits that numba has no words for.

Each is an instruction or two of LLVM. Addresses are integers, as Python passes them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

__all__ = ["add", "bits", "larger", "pointer", "row", "smaller", "tuple_of"]


def bits(source: Any, result: Any) -> Any:
    """The bits of a number, read as a number of another type."""

    def function(typing: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(source), generate

    return intrinsic(function)


def _either(name: str) -> Any:
    """The larger or smaller number, also of a whole vector: NaN is looked for elsewhere."""

    def function(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FloatType()
            both = ir.FunctionType(kind, [kind, kind])
            code = builder.module.declare_intrinsic(name, [kind], both)
            return builder.call(code, arguments, fastmath=("nnan", "nsz"))

        return types.float32(types.float32, types.float32), generate

    return intrinsic(function)


larger, smaller = _either("llvm.maxnum"), _either("llvm.minnum")


def _pointer(context: Any, builder: Any, kind: Any, address: Any) -> Any:
    return builder.inttoptr(address, context.get_value_type(kind).as_pointer())


def pointer(kind: Any) -> Any:
    """Of an address: what stands there, to be indexed."""

    def function(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _pointer(context, builder, kind, arguments[0])

        return types.CPointer(kind)(types.int64), generate

    return intrinsic(function)


def row(kind: Any) -> Any:
    """Of an address, a place and a width: that row of the matrix that stands there, an array."""
    result = types.Array(kind, 1, "C")

    def function(typing: Any, address: Any, place: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start, place, width = arguments
            size = context.get_constant(types.intp, kind.bitwidth // 8)
            offset = builder.mul(builder.mul(place, width), size)
            array = make_array(result)(context, builder)
            data = _pointer(context, builder, kind, builder.add(start, offset))
            populate_array(array, data, [width], [size], size, None)
            return array._getvalue()

        return result(types.int64, types.int64, types.int64), generate

    return intrinsic(function)


def tuple_of(kind: Any, length: int) -> Any:
    """Of an address: the first numbers that stand there."""
    result = types.UniTuple(kind, length)

    def function(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start = _pointer(context, builder, kind, arguments[0])
            places = (builder.gep(start, [ir.IntType(64)(i)]) for i in range(length))
            return context.make_tuple(builder, result, [builder.load(p) for p in places])

        return result(types.int64), generate

    return intrinsic(function)


@intrinsic
def add(typing: Any, pointer: Any, place: Any, number: Any) -> Any:
    """Add to an integer to which other threads add too; what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, place, number = arguments
        return builder.atomic_rmw("add", builder.gep(start, [place]), number, "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64, types.int64), generate
