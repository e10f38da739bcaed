"""The backend of the CPU (Numba)."""

from rankgate.ops.register import register

register("quantized_gemv", "CPU", "rankgate.ops.cpu.quantized.gemv")
register("quantized_gemv.parts", "CPU", "rankgate.ops.cpu.quantized.gemv_of")
register("unpack", "CPU", "rankgate.ops.cpu.quantized.unpack")
register("attend", "CPU", "rankgate.ops.cpu.attention.attend")
register("round_block", "CPU", "rankgate.ops.cpu.rounding.round_block")
