"""How a model is to be converted, or was: the `quantization_config` of transformers, which `quantizer` registers.

This module is imported while transformers is: it must not need more of it than this. Importing transformers' quantizers
would bring `quantizer`, which needs this module whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from rankgate.errors import RankgateError

if TYPE_CHECKING:
    import torch

    from rankgate.methods import Method


NAME = "rankgate"
FORMAT = 5  # of what is stored
STACKED = 4  # the format before it, which stored the members of a group as one matrix; still read


class RankgateConfig(QuantizationConfigMixin):
    """How to convert a model while it is loaded, or how a stored one was converted.

    method: name of a method, whose settings are the further arguments: RankgateConfig("gsi", rank=256, eps=0.05).
    modules_to_not_convert: names of linears, or parts of them ("down_proj", "model.layers.0"), that stay dense; with
    them their input group. overrides: method and settings by such names: {"down_proj": {"name": "int8"}}; the output
    embedding, which stays dense, takes int8 in this way.
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
        calibration_text: str = "mixed:calibration",
        calibration_tokens: int = 8192,
        context: int = 512,
        windows: torch.Tensor | None = None,
        modules: list[dict[str, Any]] | None = None,
        experts: list[str] | None = None,
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
        self.experts = list(experts or [])  # which are stored one by one: names of their stacks
        self.format = format
        if modules is not None and format not in (STACKED, FORMAT):
            raise RankgateError(
                f"the model is stored in format {format}, this version reads {STACKED} and {FORMAT}; convert it again"
            )

    def build(self) -> Method:
        """The method itself."""
        return build(self.method)

    def others(self) -> dict[str, Method | None]:
        """What `convert_` takes as overrides."""
        dense = dict.fromkeys(self.modules_to_not_convert)
        return {**dense, **{name: build(settings) for name, settings in self.overrides.items()}}

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
