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

from rankgate.errors import RankgateError
from rankgate.hub.config import FORMAT, NAME, RankgateConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


register_quantization_config(NAME)(RankgateConfig)


@register_quantizer(NAME)
class RankgateQuantizer(HfQuantizer):
    """What transformers asks of a quantisation: empty modules before loading, or conversion after it."""

    quantization_config: RankgateConfig
    tp_size = 1  # processes that share each layer

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
        """Every tensor once: of members of a group as `stored` says, of shared gates under the first name.

        Raises RankgateError if the model is sharded.
        """
        if self.tp_size > 1:
            raise RankgateError("a sharded model has only parts of its layers; save it where it is whole")
        from rankgate.conversion.convert import converted_layers
        from rankgate.core import GroupedLinear
        from rankgate.hub.stored import tensors_of

        grouped = {name: layer for name, layer in converted_layers(model) if isinstance(layer, GroupedLinear)}
        inside = tuple(f"{name}." for name in grouped)
        aliases = {name for name, kept in model.all_tied_weights_keys.items() if ".gate." in kept}
        others = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name not in aliases and not name.startswith(inside)
        }
        return {**others, **tensors_of(grouped)}, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from rankgate.hub.loading import refuse_missing_

        self.tp_size = self._tp_size(model)
        refuse_missing_(model, converted=self.pre_quantized)
        if self.pre_quantized:
            import torch

            from rankgate.experts import unstack_
            from rankgate.hub.layout import rebuild, tie

            modules = self.quantization_config.modules or []
            with torch.device("meta"):
                unstack_(model, self.quantization_config.experts)
                rebuild(model, modules, model.dtype, self.quantization_config.format)
            tie(model)
            self.expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
            for module in modules:  # a parent may want to initialise weights of its children, which are not there
                parent = model.get_submodule(module["name"].rpartition(".")[0])
                if not parent._non_persistent_buffers_set:  # what it has itself is stored
                    parent._is_hf_initialized = True  # type: ignore[assignment]

    def _tp_size(self, model: PreTrainedModel) -> int:
        """How many processes share each layer. Raises RankgateError for other ways to share a model."""
        wanted = getattr(model.config, "distributed_config", None)
        if wanted is None:
            return 1
        sizes = {
            kind: getattr(wanted, f"{kind}_size", None) or 1 for kind in ("tp", "fsdp", "dp_replicate", "pp", "ep")
        }
        if max(sizes.values()) > 1 and not self.pre_quantized:
            raise RankgateError("a model cannot be converted while it is sharded; convert and save it before")
        tp_size = sizes.pop("tp")
        if max(sizes.values()) > 1 or isinstance(wanted.tp_plan, dict):
            raise RankgateError("converted weights know tensor parallelism alone, by their own plan; give tp_size only")
        if tp_size > 1 and self.quantization_config.experts:
            raise RankgateError(
                "experts that are converted cannot be shared by processes; open the model on one device"
            )
        if tp_size > 1 and not hasattr(HfQuantizer, "update_parallel_plan"):
            raise RankgateError("this version of transformers cannot share converted weights; install 5.23 or later")
        return int(tp_size)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Takes converted layers out of the plan for tensor parallelism, which `sharding` carries out for them."""
        if self.tp_size == 1 or plan is not model.tp_plan:
            return
        from torch import nn

        from rankgate.hub.sharding import take_styles

        names = [spec["name"] for spec in self.quantization_config.modules or []]
        dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.styles = take_styles(names, dense, plan)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from rankgate.conversion.convert import methods_of
        from rankgate.hub.layout import tie
        from rankgate.hub.loading import align_, convert_loaded_, freeze_
        from rankgate.hub.stored import fuse

        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise RankgateError("converted weights cannot be offloaded; give a device_map of one device, or none")
        model.is_quantized = False  # type: ignore[assignment]  # what forbids casts, which leave codes alone here
        align_(model)
        if self.pre_quantized:
            self._check_shapes(model)
            config = self.quantization_config
            fuse(model, config.modules or [], model.dtype)
            config.format = FORMAT
            tie(model)
            freeze_(model)
            for method in methods_of(config.build(), config.others()):
                method.attach(model)
            if self.tp_size > 1:
                from rankgate.hub.sharding import Share, shard_

                assert model._device_mesh is not None
                mesh = model._device_mesh["tp"]
                shard_(model, self.styles, Share(mesh.get_local_rank(), mesh.size(), mesh.get_group()))
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
        from rankgate.hub.loading import dequantize_

        dequantize_(model, dtype)
        return model
