"""Quantised residuals: the storage of `lrq`, `int8` and `int4`, and what it means, in plain torch.

An input group (q/k/v, gate/up) is one matrix W (m × n) here, its members' rows stacked:

    y = Q x  +  A (B x)  +  Σ_{j : |x_j| > t_j} E_j x_j

`Q`     4 or 8 bits, always read: W in groups of 64 or 32 inputs with one scale (and, if asymmetric, one zero) each.
`A B`   the always-on subspace: a low-rank correction of the rounding error, 8 bits with a scale per component.
`E`     the refinement plane, 4 bits, stored by column: channel j is read by the tokens whose x_j exceeds t_j.

`QuantizedGroup.reference` is the oracle. Kernels that read the packed bytes are behind the operator `quantized_linear`:
y from the tensors of a group, or from a table that says where they are. Backends in `ops` register them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankgate.core import ELSEWHERE, ChannelGate, GroupedLinear, LinearGroup, frozen, operators, widen
from rankgate.errors import RankgateError

GROUP = 64  # inputs of a block, which codes are padded to and packed in: one group with one scale, or two
GROUP_SIZES = (GROUP, GROUP // 2)
COLUMN_ROWS = 128  # rows of a column that lie side by side: 64 bytes, one cache line
PART_DTYPES = (  # of `QuantizedGroup.parts`
    *((torch.uint8, torch.int8), (torch.bfloat16,), (torch.int8,)),
    *((torch.int8,), (torch.int8,), (torch.float32,)),
    *((torch.uint8,), *((torch.bfloat16,),) * 3),
)
NIBBLE_ZERO = 8  # what the nibble of a weight of zero is on a symmetric grid


@dataclass(frozen=True)
class Grid:
    """Which values codes stand for: W ≈ s (q − z), s and z shared by `group_size` inputs of a row.

    bits: 4 or 8. symmetric: z is `offset`, and not stored. Raises RankgateError for other bits and group sizes.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int = GROUP

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RankgateError(f"{self.bits} bits are not supported; use 4 or 8")
        if self.group_size not in GROUP_SIZES:
            raise RankgateError(f"a group size of {self.group_size} is not supported; use 32 or 64")

    @property
    def low(self) -> int:
        """The lowest code."""
        return 0 if self.bits == 4 else -128

    @property
    def high(self) -> int:
        return 15 if self.bits == 4 else 127

    @property
    def offset(self) -> int:
        """The code of zero on a symmetric grid."""
        return NIBBLE_ZERO if self.bits == 4 else 0


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0…15 (rows × multiple of 64) as bytes (rows × half): of each 64, the first 32 are the low nibbles."""
    blocks: Tensor = codes.to(torch.uint8).unflatten(-1, (-1, 2, GROUP // 2))
    return (blocks[..., 0, :] | (blocks[..., 1, :] << 4)).flatten(-2)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`: uint8 codes 0…15."""
    blocks: Tensor = packed.unflatten(-1, (-1, GROUP // 2))
    return torch.stack([blocks & 15, blocks >> 4], dim=-2).flatten(-3)


def pad_to_group(x: Tensor, value: float = 0) -> Tensor:
    """`x` with its last dimension padded to a multiple of 64."""
    return F.pad(x, (0, -x.shape[-1] % GROUP), value=value)


class Packed(nn.Module):
    """Casting a model leaves its tensors as they are stored: they belong to codes, not to activations."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        def moved(tensor: Tensor) -> Tensor:
            cast = fn(tensor)
            return cast if cast.dtype == tensor.dtype else tensor.to(cast.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def as_stored(tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Tensor:
    """`tensor`, which kernels read as bytes, given back the first of `dtypes` if something has widened it.

    Helpers that assign `.data` get past `Packed` (peft's `prepare_model_for_kbit_training` widens all of 16 bits).
    Raises RankgateError if it was narrowed, or is not on `device`.
    """
    if tensor.device != device or device.type == "meta":
        raise RankgateError(ELSEWHERE)
    if tensor.dtype not in dtypes:
        if not tensor.is_floating_point() or tensor.dtype.itemsize <= dtypes[0].itemsize:
            raise RankgateError(f"stored values of a quantised layer were cast to {tensor.dtype}; load the model again")
        tensor.data = tensor.data.to(dtypes[0])
    return tensor


class QuantizedMatrix(Packed):
    """W ≈ s (q − z), groups of 64 or 32 along n.

    codes: (m, ⌈n/64⌉·64) int8, or (m, ⌈n/64⌉·32) uint8 holding two 4-bit codes each.  scale: (m, groups) bfloat16.
    zero: (m, groups) int8, or None on a symmetric grid (z = 8 at 4 bits, 0 at 8).  groups: ⌈n/64⌉, or twice as many.
    """

    def __init__(self, n: int, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        super().__init__()
        self.n = n
        self.codes, self.scale = frozen(codes), frozen(scale)
        self.zero = None if zero is None else frozen(zero)

    @classmethod
    def pack(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> QuantizedMatrix:
        """From integer codes (m × n): 0…15 at 4 bits, −128…127 at 8."""
        padded = pad_to_group(codes, value=NIBBLE_ZERO if bits == 4 else 0)
        stored = pack_nibbles(padded) if bits == 4 else padded.to(torch.int8)
        return cls(codes.shape[1], stored.contiguous(), scale.to(torch.bfloat16), zero)

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def m(self) -> int:
        return self.codes.shape[0]

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] * 8 // self.bits // self.scale.shape[1]

    def rows(self, which: slice | Tensor) -> QuantizedMatrix:
        """Some of its rows: views of them for a slice, copies for indices."""
        zero = None if self.zero is None else self.zero.detach()[which]
        return QuantizedMatrix(self.n, self.codes.detach()[which], self.scale.detach()[which], zero)

    def columns(self, start: int, stop: int) -> QuantizedMatrix:
        """Columns start … stop, whole blocks of 64."""

        def part(tensor: Tensor) -> Tensor:
            per_block = tensor.shape[1] // -(-self.n // GROUP)
            return tensor.detach()[:, start // GROUP * per_block : stop // GROUP * per_block].contiguous()

        zero = None if self.zero is None else part(self.zero)
        return QuantizedMatrix(stop - start, part(self.codes), part(self.scale), zero)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (m × n)."""
        codes = unpack_nibbles(self.codes).to(torch.int8) if self.bits == 4 else self.codes
        grouped = codes.unflatten(-1, (self.scale.shape[1], -1)).float()
        zero: Tensor | int = NIBBLE_ZERO if self.bits == 4 else 0
        if self.zero is not None:
            zero = self.zero.float()[..., None]
        W: Tensor = grouped.sub_(zero).mul_(self.scale.float()[..., None])
        return W.flatten(-2)[:, : self.n].to(dtype)


class LowRank(Packed):
    """A diag(s) B with A: (m, r) int8, B: (r, n) int8 and s: (r,) float32."""

    def __init__(self, A: Tensor, B: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.A, self.B, self.scale = frozen(A), frozen(B), frozen(scale)

    @classmethod
    def round(cls, A: Tensor, B: Tensor) -> LowRank:
        """The nearest 8-bit factors of A (m × r) and B (r × n)."""
        a, b = (v.abs().amax(dim).clamp_min(1e-20) / 127 for v, dim in ((A, 0), (B, 1)))
        left, right = ((v / s).round().to(torch.int8).contiguous() for v, s in ((A, a), (B, b[:, None])))
        return cls(left, right, (a * b).float())

    @property
    def rank(self) -> int:
        return self.B.shape[0]

    def dequantize(self) -> Tensor:
        """The product (m × n), float32."""
        return (self.A.float() * self.scale) @ self.B.float()

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return F.linear(F.linear(x, self.B.to(dtype)) * self.scale.to(dtype), self.A.to(dtype))


class Refinement(Packed):
    """E_ij = row_i column_j (code_ij − 8), 4 bits, so stored that a thread reads channel j of its rows in one piece.

    codes: 32 n ⌈m/64⌉ uint8: for every 128 rows, and at last perhaps 64, column after column (see `_strips`).
    row: (m,), column: (n,) and threshold: (n,), bfloat16; see `ChannelGate`.
    """

    def __init__(self, m: int, codes: Tensor, row: Tensor, column: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.m = m
        self.codes, self.row, self.column = frozen(codes), frozen(row), frozen(column)
        self.gate = ChannelGate(threshold)

    @classmethod
    def pack(cls, codes: Tensor, row: Tensor, column: Tensor, threshold: Tensor) -> Refinement:
        """From codes 0…15 (m × n)."""
        m = codes.shape[0]
        padded = F.pad(codes, (0, 0, 0, -m % GROUP), value=NIBBLE_ZERO)
        stored = [pack_nibbles(strip.mT).flatten() for strip in _strips(padded) if strip.numel()]
        return cls(m, torch.cat(stored), *(v.to(torch.bfloat16) for v in (row, column, threshold)))

    def unpack(self) -> Tensor:
        """Undo `pack`: uint8 codes 0…15 (m × n)."""
        n, rows = len(self.column), -(-self.m // GROUP) * GROUP
        codes = torch.empty(rows, n, dtype=torch.uint8, device=self.codes.device)
        start = 0
        for strip in _strips(codes):
            width = strip.shape[-2] // 2
            stored = self.codes[start : start + strip.numel() // 2].view(*strip.mT.shape[:-1], width)
            strip.copy_(unpack_nibbles(stored).mT)
            start += strip.numel() // 2
        return codes[: self.m]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """E (m × n)."""
        codes = self.unpack().float() - NIBBLE_ZERO
        return (codes * self.row.float()[:, None] * self.column.float()).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.gate.shared(x, id(self)), self.dequantize(x.dtype))


def _strips(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a matrix (multiple of 64 × n): strips of 128 rows (count × 128 × n), and the 64 that may remain."""
    whole = len(rows) // COLUMN_ROWS * COLUMN_ROWS
    return rows[:whole].unflatten(0, (-1, COLUMN_ROWS)), rows[whole:]


class QuantizedGroup(LinearGroup):
    """y = Q x + A (B x) + Σ_{j : |x_j| > t_j} E_j x_j."""

    def __init__(self, base: QuantizedMatrix, low_rank: LowRank | None, refinement: Refinement | None) -> None:
        super().__init__(base.m, base.n)
        self.base, self.low_rank, self.refinement = base, low_rank, refinement
        self._table = _no_table()
        self._described: list[tuple[int, torch.dtype] | None] = []  # the storage that it is of

    @classmethod
    def empty(cls, m: int, n: int, bits: int, symmetric: bool, *, rank: int, refined: bool) -> QuantizedGroup:
        """A group of these dimensions, its tensors not filled in."""
        blocks = -(-n // GROUP)
        codes = torch.empty(m, blocks * GROUP // 2, dtype=torch.uint8)
        if bits == 8:
            codes = torch.empty(m, blocks * GROUP, dtype=torch.int8)
        zero = None if symmetric else torch.empty(m, blocks, dtype=torch.int8)
        base = QuantizedMatrix(n, codes, torch.empty(m, blocks, dtype=torch.bfloat16), zero)
        low_rank = refinement = None
        if rank:
            A, B = (torch.empty(shape, dtype=torch.int8) for shape in ((m, rank), (rank, n)))
            low_rank = LowRank(A, B, torch.empty(rank, dtype=torch.float32))
        if refined:
            packed = torch.empty(-(-m // GROUP) * n * GROUP // 2, dtype=torch.uint8)
            row, column = (torch.empty(size, dtype=torch.bfloat16) for size in (m, n))
            refinement = Refinement(m, packed, row, column, torch.empty_like(column))
        return cls(base, low_rank, refinement)

    @classmethod
    def of(cls, n: int, parts: list[Tensor | None]) -> QuantizedGroup:
        """The group with n inputs whose `parts` these are."""
        codes, scale, zero, A, B, component, plane, row, column, threshold = parts
        assert codes is not None and scale is not None
        base = QuantizedMatrix(n, codes, scale, zero)
        low_rank = refinement = None
        if A is not None and B is not None and component is not None:
            low_rank = LowRank(A, B, component)
        if plane is not None and row is not None and column is not None and threshold is not None:
            refinement = Refinement(base.m, plane, row, column, threshold)
        return cls(base, low_rank, refinement)

    def forward(self, x: Tensor) -> Tensor:
        """By a kernel that reads packed bytes, where the device has one for so many tokens."""
        cpu = x.device.type == "cpu"
        if self.watched or x.requires_grad or x.dtype == torch.float64 or not (cpu or x.is_cuda):
            return self.reference(x)
        linear = torch.ops.rankgate.quantized_linear
        y: Tensor
        if cpu and not torch.compiler.is_compiling():  # a graph outlives addresses
            y = linear(x, self.table(), self.m)
        else:
            y = linear.parts(x, self.parts)
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The definition, in float32 or better."""
        wide = widen(x)
        y = F.linear(wide, self.base.dequantize(wide.dtype))
        if self.low_rank is not None:
            y += self.low_rank(wide)
        if self.refinement is not None:
            y += self.refinement(wide)
        return y.to(x.dtype)

    @property
    def gate(self) -> ChannelGate | None:
        return None if self.refinement is None else self.refinement.gate

    @property
    def tensors(self) -> list[Tensor | None]:
        base, low, fine = self.base, self.low_rank, self.refinement
        return [
            *(base.codes, base.scale, base.zero),
            *((None,) * 3 if low is None else (low.A, low.B, low.scale)),
            *((None,) * 4 if fine is None else (fine.codes, fine.row, fine.column, fine.gate.threshold)),
        ]

    @property
    def parts(self) -> list[Tensor | None]:
        """The tensors that kernels read: codes, scale, zero; A, B, s; codes, row, column and threshold of the plane.

        Raises RankgateError if one of them is not `as_stored`.
        """
        device = self.base.codes.device
        return [
            None if tensor is None else as_stored(tensor, dtypes, device)
            for tensor, dtypes in zip(self.tensors, PART_DTYPES, strict=True)
        ]

    def table(self) -> int:
        """Address of the group's `table_of`, written anew when storage has changed: captured steps keep the address."""
        if self._described != self._storage():
            self._table[:] = table_of(self.n, self.parts)
            self._described = self._storage()
        return self._table.ctypes.data

    def _storage(self) -> list[tuple[int, torch.dtype] | None]:
        return [None if tensor is None else (tensor.data_ptr(), tensor.dtype) for tensor in self.tensors]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_table": _no_table(), "_described": []}

    def extra_repr(self) -> str:
        rank = self.low_rank.rank if self.low_rank else 0
        return f"bits={self.base.bits}, rank={rank}, refined={self.refinement is not None}"


def _no_table() -> np.ndarray:
    """Room for a `table_of`, whose address is one for good: another thread may have read it already."""
    return np.zeros(5 + len(PART_DTYPES), np.int64)


def table_of(n: int, parts: list[Tensor | None]) -> np.ndarray:
    """int64: m, n, bits of Q, its groups in a block of 64, rank of A B, and the addresses of `QuantizedGroup.parts`.

    An address is 0 where there is no such part.

    For a kernel that is called for every token: unpacking ten tensors would cost more than a small product. Valid while
    the tensors stay where they are.
    """
    codes, scale, _, A, *_ = parts
    assert codes is not None and scale is not None and all(part is None or part.is_contiguous() for part in parts)
    bits, rank = 4 if codes.dtype == torch.uint8 else 8, 0 if A is None else A.shape[1]
    shape = [codes.shape[0], n, bits, groups_of(scale, n), rank]
    return np.array(shape + [0 if part is None else part.data_ptr() for part in parts], np.int64)


def groups_of(scale: Tensor, n: int) -> int:
    """1 or 2: groups in a block of 64, of a matrix with n inputs and this scale."""
    return scale.shape[1] // -(-n // GROUP)


def linear(x: Tensor, parts: list[Tensor | None]) -> Tensor:
    """`QuantizedGroup.reference` of its parts."""
    return QuantizedGroup.of(x.shape[-1], parts).reference(x)


operators.define("quantized_linear(Tensor x, int table, int m) -> Tensor")
operators.impl("quantized_linear", lambda x, table, m: x.new_empty((*x.shape[:-1], m)), "Meta")
operators.define("quantized_linear.parts(Tensor x, Tensor?[] parts) -> Tensor")
operators.impl("quantized_linear.parts", linear, "CompositeExplicitAutograd")
operators.impl("quantized_linear.parts", lambda x, parts: x.new_empty((*x.shape[:-1], parts[0].shape[0])), "Meta")


class QuantizedHead(GroupedLinear):
    """An output embedding: all rows of its group.

    Some models ask for the dtype or shape of `weight`; it has both, of the dense one, but no data (meta device).
    """

    def __init__(self, group: QuantizedGroup, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(group, 0, group.m, bias)
        self.weight = torch.empty(group.m, group.n, dtype=dtype, device="meta")
