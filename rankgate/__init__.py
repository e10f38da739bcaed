"""Rankgate: linear layers as an always-on low-rank subspace plus a gated residual, measured honestly.

    from rankgate import GSIConfig, calibrate, convert_, evaluate

The names below are imported when they are first used, so that `rankgate --help` does not wait for torch. Likewise the
quantiser is registered with transformers once somebody imports that: `from_pretrained` then opens converted models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from rankgate.attention.attend import AttentionConfig, select_tokens_
    from rankgate.attention.heads import try_heads
    from rankgate.calibration import Stats, calibrate
    from rankgate.convert import LayerReport, convert_, twin
    from rankgate.core import GatedGroup, GroupedLinear, Subspace
    from rankgate.errors import RankgateError
    from rankgate.evaluation import Evaluation, evaluate
    from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, Int8Config, LRQConfig, SparseConfig, SVDConfig
    from rankgate.quantizer import RankgateConfig

__version__ = "0.1.0"

_HOME = {
    "AttentionConfig": "attention.attend",
    "select_tokens_": "attention.attend",
    "try_heads": "attention.heads",
    "Stats": "calibration",
    "calibrate": "calibration",
    "LayerReport": "convert",
    "convert_": "convert",
    "twin": "convert",
    "GatedGroup": "core",
    "GroupedLinear": "core",
    "Subspace": "core",
    "RankgateError": "errors",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "ASVDConfig": "methods",
    "GSIConfig": "methods",
    "Int4Config": "methods",
    "Int8Config": "methods",
    "LRQConfig": "methods",
    "SVDConfig": "methods",
    "RankgateConfig": "quantizer",
    "SparseConfig": "methods",
}

__all__ = [
    "ASVDConfig",
    "AttentionConfig",
    "Evaluation",
    "GSIConfig",
    "GatedGroup",
    "GroupedLinear",
    "Int4Config",
    "Int8Config",
    "LRQConfig",
    "LayerReport",
    "RankgateConfig",
    "RankgateError",
    "SVDConfig",
    "SparseConfig",
    "Stats",
    "Subspace",
    "calibrate",
    "convert_",
    "evaluate",
    "select_tokens_",
    "try_heads",
    "twin",
]


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_: Any) -> None:
    importlib.import_module("rankgate.quantizer")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankgate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rankgate.{_HOME[name]}"), name)
