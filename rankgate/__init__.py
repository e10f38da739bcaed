"""Rankgate: linear layers as an always-on low-rank subspace plus a gated residual, measured honestly.

    from rankgate import GSIConfig, calibrate, convert_, evaluate

The names below are imported when they are first used, so that `rankgate --help` does not wait for torch. Some modules
take part in what others begin: transformers knows converted models as soon as somebody imports its quantizers, kernels
register themselves as soon as somebody imports the definitions, which know nothing of them, what is converted can be
saved, and PEFT is told what it may do to it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from rankgate import moved  # noqa: F401  finds modules by their former names

if TYPE_CHECKING:
    from rankgate.attention.attend import AttentionConfig, select_tokens_
    from rankgate.attention.heads import try_heads
    from rankgate.common.copies import twin
    from rankgate.conversion.calibration import Stats, calibrate
    from rankgate.conversion.convert import LayerReport, convert_
    from rankgate.conversion.evaluation import Evaluation, evaluate
    from rankgate.core import GatedGroup, GroupedLinear, Subspace
    from rankgate.decoding.exact import Exact
    from rankgate.decoding.loop import fast_generate
    from rankgate.errors import RankgateError
    from rankgate.hub.config import RankgateConfig
    from rankgate.hub.opening import open_any, open_dense
    from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, Int8Config, LRQConfig, SparseConfig, SVDConfig

__version__ = "0.1.0"

_HOME = {
    "AttentionConfig": "attention.attend",
    "select_tokens_": "attention.attend",
    "try_heads": "attention.heads",
    "Stats": "conversion.calibration",
    "calibrate": "conversion.calibration",
    "LayerReport": "conversion.convert",
    "convert_": "conversion.convert",
    "twin": "common.copies",
    "Evaluation": "conversion.evaluation",
    "evaluate": "conversion.evaluation",
    "GatedGroup": "core",
    "GroupedLinear": "core",
    "Subspace": "core",
    "Exact": "decoding.exact",
    "fast_generate": "decoding.loop",
    "RankgateError": "errors",
    "RankgateConfig": "hub.config",
    "open_any": "hub.opening",
    "open_dense": "hub.opening",
    "ASVDConfig": "methods",
    "GSIConfig": "methods",
    "Int4Config": "methods",
    "Int8Config": "methods",
    "LRQConfig": "methods",
    "SVDConfig": "methods",
    "SparseConfig": "methods",
}

__all__ = [
    "ASVDConfig",
    "AttentionConfig",
    "Evaluation",
    "Exact",
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
    "fast_generate",
    "open_any",
    "open_dense",
    "select_tokens_",
    "try_heads",
    "twin",
]


_BRINGS = {  # what else is imported with a module, which knows nothing of it
    "transformers.quantizers.auto": "rankgate.hub.quantizer",
    "rankgate.core": "rankgate.quantized",
    "rankgate.quantized": "rankgate.ops",
    "rankgate.conversion.convert": "rankgate.hub.checkpoint",
    "peft": "rankgate.hub.adapters",
}


def _bring(module: Any) -> None:
    importlib.import_module(_BRINGS[module.__name__])


for _name in _BRINGS:
    wrapt.register_post_import_hook(_bring, _name)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankgate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rankgate.{_HOME[name]}"), name)
