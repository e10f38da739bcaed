"""Compile every kernel for a real GPU, on a machine that may have none. Run by test_gpu_kernels.py in a process
without TRITON_INTERPRET: the interpreter accepts programs that the compiler does not.
"""

import ctypes
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from rankgate.ops.gpu import attention as attention_gpu
from rankgate.ops.gpu import chosen as chosen_gpu
from rankgate.ops.gpu import fragments as fragments_gpu
from rankgate.ops.gpu import gated as gated_gpu
from rankgate.ops.gpu import gathered as gathered_gpu
from rankgate.ops.gpu import launch as launch_gpu
from rankgate.ops.gpu import quantized as quantized_gpu
from rankgate.ops.gpu import refined as refined_gpu
from rankgate.ops.gpu import rounding as rounding_gpu
from rankgate.ops.gpu import select as select_gpu
from rankgate.ops.gpu import united as united_gpu
from rankgate.ops.gpu import windows as windows_gpu

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
        large = {**dict.fromkeys(("m", "n", "k", "blocks"), 1 << 12), "out": torch.empty(1 << 12, device="meta")}
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


def nvrtc() -> ctypes.CDLL:
    """Of the package nvidia-cuda-nvrtc."""
    (folder,) = importlib.util.find_spec("nvidia").submodule_search_locations
    first, second = (next(Path(folder).glob(f"cu*/lib/{name}.so*")) for name in ("libnvrtc-builtins", "libnvrtc"))
    ctypes.CDLL(str(first), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(second))


def build_cuda(library: ctypes.CDLL, name: str, **values: int) -> None:
    """NAME.cu for these values of its macros, for Ampere and Hopper."""
    for architecture in (b"sm_80", b"sm_90"):
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        text = launch_gpu.source(name, **values, OVERLAP=int(architecture == b"sm_90")).encode()
        assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"program.cu", 0, None, None) == 0
        options = (ctypes.c_char_p * 1)(b"--gpu-architecture=" + architecture)
        failed = library.nvrtcCompileProgram(program, 1, options)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        assert not failed, log.value.decode()
    print(name, values)


def attention(dtype: torch.dtype) -> None:
    """Of new tokens."""
    shape = {"SHARE": 3, "LINES": 16, "width": 64, "value_width": 60, "WIDTH": 64, "VALUE": 64, "OVERLAP": True}
    shape |= {"BLOCK": 128, "SPLITS": attention_gpu.SPLITS}
    cache = {"cache": I64, "counters": I64, "position": I64, "parts": F32, "sums": F32}
    numbers = {"groups": 2, "scale": 0.1, "window": 9, "cap": 2.5}
    for rule, step in ((False, 0), (True, 0), (False, 128)):
        constants = {**shape, "STEP": step, **dict.fromkeys(("WINDOW", "CAP", "SINKS"), rule)}
        given = {**dict.fromkeys(("q", "k", "v", "out"), dtype), "sinks": F32 if rule else dtype}
        build(attention_gpu._attend, constants, pdl=True, **given, **cache, **numbers, num_warps=8)


def few_keys(dtype: torch.dtype) -> None:
    """Choosing representatives, and attention of a whole text to them and to windows."""
    for even, kept in itertools.product((False, True), repeat=2):
        shape = {"STEP": 128, "TILE": 64, "WIDTH": 64, "VALUE": 128, "EVEN": even, "KEPT": kept}
        lists = {"table": I32, "ends": I32, "bias": F32 if kept else dtype, "scale": 0.1}
        sizes = dict.fromkeys(("tokens", "sinks", "kept", "heads", "share", "width", "value_width"), 3)
        strides = {f"{name}_{of}": 1 << 10 for name in "qkv" for of in ("head", "token")}
        tensors = dict.fromkeys(("q", "k", "v", "out", "kept_keys", "kept_values"), dtype)
        build(windows_gpu._attend_windows, shape, **tensors, **lists, **sizes, **strides, num_warps=8)
    shape = {"TILE": select_gpu.TILE, "DEPTH": select_gpu.DEPTH}
    chunk = {"CHUNK": select_gpu.CHUNK, "TILE": select_gpu.TILE}
    sizes = {"tokens": 300, "width": 64, "start": 1 << 10, "num_warps": 8}
    lists = {"least": F32, "near": I32, "found": I32, "counts": I32, "taken": I8, "chosen": I8}
    pairs = {"rows": I64, "columns": I32, "ends": I32, "best": F32, "place": I32, "count": 9, "capacity": 9}
    build(select_gpu._within, {**shape, **chunk}, x=dtype, **lists, **sizes)
    build(select_gpu._against, {**shape, "SPLITS": 4}, x=dtype, **lists, **sizes)
    build(select_gpu._settle, chunk, **lists, **sizes)
    build(select_gpu._nearest, {**shape, "SPLITS": 4}, x=dtype, **pairs, **sizes)


