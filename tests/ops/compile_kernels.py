"""Compile every Triton kernel for a real GPU, on a machine that may have none. Run by test_gpu_kernels.py in a process
without TRITON_INTERPRET: the interpreter accepts programs that the compiler does not.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from rankgate.ops.gpu import attention as attention_gpu
from rankgate.ops.gpu import gated as gated_gpu
from rankgate.ops.gpu import many as many_gpu
from rankgate.ops.gpu import quantized as quantized_gpu
from rankgate.ops.gpu import refined as refined_gpu
from rankgate.ops.gpu import rounding as rounding_gpu
from rankgate.ops.gpu import unpack as unpack_gpu

HOPPER = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
F32, I32, I64, I8, U8 = torch.float32, torch.int32, torch.int64, torch.int8, torch.uint8


def build(kernel: Any, constants: dict[str, Any], pdl: bool = False, **arguments: Any) -> None:
    """In every shape that it may be tuned to. arguments: a dtype for a pointer, None, or a number."""
    if isinstance(kernel, Autotuner):
        large = dict.fromkeys(("m", "n", "k", "blocks"), 1 << 12)
        possible = kernel.early_config_prune(kernel.configs, large, **constants)
        assert possible
        for config in possible:
            build(kernel.fn, {**constants, **config.kwargs}, pdl, **arguments, num_warps=config.num_warps)
        return
    options = {"launch_pdl": pdl, "num_warps": arguments.pop("num_warps", 4)}
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else arguments[name]
        if name in constants or value is None:
            signature[name], fixed[place,] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[name], attributes[place,] = f"*{NAMES[value]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    triton.compile(ASTSource(kernel, signature, fixed, attributes), target=HOPPER, options=options)
    print(kernel.fn.__name__, {name: value for name, value in constants.items() if name != "OVERLAP"})


def main() -> None:
    low = {"B": I8, "factor": F32, "A": I8, "low": F32, "rank": 16}
    lists: dict[str, Any] = {"column": torch.bfloat16, "threshold": torch.bfloat16, "lists": 4}
    lists |= {"channels": I32, "scaled": F32, "counts": I32}
    plane = {"plane": U8, "row_factor": torch.bfloat16, "extra": F32, "projections": 8}
    size = {"tokens": 3, "m": 129, "n": 577, "blocks": 10}
    for dtype in (torch.bfloat16, torch.float32):
        for bits, zero in ((4, None), (4, I8), (8, None)):
            constants = {"BITS": bits, "ZERO": zero is not None, "BATCH": 4, "PARTS": 0, "OVERLAP": True}
            codes = {"codes": U8 if bits == 4 else I8, "scale": torch.bfloat16, "zero": zero, "one": 1 << 20}
            build(quantized_gpu._multiply, constants, pdl=True, x=dtype, out=dtype, extra=None, **codes, **size)
        both = {"RANK": 16, "REFINED": True, "LISTING": 1024, "OVERLAP": True}
        build(refined_gpu._produce, {**both, "CHUNK": 512}, pdl=True, x=dtype, **low, **lists, **size)
        for gated in (True, False):
            more = {"parts": F32, "norms": F32, "k": 130, "x": dtype, "B": dtype, "A": dtype, **size}
            constants = {"GATED": gated, "CHUNKS": 2, "OVERLAP": True}
            build(gated_gpu._project, {**constants, "ROWS": 2, "CHUNK": 512}, pdl=True, **more)
            more |= {"y": dtype, "W": dtype if gated else None, "limit": 0.1}
            for batch in (1, 4):
                build(gated_gpu._combine, {**constants, "BATCH": batch}, pdl=True, **more)
        constants = {"WIDTH": 64, "VALUE": 64, "BLOCK": 128, "SPLITS": 8, "OVERLAP": True}
        cache = {"cache": I64, "counters": I64, "position": I64, "parts": F32, "sums": F32}
        numbers = {"heads": 6, "share": 3, "width": 64, "value_width": 64, "scale": 0.1}
        build(attention_gpu._attend, constants, pdl=True, q=dtype, k=dtype, v=dtype, out=dtype, **cache, **numbers)
    codes = {"codes": U8, "scale": torch.bfloat16, "zero": None, "one": 1 << 20}
    half, constants = torch.float16, {"BITS": 4, "ZERO": False, "BATCH": 1, "PARTS": 2, "OVERLAP": True}
    build(quantized_gpu._multiply, constants, pdl=True, x=half, out=half, extra=F32, **codes, **size)
    constants = {**both, "CHUNKS": 8, "PARTS": 2, "LISTS": 2, "TOGETHER": 64, "SLOTS": 8}
    build(refined_gpu._refine, constants, pdl=True, **low, **lists, **plane, **size)
    counts = {"sums": F32, "counts": I32, "chunks": 2, "counters": 4}
    for dtype, bits, zero, refined in ((torch.bfloat16, 4, None, True), (half, 8, I8, False), (half, 4, I8, True)):
        packed = {"codes": U8 if bits == 4 else I8, "scale": torch.bfloat16, "zero": zero}
        form = {"BITS": bits, "ZERO": zero is not None}
        more = {"RANK": 16, "REFINED": refined, "BATCH": 16, "ROWS": 128, "GROUPS": 2, "SPLITS": 4, "INPUTS": 64}
        given = {**plane, **lists, **low, **size, **packed, **counts, "x": dtype, "out": dtype}
        build(many_gpu._multiply, {**form, **more}, **given)
        build(many_gpu._project, {"RANK": 16, "BATCH": 16, "CHUNK": 512, "INPUTS": 128, "COUNTERS": 1024}, **given)
        build(unpack_gpu._unpack, {**form, "ROWS": 64, "GROUPS": 4}, W=dtype, start=0, **packed, **size)
        build(unpack_gpu._unpack_both, form, W=dtype, start=0, **packed, **plane, **lists, **size)
    matrices = dict.fromkeys(("rows", "s", "z", "U", "codes", "errors"), F32)
    build(rounding_gpu._round_block, {"B": 64, "M": 32}, **matrices, count=64, m=129, low=0.0, high=15.0)


if __name__ == "__main__":
    main()
