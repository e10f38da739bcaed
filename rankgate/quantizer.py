"""Converted models are at home in transformers: a quantisation like others, registered when rankgate is imported.

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=RankgateConfig("lrq", rank=16))
    model.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)

`config.json` says how (`quantization_config`: the method, and what every converted module is made of), safetensors
files hold the tensors. None of them has the name of a dense weight, so that nobody can take it for one.

This module is imported while transformers is: it must not need more of it than its quantizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankgate.errors import RankgateError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rankgate.methods import Method

NAME = "rankgate"
FORMAT = 4  # of what is stored


@register_quantization_config(NAME)
class RankgateConfig(QuantizationConfigMixin):
    """How to convert a model while it is loaded, or how a stored one was converted.

    method: name of a method, whose settings are the further arguments: RankgateConfig("gsi", rank=256, eps=0.05).
    modules_to_not_convert: names of linears, or their ends ("down_proj"), that stay dense; with them their input group.
    overrides: method and settings by such names: {"down_proj": {"name": "int8"}}.
    calibration_text, calibration_tokens, context: see `rankgate convert`. windows: token ids (count × length) to
    calibrate on, instead of a text; for a model that has no tokenizer beside it.
    Raises RankgateError for settings that a method does not have.
    """

    def __init__(
        self,
        method: str | dict[str, Any] = "lrq",
        *,
        modules_to_not_convert: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        calibration_text: str = "pydoc:calibration",
        calibration_tokens: int = 8192,
        context: int = 512,
        windows: torch.Tensor | None = None,
        modules: list[dict[str, Any]] | None = None,
        format: int = FORMAT,
        quant_method: str = NAME,
        **settings: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.method = {"name": method, **settings} if isinstance(method, str) else {**method, **settings}
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.overrides = dict(overrides or {})
        self.calibration_text, self.calibration_tokens, self.context = calibration_text, calibration_tokens, context
        self.windows = windows
        self.modules = modules
        self.format = format
        if modules is not None and format != FORMAT:
            raise RankgateError(
                f"the model is stored in format {format}, this version reads {FORMAT}; convert it again"
            )

    def build(self) -> Method:
        """The method itself."""
        return build(self.method)

    def to_dict(self) -> dict[str, Any]:
        """Without the calibration windows, which are not kept."""
        return {key: value for key, value in vars(self).items() if key != "windows"}


def build(settings: dict[str, Any]) -> Method:
    """A method from its name and settings. Raises RankgateError if there is no such method or setting."""
    from rankgate.methods import METHODS

    rest = dict(settings)
    name = rest.pop("name", None)
    if name not in METHODS:
        raise RankgateError(f"{name!r} is no method; use one of {', '.join(METHODS)}")
    try:
        return METHODS[name](**rest)
    except TypeError as error:
        raise RankgateError(f"{name} does not take these settings: {error}") from error


@register_quantizer(NAME)
class RankgateQuantizer(HfQuantizer):
    """What transformers asks of a quantisation: empty modules before loading, or conversion after it."""

    quantization_config: RankgateConfig

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained beside converted weights, which stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        """Every tensor once, under the name of the first member of its group."""
        aliases = {name for name, kept in model.all_tied_weights_keys.items() if ".group." in kept or ".gate." in kept}
        return {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.pre_quantized:
            import torch

            from rankgate.layout import rebuild, tie

            modules = self.quantization_config.modules or []
            with torch.device("meta"):
                rebuild(model, modules, model.dtype)
            tie(model)
            self.expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
            for module in modules:  # a parent may want to initialise weights of its children, which are not there
                parent = model.get_submodule(module["name"].rpartition(".")[0])
                if not parent._non_persistent_buffers_set:  # what it has itself is stored
                    parent._is_hf_initialized = True  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from rankgate.hf import align_, convert_loaded_, freeze_

        align_(model)
        if self.pre_quantized:
            self._check_shapes(model)
            freeze_(model)
            self.quantization_config.build().attach(model)
        else:
            convert_loaded_(model, self.quantization_config)
        return model

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """As later versions of transformers do; 5.17 takes any shape where there is a quantizer."""
        for name, tensor in model.state_dict().items():
            if tensor.shape != self.expected[name]:
                found, expected = (" × ".join(map(str, shape)) for shape in (tensor.shape, self.expected[name]))
                raise RankgateError(f"the model is damaged, convert it again: {name} is {found}, not {expected}")

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from rankgate.hf import dequantize_

        dequantize_(model, dtype)
        return model
