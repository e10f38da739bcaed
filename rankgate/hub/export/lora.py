"""The low rank of a converted model as a PEFT adapter, which vLLM, SGLang and peft put on top of an exported base.

    lora_A = 2^k B,   lora_B = 2^−k A diag(s),   lora_alpha = r:  A diag(s) B is added

B is exact in bfloat16 (integers below 256), A diag(s) is rounded once, to 2⁻⁹ of each value. k makes both about as
large.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rankgate.errors import RankgateError
from rankgate.hub.export.members import Member
from rankgate.quantized import LowRank


def factors(low: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A (rank × n) and lora_B (m × rank), float32 on the grid of bfloat16 up to the rounding of lora_B."""
    largest = float(low.scale.abs().max())
    exponent = round(math.log2(largest) / 2) if largest > 0 else 0
    A, B = low.A.float() * (low.scale * 2.0**-exponent), low.B.float() * 2.0**exponent
    missing = rank - low.rank
    return F.pad(B, (0, 0, 0, missing)), F.pad(A, (0, missing))


def largest_rank(members: list[Member]) -> int:
    """Of all members: an adapter has one. Raises RankgateError if none has a low rank."""
    ranks = [member.low_rank.rank for member in members if member.low_rank is not None]
    if not ranks:
        raise RankgateError("no layer has a low rank; export without --lora")
    return max(ranks)


def write(members: list[Member], base: str, directory: Path) -> int:
    """Write the adapter of `members` for the model that `base` names into `directory`, which is made; its rank."""
    rank, tensors = largest_rank(members), {}
    for member in members:
        if member.low_rank is not None:
            A, B = factors(member.low_rank, rank)
            name = f"base_model.model.{member.name}"
            tensors[f"{name}.lora_A.weight"] = A.to(torch.bfloat16).contiguous()
            tensors[f"{name}.lora_B.weight"] = B.to(torch.bfloat16).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [member.name for member in members if member.low_rank is not None],
    }
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return rank
