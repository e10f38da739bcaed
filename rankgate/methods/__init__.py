"""The methods by name: `METHODS["gsi"](rank=256, eps=0.05)`."""

from rankgate.methods.base import Method
from rankgate.methods.baselines import Int4Config, Int8Config, SparseConfig
from rankgate.methods.gsi import GSIConfig
from rankgate.methods.lrq import LRQConfig
from rankgate.methods.planned import PlannedConfig
from rankgate.methods.svd import ASVDConfig, SVDConfig

METHODS: dict[str, type[Method]] = {
    config.name: config
    for config in (LRQConfig, PlannedConfig, GSIConfig, SVDConfig, ASVDConfig, Int8Config, Int4Config, SparseConfig)
}

__all__ = [
    "METHODS",
    "ASVDConfig",
    "GSIConfig",
    "Int4Config",
    "Int8Config",
    "LRQConfig",
    "Method",
    "PlannedConfig",
    "SVDConfig",
    "SparseConfig",
]
