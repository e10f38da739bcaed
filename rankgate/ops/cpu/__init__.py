"""The backend of the CPU (Numba)."""

from rankgate.ops.register import register

register("quantized_linear", "CPU", "rankgate.ops.cpu.many.linear")
register("quantized_linear.parts", "CPU", "rankgate.ops.cpu.many.linear_of")
register("chosen_linear", "CPU", "rankgate.ops.cpu.quantized.chosen")
register("attend", "CPU", "rankgate.ops.cpu.attention.attend")
register("attend_held", "CPU", "rankgate.ops.cpu.attention.attend_held")
register("round_block", "CPU", "rankgate.ops.cpu.rounding.round_block")
