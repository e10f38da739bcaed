"""The idea, in plain torch: a linear layer as an always-on subspace plus a gated residual.

    y = A (B x)  +  gate(x) · R(x)  + bias          x: n   B: k × n   A: m × k   y: m

`B x` is the input seen from a k-dimensional subspace; `A` carries it to the outputs. What the subspace misses is the
residual R, and a gate decides token by token whether it is worth reading the weights that R needs. Reading k (m + n)
weights instead of m n is where the speed comes from; every token whose gate opens pays for the residual on top.

    gated (`gsi`):   B = Vᵀ with orthonormal rows and A = W V, the cached *weight image*. The residual is
                     W (x − V z), so a token with an open gate gets exactly W x. The gate opens when
                     ‖x − V z‖ > ε ‖x‖.
    ungated (`svd`, `asvd`):  A B approximates W and there is no residual.

This module is the oracle that faster kernels are tested against. It computes both branches with dense products and
branches on the host; it does not try to be fast, to fuse, or to avoid the device synchronisation of `fire.any()`.

It imports nothing of the project but its exception. What a kernel may do instead is an operator,
`torch.ops.rankgate.gated`, whose implementation for every device is the definition until a backend in `ops` registers a
better one for its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankgate.errors import RankgateError

T = TypeVar("T")
ELSEWHERE = "weights of a converted layer are offloaded, or not where its input is; keep the model on one device"
FEW = 8  # tokens up to which one matrix-vector product each is faster than unpacking the matrix


class Projection(NamedTuple):
    """A batch of tokens seen from a subspace."""

    z: Tensor  # (..., k)  B x
    ratio: Tensor | None  # (...)  ‖x − Bᵀ z‖ / ‖x‖, None without a gate
    fire: Tensor | None  # (...)  bool, ratio > ε: this token needs the residual


class Memo(NamedTuple, Generic[T]):
    """An answer, what it depends on beside the contents of the input, and who has had it."""

    x: weakref.ref[Tensor]
    state: object
    answer: T
    served: set[object]


class InputGroup(nn.Module, Generic[T]):
    """What the linears that read the same tensor (q/k/v, gate/up) share: the work is done once per input tensor.

    Subclasses define `forward(x)`; members call `shared(x)`, which returns the previous answer as long as it is asked
    about the very same tensor object, by the same thread, in the same gradient mode, and neither the tensor nor the
    group's own ones have changed; it forgets it with that object. Forward hooks therefore see every input once.
    Raises RankgateError if its tensors are not on the input's device: an operator would read what is not there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memos: dict[int, Memo[T]] = {}  # by thread

    def shared(self, x: Tensor, asker: object = None) -> T:
        """The answer to x. An `asker` gets the same one once: it may have changed it, or x where that does not show."""
        if torch.compiler.is_compiling():  # a weak reference would end the graph
            return self(x)  # type: ignore[no-any-return]
        thread, memos, state = threading.get_ident(), self._memos, self._state(x)
        memo = memos.get(thread)
        if memo is None or memo.x() is not x or memo.state != state or asker in memo.served:
            if any(t is not None and t.device != x.device for t in self.tensors):
                raise RankgateError(ELSEWHERE)
            memo = Memo(weakref.ref(x, lambda _: memos.pop(thread, None)), state, self(x), set())
            memos[thread] = memo
        if asker is not None:
            memo.served.add(asker)
        return memo.answer

    def _state(self, x: Tensor) -> object:
        """Equal as long as the answer to x is the same. Tensors of inference mode do not count their changes."""
        versions = [0 if t is None or t.is_inference() else t._version for t in (x, *self.tensors)]
        return versions, torch.is_grad_enabled()

    @property
    def tensors(self) -> Iterable[Tensor | None]:
        """What the answer depends on beside x."""
        return ()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_memos": {}}


class LinearGroup(InputGroup[Tensor]):
    """The members of an input group as one linear layer, their rows stacked: y (…, m) from x (…, n)."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.m, self.n = m, n
        self._traced: tuple[Tensor, Tensor] | None = None

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """y_start … y_stop, a view. A compiled graph asks once, too: from the first rows of an input to its last."""
        if not torch.compiler.is_compiling():
            return self.shared(x, start)[..., start:stop]
        if start == 0 or self._traced is None or self._traced[0] is not x:
            self._traced = x, self(x)
        y = self._traced[1]
        if stop == self.m:
            self._traced = None
        return y[..., start:stop]

    @property
    def gate(self) -> nn.Module | None:
        """The module whose answer says what is read of the residual; None without a gate."""
        raise NotImplementedError

    @property
    def watched(self) -> bool:
        """Whether somebody logs the gate, which kernels do not report."""
        return self.gate is not None and bool(self.gate._forward_hooks)


class Subspace(nn.Module):
    """`B` (k × n) and the tolerance ε of its gate. B has orthonormal rows, unless `eps=None`: there is no gate."""

    def __init__(self, B: Tensor, eps: float | None = None) -> None:
        super().__init__()
        self.B = frozen(B)
        self.eps = eps

    @property
    def rank(self) -> int:
        return self.B.shape[0]

    def forward(self, x: Tensor) -> Projection:
        return project(x, self.B, self.eps)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, in_features={self.B.shape[1]}, eps={self.eps}"


class GatedGroup(LinearGroup):
    """y = A (B x), or exactly W x for the tokens whose gate opens.

    Args:
        subspace: holds B.
        A: (m, k), the rows of all members.
        W: (m, n), read only by tokens whose gate opens; None exactly when the subspace has no gate.
    """

    def __init__(self, subspace: Subspace, A: Tensor, W: Tensor | None) -> None:
        if (W is None) != (subspace.eps is None):
            raise ValueError("a gate needs a residual weight W, and W needs a gate")
        super().__init__(A.shape[0], subspace.B.shape[1])
        self.subspace = subspace
        self.A = frozen(A)
        self.W = None if W is None else frozen(W)

    @property
    def rank(self) -> int:
        return self.subspace.rank

    @property
    def gate(self) -> Subspace | None:
        return None if self.subspace.eps is None else self.subspace

    @property
    def tensors(self) -> Iterable[Tensor | None]:
        return self.subspace.B, self.A, self.W

    def forward(self, x: Tensor) -> Tensor:
        """An operator where a graph cannot hold what is done: the branch that a gate is, a kernel of a GPU."""
        plain = self.gate is None and not (x.is_cuda and few(x))
        if plain or self.watched or x.requires_grad:
            return self.reference(x)
        y: Tensor = torch.ops.rankgate.gated(x, self.subspace.B, self.A, self.W, self.subspace.eps)
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The definition."""
        return answer(x, self.subspace(x), self.A, self.W)


