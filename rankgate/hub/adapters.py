"""LoRA adapters of PEFT on converted layers: trained beside weights that stay as they are.

    model = get_peft_model(converted, adaptable(LoraConfig(target_modules=["q_proj", "v_proj"])))
    model = PeftModel.from_pretrained(converted, DIR, config=adaptable(LoraConfig.from_pretrained(DIR)))

PEFT knows linears by their class and leaves others to what a configuration registers; that is not saved with it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora import Linear

from rankgate.core import GroupedLinear, SparseLinear
from rankgate.errors import RankgateError
from rankgate.methods.context import ContextLinear


class LoraConverted(Linear):
    """x (…, n) through a converted layer, plus the adapter's own low rank."""

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        raise RankgateError(
            "an adapter cannot be merged into converted weights; keep it beside them, or merge into the dense model"
        )


def adaptable(config: LoraConfig) -> LoraConfig:
    """`config`, which then takes converted layers, too; the same object."""
    config._register_custom_module(dict.fromkeys((GroupedLinear, SparseLinear, ContextLinear), LoraConverted))
    return config
