"""Conversion inside `from_pretrained`, and back to dense modules."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import Converted, LayerReport, convert_, converted_layers, methods_of
from rankgate.core import GatedGroup, GroupedLinear
from rankgate.errors import RankgateError, listed
from rankgate.hub.config import RankgateConfig
from rankgate.hub.texts import text_windows
from rankgate.quantized import QuantizedGroup, QuantizedHead

CACHE_LINE = 64  # bytes


def convert_loaded_(model: PreTrainedModel, config: RankgateConfig) -> list[LayerReport]:
    """Convert a dense model that was just loaded; `config` then says what it is made of."""
    method, others = config.build(), config.others()
    used = methods_of(method, others)
    stats = None
    if any(m.needs_stats for m in used):
        windows = config.windows if config.windows is not None else _windows(model, config)
        stats = calibrate(model, windows, sensitivity=any(m.needs_sensitivity for m in used))
    layers = convert_(model, method, stats, overrides=others)
    described = model.config.quantization_config  # by convert_
    config.modules, config.experts = described.modules, described.experts
    model.config.quantization_config = config
    return layers


def refuse_missing_(model: PreTrainedModel, *, converted: bool) -> None:
    """Let loading fail where a checkpoint lacks weights, instead of filling in random ones.

    A new head on a known body (another class than the checkpoint's) is left to whoever wants to train it. Tells what is
    missing by RankgateError.
    """
    name = "_adjust_missing_and_unexpected_keys"  # where loading knows what is missing, and nobody has read the model

    def check(info: Any) -> None:
        del vars(model)[name]
        getattr(model, name)(info)
        names = sorted(map(str, {*info.missing_keys, *(key for key, *_ in info.mismatched_keys)}))
        if type(model).__name__ not in (model.config.architectures or [type(model).__name__]):
            names = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
        if names:
            damage = "is damaged, convert it again: it lacks" if converted else "lacks"
            raise RankgateError(f"{model.name_or_path} {damage} weights, which would be random: {listed(names)}")

    vars(model)[name] = check


def _windows(model: PreTrainedModel, config: RankgateConfig) -> Tensor:
    name = model.config._name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = "give RankgateConfig(windows=...), token ids to calibrate on"
        raise RankgateError(f"there is no tokenizer at {name!r}; {reason}") from error
    return text_windows(tokenizer, config.calibration_text, config.calibration_tokens, config.context)


def align_(model: PreTrainedModel) -> None:
    """Move tensors that lie askew in a mapped file to memory of their own: how a product is rounded depends on it."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % CACHE_LINE:
            parameter.data = parameter.data.clone()


def freeze_(model: PreTrainedModel) -> None:
    """Converted weights have no gradient: codes cannot, and the others belong to them."""
    for _, layer in converted_layers(model):
        layer.requires_grad_(False)


def dequantize_(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Put dense modules in place of converted ones, in place. Gates are open: E is added, a residual is the whole W.

    A rounded output embedding becomes one of its own, no longer tied to the input embedding.
    """
    if any(isinstance(layer, QuantizedHead) for _, layer in converted_layers(model)):
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    with init_empty_weights():
        skeleton = type(model)(model.config)
    for name, layer in list(converted_layers(model)):
        module: Any = skeleton.get_submodule(name).to_empty(device=model.device)
        W = dense_weight(layer).to(dtype or model.dtype)
        transposed = type(module) is not nn.Linear  # Conv1D
        module.weight = nn.Parameter(W.T.contiguous() if transposed else W)
        bias = layer.bias
        module.bias = None if bias is None else nn.Parameter(bias.to(W.dtype))
        model.set_submodule(name, module)
    model.tie_weights()


def dense_weight(layer: Converted) -> Tensor:
    """W (m × n) that a converted layer multiplies by when all gates are open."""
    if not isinstance(layer, GroupedLinear):
        return layer.W
    rows, group = slice(layer.start, layer.stop), layer.group
    if isinstance(group, GatedGroup):
        return group.W[rows] if group.W is not None else group.A[rows] @ group.subspace.B
    assert isinstance(group, QuantizedGroup)
    W = group.base.dequantize()
    if group.low_rank is not None:
        W = W + group.low_rank.dequantize()
    if group.refinement is not None:
        W = W + group.refinement.dequantize()
    return W[rows]
