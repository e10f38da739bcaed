"""The adaptive basis of Gated Subspace Inference: a subspace grown from the text that is being read.

Every sequence starts with an empty basis V. A token with ‖x − Vᵀ V x‖ > ε ‖x‖ fires: it gets exactly W x, its
normalised residual q joins V, and W q joins the weight image A = W V. Once V has k directions, the least used one is
evicted (use: the share of ‖x‖² along it, decayed over time). Here V has orthonormal *rows*, k × n.

Like a key-value cache, a basis belongs to one sequence: each row of a batch has its own, so that a result never depends
on what else is in the batch; padding never joins; a new sequence starts afresh; beam search moves bases along with its
cache. `SequenceTracker` follows that from the calls of the base model.

A prompt is processed token by token for V and the gate, then by one matrix product per layer: a token with a closed
gate gets W x̂ with x̂ = Vᵀ V x, which is what A z would give. From the first decoded token on, the image A is kept
beside V and used. Image and product are two reads of W for a firing token here; a kernel can do both in one.

Not covered: rolling a cache back (`crop`) leaves in V what the dropped tokens taught it, which is still within ε.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankgate.core import InputGroup, frozen, norm_ratio, widen

DECAY = 0.99  # of a direction's use, per token
NOISE = 1e-3  # a residual below this share of ‖x‖ is too uncertain in float32 to become a direction of its own


class Step(NamedTuple):
    """What one token met: `z` and `seen` = Vᵀ z before the basis grew, and the direction that it filled, if any."""

    z: Tensor  # (filled,)
    seen: Tensor  # (n,)
    ratio: float
    fire: bool
    slot: int | None


class Basis:
    """The basis of one sequence: the first `filled` rows of V (k × n), their use, and W V by layer."""

    def __init__(self, rank: int, like: Tensor) -> None:
        self.V = like.new_zeros(rank, like.shape[-1])
        self.use = like.new_zeros(rank)
        self.filled = 0
        self.images: dict[nn.Module, Tensor] = {}  # layer → A (k, m)

    def copy(self) -> Basis:
        twin = copy.copy(self)
        twin.V, twin.use = self.V.clone(), self.use.clone()
        twin.images = {layer: A.clone() for layer, A in self.images.items()}
        return twin

    def step(self, x: Tensor, eps: float) -> Step:
        """Show one token x (n) to the basis, and let it grow if the token fires."""
        V, use = self.V[: self.filled], self.use[: self.filled]
        z = V @ x
        seen = z @ V
        residual = x - seen
        ratio = float(norm_ratio(residual, x))
        fire = ratio > eps
        use.mul_(DECAY).addcdiv_(z.square(), x.square().sum().clamp_min(torch.finfo(x.dtype).tiny))
        slot = None
        if fire and ratio > NOISE:
            slot = self.filled if self.filled < len(self.V) else int(self.use.argmin())
            self.V[slot] = F.normalize(residual, dim=0)
            self.use[slot] = ratio**2
            self.filled = max(self.filled, slot + 1)
        return Step(z, seen, ratio, fire, slot)


class ContextProjection(NamedTuple):
    """The answer of a `ContextBasis` for a batch of tokens; `decoded` has the steps of a decoding call, by row."""

    seen: Tensor  # (..., n) the part of x inside the basis
    ratio: Tensor  # (...)
    fire: Tensor  # (...)
    columns: Tensor  # (...) directions filled when the token came
    decoded: list[tuple[Basis, Step]] | None


class Sequences:
    """The rows of one batch while they are being read: their bases by module, and which current tokens are real."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.length = 0
        self.real = torch.empty(0)
        self.bases: dict[ContextBasis, list[Basis]] = {}

    def begin(self, ids: Tensor, mask: Tensor | None) -> None:
        self.length = ids.shape[1]
        if mask is not None and mask.dim() == 2:
            self.real = mask[:, -self.length :].bool()
        else:
            self.real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)


