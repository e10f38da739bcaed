"""A directory in the format of compressed-tensors ("pack-quantized"), which vLLM, SGLang and transformers open.

    weight_packed      int32 (m, n · bits / 32): codes + 2^(bits − 1), from the lowest bits of a word on
    weight_scale       bfloat16 (m, groups of 64 or 32 inputs)
    weight_zero_point  int32 (⌈m · bits / 32⌉, groups), packed down the columns; asymmetric codes only
    weight_shape       int64: m, n

Codes and scales are those of the converted model, bit for bit; all else is bfloat16. A layer whose inputs are no whole
groups of 64 is written dense, and so is the output embedding, which engines tie to the input embedding.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rankgate.errors import RankgateError
from rankgate.hub.export.members import Member, members, others
from rankgate.hub.stored import pack, packed_codes
from rankgate.quantized import GROUP

FORMAT = "pack-quantized"
Scheme = tuple[int, bool, int]  # bits, whether symmetric, inputs of a group


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, lora: bool) -> list[Member]:
    """Write a converted model into `directory`, which is made; its layers, whose low rank an adapter is to carry.

    Raises RankgateError for what the format or the engines that open it do not have, see `members`.
    """
    found = members(model, lora=lora)
    _check_linear(model, found)
    tensors = {name: _narrow(tensor) for name, tensor in others(model).items()}
    schemes: dict[Scheme, list[str]] = {}
    for member in found:
        if _stays_dense(member):
            if not (member.head and model.config.get_text_config().tie_word_embeddings):
                tensors[f"{member.name}.weight"] = member.dense()
            continue
        scheme = member.base.bits, member.base.zero is None, member.base.group_size
        schemes.setdefault(scheme, []).append(member.name)
        tensors |= {f"{member.name}.{name}": tensor for name, tensor in packed(member).items()}
    directory.mkdir()
    config = {**model.config.to_dict(), "dtype": "bfloat16", "quantization_config": _config(model, schemes)}
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_torch_state_dict(tensors, directory, metadata={"format": "pt"})
    return found


def _stays_dense(member: Member) -> bool:
    return member.head or member.base.n % GROUP != 0


def kind(member: Member) -> str:
    """How a layer is written, in a word."""
    base = member.base
    return "bfloat16" if _stays_dense(member) else f"W{base.bits}A16{'' if base.zero is None else '_ASYM'}"


def packed(member: Member) -> dict[str, Tensor]:
    """The tensors of one layer."""
    base = member.base
    tensors = {
        "weight_packed": packed_codes(base),
        "weight_scale": base.scale.detach().clone(),
        "weight_shape": torch.tensor([base.m, base.n]),
    }
    if base.zero is not None:
        if base.bits == 8:
            raise RankgateError(f"{member.name}: engines have no 8 bits with zeros; convert without --asymmetric")
        if int(base.zero.min()) < 0 or int(base.zero.max()) > 15:
            raise RankgateError(
                f"{member.name} has a zero outside of its 4-bit codes, which this format cannot hold; "
                "convert without --asymmetric"
            )
        down = nn.functional.pad(base.zero.T.to(torch.uint8), (0, -base.m % 8))
        tensors["weight_zero_point"] = pack(down, 4).T.contiguous()
    return tensors


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def _check_linear(model: PreTrainedModel, found: list[Member]) -> None:
    """Raise RankgateError if the dense architecture has something else where a member is (GPT-2: a transposed one)."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    for member in found:
        if not isinstance(plain.get_submodule(member.name), nn.Linear):
            kind = type(plain.get_submodule(member.name)).__name__
            raise RankgateError(f"{member.name} is a {kind}; compressed-tensors has quantised Linear layers only")


def _config(model: PreTrainedModel, schemes: dict[Scheme, list[str]]) -> dict[str, Any]:
    """`quantization_config`: a group for each scheme; with one it is all linears but those that are dense."""
    quantised = {name for names in schemes.values() for name in names}
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantised]
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    groups = {}
    for number, ((bits, symmetric, size), names) in enumerate(schemes.items()):
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": size}
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": {**weights, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*dense, head}),
    }
