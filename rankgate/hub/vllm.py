"""Converted models in vLLM: `vllm serve DIR`, once this package is installed beside vLLM (entry point of plugins).

vLLM builds its own layers, which join members that we group, too (q/k/v, gate/up), and reads tensors of each member
into its rows, or those of a shard: all that is stored (see `stored`) belongs to rows, to columns, or to neither. When a
layer is loaded, its tensors become a group as kernels want it, and calls are those of our operator, which graphs and
compilers see as one (`torch.ops.rankgate.quantized_linear.parts`).

All that is imported from vLLM is in this module; written for 0.32. It runs in every process of vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    RowvLLMParameter,
)

import rankgate.ops  # noqa: F401  registers kernels
from rankgate.errors import RankgateError
from rankgate.hub import stored
from rankgate.hub.config import FORMAT, NAME
from rankgate.quantized import GROUP, QuantizedGroup

JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ROWS = {"weight_packed", "weight_scale", "weight_zero_point", "low_rank_A", "refinement_packed", "refinement_row"}
COLUMNS = {"weight_packed", "weight_scale", "weight_zero_point", "low_rank_B", "refinement_packed"}
VECTORS = {"refinement_column", "refinement_threshold"}  # whose only dimension is that of columns


def register() -> None:
    """Make vLLM know the method of quantisation; may be called again."""
    register_quantization_config(NAME)(Config)


class Config(QuantizationConfig):
    """`quantization_config` of a stored model, which says what each linear is made of."""

    def __init__(self, modules: list[dict[str, Any]]) -> None:
        super().__init__()
        self.specs = {spec["name"]: spec for spec in modules}
        self.packed_modules_mapping = dict(JOINED)  # of models that do not give theirs

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        """Raises RankgateError for an older format, which lacks names that vLLM needs."""
        if config.get("format") != FORMAT:
            raise RankgateError(
                f"the model is stored in format {config.get('format')}, vLLM needs {FORMAT}; open it with "
                "from_pretrained and save it again"
            )
        return cls(config["modules"])

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.specs = {hf_to_vllm_mapper.apply_list([name])[0]: spec for name, spec in self.specs.items()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Raises RankgateError for what vLLM has no place for: other methods, layers that it joins otherwise."""
        specs = self._members(prefix)
        if isinstance(layer, ParallelLMHead) and specs:
            raise RankgateError("vLLM has no place for a converted output embedding; convert without --lm-head")
        if not isinstance(layer, LinearBase):
            return None
        return Linear(specs) if specs else UnquantizedLinearMethod()

    def _members(self, prefix: str) -> list[dict[str, Any]]:
        parent, _, leaf = prefix.removeprefix("draft_model.").rpartition(".")
        names = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(leaf, [leaf])]
        specs = [self.specs[name] for name in names if name in self.specs]
        if not specs:
            return []
        if specs[0]["kind"] != QuantizedGroup.__name__:
            raise RankgateError(f"{names[0]} is of a method that vLLM cannot run; convert by lrq, int8 or int4")
        if len(specs) < len(names) or len({spec["shared"] for spec in specs}) > 1:
            raise RankgateError(f"{', '.join(names)} are one layer of vLLM, but no input group; leave them dense")
        return specs


@register_weight_loader_v2_supported_method
class Linear(LinearMethodBase):
    """One of vLLM's linears. specs: of the members that it joins, see `layout.describe`."""

    def __init__(self, specs: list[dict[str, Any]]) -> None:
        self.spec = specs[0]

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises RankgateError if a shard of the inputs is no whole number of groups of 64."""
        n, m = input_size_per_partition, sum(output_partition_sizes)
        if n != input_size and n % GROUP:
            raise RankgateError(
                f"{self.spec['name']} has {input_size} inputs, of which each of {input_size // n} processes would get "
                f"no whole groups of {GROUP}; use another --tensor-parallel-size"
            )
        for name, tensor in stored.shapes(self.spec, m, n, params_dtype).items():
            loader = extra_weight_attrs.get("weight_loader")
            layer.register_parameter(name, _parameter(name, torch.empty(tensor[1], dtype=tensor[0]), loader))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        tensors = {}
        for name in stored.shapes(self.spec, 0, 0, torch.float32):
            tensors[name] = getattr(layer, name).data
            delattr(layer, name)
        n = min(tensors["weight_packed"].shape[1] * 32 // self.spec["bits"], self.spec["n"])
        layer.group = stored.build({**self.spec, "n": n}, [tensors])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        group: Any = layer.group
        y: Tensor = group(x)
        return y if bias is None else y + bias


def _parameter(name: str, data: Tensor, weight_loader: Any) -> Any:
    """A parameter that knows which of its dimensions a shard has a part of."""
    more = {"data": data, "weight_loader": weight_loader}
    if name in VECTORS:
        return RowvLLMParameter(input_dim=0, **more)
    if name in ROWS and name in COLUMNS:
        return GroupQuantScaleParameter(output_dim=0, input_dim=1, **more)
    if name in ROWS:
        return ChannelQuantScaleParameter(output_dim=0, **more)
    return RowvLLMParameter(input_dim=1, **more) if name in COLUMNS else BasevLLMParameter(**more)
