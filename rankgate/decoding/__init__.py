"""Token by token, fast: captured steps, and exact mode on top of them."""

from rankgate.decoding.exact import Exact
from rankgate.decoding.loop import decode, fast_generate

__all__ = ["Exact", "decode", "fast_generate"]
