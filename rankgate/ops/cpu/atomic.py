"""What threads that work together need and Numba lacks, as intrinsics; addresses are plain 64-bit integers.

Every access is sequentially consistent: programs synchronise some hundred times a token, which costs nothing beside
the arithmetic between.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WORD = ir.IntType(64)
ORDER = "seq_cst"
X86 = binding.get_process_triple().startswith("x86_64")


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic
def load(_: Any, address: Any) -> Any:
    """The word at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), ORDER, 8)

    return types.int64(types.int64), codegen


@intrinsic
def store(_: Any, address: Any, value: Any) -> Any:
    """Write the word at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add(_: Any, address: Any, value: Any) -> Any:
    """Add to the word at `address`, and what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], ORDER)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def replace(_: Any, address: Any, old: Any, new: Any) -> Any:
    """Write `new` if the word at `address` is `old`, and whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, old, new = arguments
        pair = builder.cmpxchg(_pointer(builder, address), old, new, ORDER, ORDER)
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(_: Any) -> Any:
    """Tell the processor that this thread waits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call(_: Any, kernel: Any, arguments: Any, chunk: Any) -> Any:
    """`Kernel(arguments, chunk)`, by its address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [WORD, WORD])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), list(values[1:]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