class GroupedLinear(nn.Module):
    """Rows start … stop of a group, and a bias (stop − start,) or None."""

    def __init__(self, group: LinearGroup, start: int, stop: int, bias: Tensor | None) -> None:
        super().__init__()
        self.group, self.start, self.stop = group, start, stop
        self.bias = None if bias is None else frozen(bias)

    @property
    def in_features(self) -> int:
        return self.group.n

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    def forward(self, x: Tensor) -> Tensor:
        y = self.group.rows(x, self.start, self.stop)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ChannelGate(InputGroup[Tensor]):
    """Which channels of x a token needs: |x_j| > t_j, a bool mask (..., n). `threshold` t: (n,)."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold = frozen(threshold)

    @property
    def tensors(self) -> Iterable[Tensor | None]:
        return (self.threshold,)

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() > self.threshold


class SparseLinear(nn.Module):
    """y = Σ_{j : |x_j| > t_j} W_j x_j + bias: columns of W (m × n) are the residual, and there is no subspace."""

    def __init__(self, gate: ChannelGate, W: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.gate = gate
        self.W = frozen(W)
        self.bias = None if bias is None else frozen(bias)

    @property
    def in_features(self) -> int:
        return self.W.shape[1]

    @property
    def out_features(self) -> int:
        return self.W.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.gate.shared(x, id(self)), self.W, self.bias)


def project(x: Tensor, B: Tensor, eps: float | None) -> Projection:
    """x (…, n) seen from B (k × n).

    The gate's statistic is computed in float32 (or better) whatever the dtype of the model, because it is a difference
    of nearly equal vectors.
    """
    if eps is None:
        return Projection(F.linear(x, B), None, None)
    wide = widen(x)
    B = B.to(wide.dtype)
    z = F.linear(wide, B)  # (..., k)
    residual = wide - F.linear(z, B.T)  # (..., n)
    ratio = norm_ratio(residual, wide)
    return Projection(z.to(x.dtype), ratio, ratio > eps)


def answer(x: Tensor, seen: Projection, A: Tensor, W: Tensor | None) -> Tensor:
    """A z (…, m), or W x for the tokens whose gate opens. A: m × k, W: m × n."""
    y = F.linear(seen.z, A)
    if seen.fire is not None and seen.fire.any():
        assert W is not None
        y[seen.fire] = F.linear(x[seen.fire], W)
    return y


def gated(x: Tensor, B: Tensor, A: Tensor, W: Tensor | None, eps: float | None) -> Tensor:
    """`GatedGroup.reference` of its tensors."""
    return answer(x, project(x, B, eps), A, W)


def chosen_gated(
    x: Tensor, chosen: Tensor, B: list[Tensor], A: list[Tensor], W: list[Tensor], eps: float | None
) -> Tensor:
    """Row s of y (rows, m) is row s of x (rows, n) by group chosen_s, whose tensors these are; no W without a gate."""
    rows = zip(x, chosen.tolist(), strict=True)
    return torch.stack([gated(row, B[e], A[e], W[e] if W else None, eps) for row, e in rows])


operators = torch.library.Library("rankgate", "DEF")
operators.define("gated(Tensor x, Tensor B, Tensor A, Tensor? W, float? eps) -> Tensor")
operators.impl("gated", gated, "CompositeExplicitAutograd")
operators.impl("gated", lambda x, B, A, W, eps: x.new_empty((*x.shape[:-1], A.shape[0])), "Meta")
operators.define("chosen_gated(Tensor x, Tensor chosen, Tensor[] B, Tensor[] A, Tensor[] W, float? eps) -> Tensor")
operators.impl("chosen_gated", chosen_gated, "CPU")
operators.impl("chosen_gated", lambda x, chosen, B, A, W, eps: x.new_empty((len(x), len(A[0]))), "Meta")


def few(x: Tensor) -> bool:
    """Whether x (…, n) is of so few tokens that each is multiplied by itself."""
    return x.numel() <= FEW * x.shape[-1]


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient on the same storage as `tensor`."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def widen(x: Tensor) -> Tensor:
    """X in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """‖part‖ / ‖whole‖ along the last dimension; 0 where both vanish."""
    tiny = torch.finfo(whole.dtype).tiny
    whole_norm: Tensor = torch.linalg.vector_norm(whole, dim=-1)
    part_norm: Tensor = torch.linalg.vector_norm(part, dim=-1)
    return part_norm / whole_norm.clamp_min(tiny)