def main() -> None:
    library = nvrtc()
    for bits, zero, half, tokens, groups in itertools.product((4, 8), (0, 1), (0, 1), (2, 16, 64), (1, 2)):
        shape = fragments_gpu.shape(tokens, 4096 if half else 16384, bits)
        build_cuda(library, "fragments", **shape, BITS=bits, ZERO=zero, GROUPS=groups, HALF=half)
    for tokens, refined, half in itertools.product((2, 16, 64), (0, 1), (0, 1)):
        build_cuda(library, "united", COLUMNS=united_gpu.columns(tokens), REFINED=refined, HALF=half)
    for bits, zero, half, more, groups in itertools.product((4, 8), (0, 1), (0, 1), (0, 1), (1, 2)):
        numbers = {"BITS": bits, "ZERO": zero, "GROUPS": groups, "HALF": half, "STEPS": 2 * more, "REFINED": more}
        build_cuda(library, "unpack", **numbers)
    low = {"B": I8, "factor": F32, "A": I8, "low": F32, "rank": 16}
    lists: dict[str, Any] = {"column": torch.bfloat16, "threshold": torch.bfloat16, "lists": 4}
    lists |= {"channels": I32, "scaled": F32, "counts": I32}
    plane = {"plane": U8, "row_factor": torch.bfloat16, "extra": F32, "projections": 8}
    choice = dict.fromkeys(("tables", "chosen"), I64)
    size = {"tokens": 3, "m": 129, "n": 577, "blocks": 10}
    for dtype in (torch.bfloat16, torch.float32):
        for bits, zero, split in itertools.product((4, 8), (None, I8), (1, 2)):
            constants = {
                "BITS": bits,
                "ZERO": zero is not None,
                "SPLIT": split,
                "BATCH": 4,
                "PARTS": 0,
                "OVERLAP": True,
            }
            codes = {"codes": U8 if bits == 4 else I8, "scale": torch.bfloat16, "zero": zero, "one": 1 << 20}
            build(quantized_gpu._multiply, constants, pdl=True, x=dtype, out=dtype, extra=None, **codes, **size)
            constants.pop("BATCH")
            build(
                chosen_gpu._multiply, constants, pdl=True, x=dtype, out=dtype, extra=None, **choice, one=1 << 20, **size
            )
        both = {"RANK": 16, "REFINED": True, "LISTING": 1024, "OVERLAP": True}
        build(refined_gpu.produce, {**both, "CHUNK": 512}, pdl=True, x=dtype, **low, **lists, **size)
        more = {"x": dtype, "chunks": 2, **low, **lists, **choice, **size}
        build(chosen_gpu._produce, {**both, "CHUNK": 512}, pdl=True, **more)
        for gated in (True, False):
            more = {"parts": F32, "norms": F32, "k": 130, "x": dtype, "B": dtype, "A": dtype, **size}
            constants = {"GATED": gated, "CHUNKS": 2, "OVERLAP": True}
            build(gated_gpu._project, {**constants, "ROWS": 2, "CHUNK": 512}, pdl=True, **more)
            more |= {"y": dtype, "W": dtype if gated else None, "limit": 0.1}
            build(gated_gpu._combine, constants, pdl=True, **more)
        sums = {"z": F32, "narrow": dtype, "fire": I8, "k": 130, "limit": 0.1}
        build(gathered_gpu._gate, {"BLOCK": gathered_gpu.BLOCK}, x=dtype, **sums, **size)
        for tokens in (16, 128):
            shape = gathered_gpu.shape(tokens)
            shape.pop("num_stages")
            more = {"num_warps": shape.pop("num_warps", 4), "fire": I8}
            more |= dict.fromkeys(("order", "count"), I64 if shape["LISTED"] else None)
            build(gathered_gpu._multiply, shape, x=dtype, W=dtype, y=dtype, **more, **size)
        attention(dtype)
        few_keys(dtype)
    codes = {"codes": U8, "scale": torch.bfloat16, "zero": None, "one": 1 << 20}
    half, constants = torch.float16, {"BITS": 4, "ZERO": False, "SPLIT": 1, "BATCH": 1, "PARTS": 2, "OVERLAP": True}
    build(quantized_gpu._multiply, constants, pdl=True, x=half, out=half, extra=F32, **codes, **size)
    constants.pop("BATCH")
    build(chosen_gpu._multiply, constants, pdl=True, x=half, out=half, extra=F32, **choice, one=1 << 20, **size)
    constants = {**both, "CHUNKS": 8, "PARTS": 2, "LISTS": 2, "TOGETHER": 64, "SLOTS": 8}
    build(refined_gpu.refine, constants, pdl=True, **low, **lists, **plane, **size)
    build(chosen_gpu._refine, constants, pdl=True, chunks=2, extra=F32, **low, **lists, **choice, **size)
    matrices = dict.fromkeys(("rows", "s", "z", "U", "codes", "errors"), F32)
    build(rounding_gpu._round_block, {"B": 64, "M": 32}, **matrices, count=64, m=129, low=0.0, high=15.0)


if __name__ == "__main__":
    main()
