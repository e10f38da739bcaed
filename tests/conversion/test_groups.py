import pytest
import torch
import transformers
from conftest import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from rankgate import Int8Config, convert_
from rankgate.conversion.convert import converted_layers
from rankgate.conversion.groups import HEAD, input_groups, linears, read_linear

GROUPS = {  # of the first block, by the last part of the names
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gptj": [["q_proj", "k_proj", "v_proj", "fc_in"], ["out_proj"], ["fc_out"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "qwen2": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "mamba": [["in_proj"], ["x_proj"], ["out_proj"]],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_are_discovered(architecture):
    groups = input_groups(tiny_model(architecture))
    first = [[name.rsplit(".", 1)[-1] for name in members] for members in groups[: len(groups) // 2]]
    assert sorted(map(sorted, first)) == sorted(map(sorted, GROUPS[architecture]))
    assert len(groups) == 2 * len(GROUPS[architecture])


def test_lm_head_and_layers_that_are_not_called_are_left_out():
    model = tiny_model("mamba")
    found = linears(model)
    assert not any("lm_head" in name for name in found)
    grouped = {name for members in input_groups(model) for name in members}
    assert {name.rsplit(".", 1)[-1] for name in found.keys() - grouped} == {"dt_proj"}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_read_linear_is_the_map_of_the_module(architecture):
    for name, module in linears(tiny_model(architecture)).items():
        layer = read_linear(name, module)
        x = torch.randn(3, layer.n)
        expected = x @ layer.W.T if layer.bias is None else x @ layer.W.T + layer.bias
        torch.testing.assert_close(module(x), expected)


def test_a_subclass_counts_if_it_multiplies():
    class Same(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T + self.bias

    class Other(nn.Linear):
        def forward(self, input):
            return super().forward(input).relu()

    model = tiny_model("gpt2")
    model.transformer.same, model.transformer.other = Same(3, 4), Other(3, 4)
    assert "transformer.same" in linears(model) and "transformer.other" not in linears(model)


MIXTURES = {
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen2MoeConfig": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "GptOssConfig": {"num_local_experts": 4, "head_dim": 16},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_weight_that_a_token_reads_is_reported(kind):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes, **heads, **MIXTURES[kind])).eval()
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("_bias")}
    matrices = sum(p.numel() for p in weights.values()) - model.get_input_embeddings().weight.numel()
    reports = convert_(model, Int8Config())
    assert sum(report.m * report.n for report in reports) == matrices
    reasons = {report.name: report.reason for report in reports if report.reason}
    assert reasons["lm_head"] == HEAD and not any("experts." in name for name in reasons)
    for name, _ in converted_layers(model):
        assert not name.endswith(("gate", "router"))  # of experts


def test_what_lies_beside_experts_and_chooses_none_is_a_linear():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 8))

    block = tiny_model("llama")
    block.model.layers[0].experts = Experts()
    block.model.layers[0].router = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    block.model.layers[0].scale = nn.Linear(8, 1)
    block.model.layers[0].other = nn.Linear(8, 8)
    found = {name.partition("layers.0.")[2] for name in linears(block)}
    assert {"other", "self_attn.q_proj"} < found and not {"router.0", "scale"} & found
