import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from torch import nn

from rankgate.conversion.groups import input_groups, linears, read_linear

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
