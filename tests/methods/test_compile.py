"""`torch.compile` of converted models: one graph, the same answers, and one call of the operator per input group."""

import pytest
import torch
from conftest import calibrated, tiny_model, tokens

from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_, converted_layers, shared_part
from rankgate.core import GroupedLinear
from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, Int8Config, LRQConfig, SparseConfig, SVDConfig

METHODS = {
    "gsi": GSIConfig(rank=0.25, eps=0.5),
    "svd": SVDConfig(rank=0.25),
    "asvd": ASVDConfig(rank=0.25),
    "lrq": LRQConfig(rank=8, refine=0.0, rounds=1),
    "lrq refined": LRQConfig(bits=8, rank=8, refine=0.3, rounds=1, symmetric=False),
    "int8": Int8Config(),
    "int4": Int4Config(),
    "sparse": SparseConfig(),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def converted(architecture, name, **options):
    dense = tiny_model(architecture)
    model = twin(dense)
    convert_(model, METHODS[name], calibrated(dense, sensitivity=METHODS[name].needs_sensitivity), **options)
    return model


class Counter:
    """The backend "eager"; `calls` has the calls of Rankgate's operators, by graph."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, inputs):
        targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        self.calls.append([target for target in targets if target.startswith("rankgate")])
        return module.forward


@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_one_graph_with_the_same_answers(name):
    model = converted("qwen2", name, lm_head=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for ids in (tokens(1, 1), tokens(2, 20)):
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(("name", "operator"), [("gsi", "gated"), ("lrq refined", "quantized_linear.parts")])
def test_a_group_is_asked_once(name, operator):
    model, counter = converted("llama", name), Counter()
    groups = {shared_part(layer) for _, layer in converted_layers(model)}
    torch.compile(model, fullgraph=True, backend=counter)(input_ids=tokens(1, 1), use_cache=False)
    assert counter.calls == [[f"rankgate.{operator}"] * len(groups)] and len(groups) == 8
    assert all(group._traced is None for group in groups)


@pytest.mark.parametrize("name", ["gsi", "int4"])
def test_layers_of_the_same_shape_share_a_graph_and_see_their_tensors_move(name):
    model, counter = converted("llama", name), Counter()
    x = torch.randn(1, 1, 32)
    for block in model.model.layers:
        torch.testing.assert_close(torch.compile(block.mlp, fullgraph=True, backend=counter)(x), block.mlp(x))
    block = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend=counter)
    x.normal_()  # the same tensor, as a captured device graph would use it
    other = model.model.layers[1].mlp.state_dict()
    torch.testing.assert_close(block(x), model.model.layers[0].mlp(x))
    model.model.layers[0].mlp.load_state_dict({key: value.clone() for key, value in other.items()}, assign=True)
    torch.testing.assert_close(block(x), model.model.layers[1].mlp(x))
    assert len(counter.calls) == 1


def test_members_that_are_called_in_another_order_or_not_at_all():
    model = converted("llama", "gsi")
    gate, up = model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj
    assert isinstance(gate, GroupedLinear) and gate.group is up.group

    def both(x, y):
        return up(x), gate(y), gate(x), up(y), up(x)

    x, y = torch.randn(2, 3, 32)
    for got, expected in zip(torch.compile(both, fullgraph=True, backend="eager")(x, y), both(x, y), strict=True):
        torch.testing.assert_close(got, expected)
    only = torch.compile(gate, fullgraph=True, backend="eager")
    for _ in range(2):
        x.normal_()
        torch.testing.assert_close(only(x), gate(x))


def test_a_gate_that_is_watched_when_it_is_compiled_is_reported():
    """The branch that a gate is ends the graph then. Hooks that come later are not seen: that is how `compile` is."""
    group, seen = converted("llama", "gsi").model.layers[0].mlp.gate_proj.group, []
    group.subspace.register_forward_hook(lambda _, args, projection: seen.append(projection.fire))
    x = torch.randn(5, 32)
    torch.testing.assert_close(torch.compile(group, backend="eager")(x), group(x))
    assert len(seen) == 2 and torch.equal(*seen)
