"""Kernels, behind operators that the definitions call (`torch.ops.rankgate`).

An operator is defined where its mathematics is, with the definition as its implementation on every device. A backend
registers what it does better, below; nobody above chooses between kernels.

    operator                device  tokens  kernel
    ----------------------  ------  ------  ------------------------------------------------------------
    gated                   CUDA    1-      ops/gpu/gathered.py    gated.py, cuBLAS, what gates open
    quantized_linear        CPU     1-      ops/cpu/many.py        from a table of addresses, eagerly
    quantized_linear.parts  CPU     1-      ops/cpu/many.py        the same in a graph
    quantized_linear.parts  CUDA    1-      ops/gpu/linear.py      quantized.py, fragments.py, unpack.py
    chosen_linear           CPU     1-      ops/cpu/quantized.py   each token by an expert of its own
    chosen_linear.parts     CUDA    1-      ops/gpu/chosen.py      the same for a CUDA graph
    attend                  CPU     1-1     ops/cpu/attention.py   over the cache of a layer
    attend_held             CPU     1-1     ops/cpu/attention.py   over what its heads still hold
    attend_at               CUDA    1-      ops/gpu/attention.py   over a cache found through a table
    attend_held_at          CUDA    1-      ops/gpu/attention.py   over what its heads still hold, likewise
    round_block             CPU     -       ops/cpu/rounding.py    while converting
    round_block             CUDA    -       ops/gpu/rounding.py    while converting

A device that is missing, another number of tokens, or a dtype that a kernel does not take: the definition. One token of
`quantized_linear` is multiplied by `ops/cpu/quantized.py`. Beside the operators, captured steps on a CPU have dense
products (`ops/cpu/dense.py`) and chains of functions of every element (`ops/cpu/elementwise.py`), as rows of a program
that threads share (`ops/cpu/team.py`).
"""

from rankgate.ops import attention, rounding  # isort: split

from rankgate.ops import cpu, gpu

__all__ = ["attention", "cpu", "gpu", "rounding"]