class SequenceTracker:
    """Follows which sequences a converted model is reading, by the cache that it is called with."""

    def __init__(self) -> None:
        self.current: Sequences | None = None
        self._outermost: nn.Module | None = None
        self._by_cache: WeakKeyDictionary[Any, Sequences] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[SequenceTracker], tuple[()]]:
        """A copied or pickled model follows sequences of its own."""
        return SequenceTracker, ()

    @classmethod
    def install(cls, model: PreTrainedModel) -> None:
        """Hook one tracker into `model` and its base model, and hand it to every `ContextBasis` inside."""
        tracker = cls()
        for module in model.modules():
            if isinstance(module, ContextBasis):
                module.tracker = tracker
        for module in {model, model.base_model}:  # either may be called from outside
            module.register_forward_pre_hook(tracker.before, with_kwargs=True)
            module.register_forward_hook(tracker.after, with_kwargs=True, always_call=True)
        vars(model)["_reorder_cache"] = tracker.reorder  # the hook that beam search looks for

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._outermost is not None:
            return
        call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        ids = call.get("input_ids")
        ids = call["inputs_embeds"] if ids is None else ids
        cache = cache_of(call)
        known = self._by_cache.get(cache) if cache is not None and started(cache) else None
        if known is None or known.rows != ids.shape[0]:
            known = Sequences(ids.shape[0])
        known.begin(ids, call.get("attention_mask"))
        self.current, self._outermost = known, module

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._outermost is not module:
            return
        cache = cache_of(output) if isinstance(output, Mapping) else None
        if cache is not None and self.current is not None:
            self._by_cache[cache] = self.current
        self.current = self._outermost = None

    def reorder(self, cache: Any, rows: Tensor) -> Any:
        cache.reorder_cache(rows)
        sequences = self._by_cache.get(cache)
        if sequences is not None:
            for module, bases in sequences.bases.items():
                sequences.bases[module] = [bases[row].copy() for row in rows.tolist()]
        return cache


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache among the arguments or outputs of a base model, or None."""
    cache = call.get("past_key_values")
    return call.get("cache_params") if cache is None else cache


def started(cache: Any) -> bool:
    """Whether a cache holds any token yet."""
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # a cache of recurrent states has no length
        return bool(cache.has_previous_state())


class ContextBasis(InputGroup[ContextProjection]):
    """The growing basis of one input group: at most `rank` directions of `n` values, tolerance `eps`."""

    def __init__(self, n: int, rank: int, eps: float) -> None:
        super().__init__()
        self.n, self.rank, self.eps = n, rank, eps
        self.tracker: SequenceTracker | None = None

    def forward(self, x: Tensor) -> ContextProjection:
        sequences = self.tracker.current if self.tracker else None
        if sequences is None or x.numel() != sequences.rows * sequences.length * self.n:
            raise RuntimeError("a context basis sees its input only through the model that was converted")
        rows, length = sequences.rows, sequences.length
        tokens = widen(x).reshape(rows, length, self.n)
        bases = sequences.bases.setdefault(self, [])
        bases.extend(Basis(self.rank, tokens) for _ in range(rows - len(bases)))
        seen = torch.zeros_like(tokens)
        ratio, columns = torch.zeros(2, rows, length, device=x.device)
        fire = torch.zeros(rows, length, dtype=torch.bool, device=x.device)
        decoded = []
        for r, t in sequences.real.nonzero().tolist():
            columns[r, t] = bases[r].filled
            step = bases[r].step(tokens[r, t], self.eps)
            seen[r, t], ratio[r, t], fire[r, t] = step.seen, step.ratio, step.fire
            decoded.append((bases[r], step))
        shape = x.shape[:-1]
        answer = (seen.to(x.dtype).view_as(x), ratio.view(shape), fire.view(shape), columns.view(shape))
        if length == 1 and len(decoded) == rows:
            return ContextProjection(*answer, decoded)
        for basis in bases:
            basis.images.clear()  # they follow V again when decoding begins
        return ContextProjection(*answer, None)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, in_features={self.n}, eps={self.eps}"


class ContextLinear(nn.Module):
    """A linear whose subspace is a `ContextBasis`. W: (m, n); bias: (m,) or None."""

    def __init__(self, subspace: ContextBasis, W: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.subspace = subspace
        self.W = frozen(W)
        self.bias = None if bias is None else frozen(bias)

    @property
    def in_features(self) -> int:
        return self.W.shape[1]

    @property
    def out_features(self) -> int:
        return self.W.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        seen, _, fire, _, decoded = self.subspace.shared(x)
        if decoded is None:
            return F.linear(torch.where(fire[..., None], x, seen), self.W, self.bias)
        y = torch.stack([self._image(basis, step) for basis, step in decoded]).view(*x.shape[:-1], -1)
        if self.bias is not None:
            y = y + self.bias
        if fire.any():
            y[fire] = F.linear(x[fire], self.W, self.bias)
        return y

    def _image(self, basis: Basis, step: Step) -> Tensor:
        """A z for one row, after bringing its image up to date with the direction that joined V."""
        A = basis.images.get(self)
        if A is None:
            A = basis.images[self] = F.linear(basis.V.to(self.W.dtype), self.W)
        elif step.slot is not None:
            A[step.slot] = F.linear(basis.V[step.slot].to(self.W.dtype), self.W)
        return step.z.to(A.dtype) @ A[: len(step.z)]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
