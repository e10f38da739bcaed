"""LoRA adapters of PEFT on converted layers: trained beside weights that stay as they are.

    model = get_peft_model(converted, adaptable(LoraConfig(target_modules="all-linear")))
    model = PeftModel.from_pretrained(converted, DIR, config=adaptable(LoraConfig.from_pretrained(DIR)))

PEFT knows linears by their class and leaves others to what a configuration registers; that is not saved with it. DoRA
works, too: it scales by the norms of rows of W + BA, for which W is dequantised at each use. Starting points that take
something out of W do not: codes cannot hold what is left.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.conversion.convert import Converted, converted_layers
from rankgate.core import GroupedLinear, SparseLinear
from rankgate.errors import RankgateError
from rankgate.hub.loading import dense_weight
from rankgate.methods.context import ContextLinear
from rankgate.quantized import QuantizedHead

STARTS = (True, False, "gaussian", "eva")  # values of init_lora_weights that do not ask for W
OF_DENSE = ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config", "target_parameters")


class DenseDora(DoraLinearLayer):
    """DoRA's magnitudes beside a converted layer."""

    def update_layer(self, *, base_layer: Converted, **kwargs: Any) -> None:
        super().update_layer(base_layer=_dense(base_layer), **kwargs)

    def forward(self, x: Tensor, *, base_layer: Converted, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, base_layer=_dense(base_layer), **kwargs)  # type: ignore[no-untyped-call]
        return y


class DenseDoraVariant(DoraLinearVariant):
    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        layer = DenseDora(fan_in_fan_out=False)  # type: ignore[no-untyped-call]
        layer.update_layer(base_layer=module.get_base_layer(), lora_A=A, lora_B=B, scaling=module.scaling[adapter_name])
        module.lora_magnitude_vector[adapter_name] = layer


class LoraConvertedLinear(Linear):
    """x (…, n) through a converted layer, plus the adapter's own low rank. PEFT asks for "Linear" in the name."""

    def __init__(self, base_layer: Converted, *args: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, QuantizedHead):
            raise RankgateError("a rounded output embedding takes no adapter; leave it out, or convert without lm_head")
        super().__init__(base_layer, *args, **kwargs)
        self.fan_in_fan_out = False  # W is m × n, whatever it was

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(**kwargs)
        return DenseDoraVariant() if isinstance(variant, DoraLinearVariant) else variant

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        place = next(self.get_base_layer().parameters()).device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or place)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        raise RankgateError(
            "an adapter cannot be merged into converted weights; keep it beside them, or merge into the dense model"
        )


def adaptable(config: LoraConfig) -> LoraConfig:
    """`config`, which then takes converted layers, too; the same object.

    Raises RankgateError if it asks for what needs the dense weights.
    """
    if config.init_lora_weights not in STARTS:
        known = 'True, False, "gaussian" or "eva"'
        raise RankgateError(
            f"init_lora_weights={config.init_lora_weights!r} needs the dense weights; with converted ones use {known}"
        )
    for name in OF_DENSE:
        if getattr(config, name, None):
            raise RankgateError(f"{name} needs dense layers; leave it out with converted ones")
    config._register_custom_module(dict.fromkeys((GroupedLinear, SparseLinear, ContextLinear), LoraConvertedLinear))
    return config


def _dense(layer: Converted) -> nn.Module:
    """What DoRA reads of a layer: its weight and bias."""
    dense: Any = nn.Module()
    dense.weight, dense.bias = nn.Buffer(dense_weight(layer)), layer.bias
    return dense  # type: ignore[no-any-return]


def _meet(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """What PEFT makes of "all-linear" on `model`, which are linears by their class, and the converted ones.

    This is where PEFT first sees a configuration and a model together, and where it is refused what would train
    converted weights.
    """
    layers = dict(converted_layers(model))
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    tied = isinstance(head, QuantizedHead) and getattr(model.config, "tie_word_embeddings", False)
    given: dict[str, Any] = vars(peft_config)
    for wanted in given.get("modules_to_save") or ():
        if found := next((name for name in layers if f"{wanted}." in f"{name}."), None):
            raise RankgateError(f"modules_to_save: {found} is converted and cannot be trained; leave it out, or dense")
    for name in ("ensure_weight_tying", "trainable_token_indices"):
        if tied and given.get(name):
            raise RankgateError(f"{name}: the output embedding is rounded and not trained; convert without lm_head")
    target = given.get("target_modules")
    _by_class(peft_config, model)
    if layers and isinstance(target, str) and target.lower() == "all-linear":
        if GroupedLinear not in (given.get("_custom_modules") or ()):
            raise RankgateError("converted layers take LoRA: get_peft_model(model, adaptable(LoraConfig(...)))")
        inside = {name for name in layers if name.endswith(".base_layer")}  # PEFT found what is around them
        given["target_modules"] |= {name for name, layer in layers.items() if layer is not head} - inside
    return peft_config


_by_class = tuners_utils._maybe_include_all_linear_layers
tuners_utils._maybe_include_all_linear_layers = _meet
