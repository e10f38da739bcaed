"""Products of tiles. Triton's interpreter takes bfloat16 for integers there: it gets float32."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, out, PRECISION: tl.constexpr):
    """a @ b + out, in float32; out may be None. PRECISION: of float32 elements, see `tl.dot`."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, out, input_precision=PRECISION)
