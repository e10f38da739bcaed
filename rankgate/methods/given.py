"""What a method is given: the dense linears of an input group, and what calibration saw of their input."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """A dense layer as W (m × n) and bias (m), whatever module it was read from."""

    name: str
    W: Tensor
    bias: Tensor | None

    @property
    def m(self) -> int:
        return self.W.shape[0]

    @property
    def n(self) -> int:
        return self.W.shape[1]


@dataclass
class GroupStats:
    """What calibration saw of one input group.

    C: (n, n), second moment of the tensor that `members` read, over `tokens` tokens.
    sample: (≤ 256, n) bfloat16, some of these tokens, evenly spread over the text.
    sensitivity: (Σ m,) float32, the Fisher diagonal of the members' outputs in order, or None if it was not asked for.
    """

    members: tuple[str, ...]
    C: Tensor
    tokens: int
    sample: Tensor
    sensitivity: Tensor | None = None
    _eigen: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> GroupStats:
        """These statistics on `device`: themselves if they are there. C, which is large, stays where it is."""
        if self.sample.device == device:
            return self
        sensitivity = None if self.sensitivity is None else self.sensitivity.to(device)
        return replace(self, sample=self.sample.to(device), sensitivity=sensitivity, _eigen=None)

    def tensors(self) -> dict[str, Tensor]:
        """These statistics on the CPU, by names that begin with that of the first member."""
        parts = {"C": self.C, "sample": self.sample, "tokens": torch.tensor(self.tokens), "F": self.sensitivity}
        return {f"{self.members[0]}.{key}": part.cpu() for key, part in parts.items() if part is not None}

    @classmethod
    def of(cls, members: tuple[str, ...], tensors: dict[str, Tensor]) -> GroupStats:
        """Undo `tensors`."""
        C, sample, tokens = (tensors[f"{members[0]}.{key}"] for key in ("C", "sample", "tokens"))
        return cls(members, C, int(tokens), sample, tensors.get(f"{members[0]}.F"))

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of C (n, descending, ≥ 0) and eigenvectors as columns (n × n). Computed once."""
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(self.C.to(self.sample.device))
            self._eigen = values.flip(0).clamp_min(0), vectors.flip(1)
        return self._eigen
