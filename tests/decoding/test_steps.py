"""A captured step: its kernels, how it is split into parts to compile, and several tokens in one."""

import pytest
import torch
from conftest import LLAMA, calibrated, tokens
from test_decode import CAPTURED, METHODS, both, variant
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from rankgate.conversion.convert import convert_
from rankgate.core import FEW
from rankgate.decoding import capture
from rankgate.decoding import steps as module
from rankgate.decoding.recorded import lift_constants, share_layers
from rankgate.decoding.steps import Steps
from rankgate.ops.attention import attend_reference
from rankgate.ops.cpu.attention import attend

pytestmark = pytest.mark.filterwarnings("ignore:.*without the fast path")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("heads", "groups", "width", "value_width"), [(9, 3, 64, 64), (4, 4, 5, 7), (7, 1, 33, 16)])
@pytest.mark.parametrize("position", [0, 1, 17, 63])
def test_attention_kernel_matches_its_definition(dtype, heads, groups, width, value_width, position):
    generator = torch.Generator().manual_seed(position)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = random(1, heads, 1, width), random(1, groups, 1, width), random(1, groups, 1, value_width)
    keys, values = random(1, groups, 64, width), random(1, groups, 64, value_width)
    at = torch.tensor([[position]])
    exact = attend_reference(*(t.double() for t in (q, k, v, keys, values)), at, 0.3)
    plain_keys, plain_values = keys.clone(), values.clone()
    plain = attend_reference(q, k, v, plain_keys, plain_values, at, 0.3)
    got = attend(q, k, v, keys, values, at, 0.3)
    assert got.shape == (1, 1, heads, value_width)
    assert got.dtype == dtype
    assert torch.equal(keys, plain_keys)
    assert torch.equal(values, plain_values)
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()
    keys[:, :, 0, 0] = float("nan")
    assert attend(q, k, v, keys, values, at, 0.3).isnan().all() or position == 0


@pytest.mark.parametrize("method", ["dense", "gsi"])
def test_layers_that_do_the_same_are_compiled_once(method):
    """On a GPU; here the step is split in the same way, and nothing is compiled."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "num_hidden_layers": 4})).eval()
    if METHODS[method] is not None:
        convert_(model, METHODS[method], calibrated(model, sensitivity=METHODS[method].needs_sensitivity))
    inputs, *memory = capture._example(model, [torch.Size([1, 2, 8, 8])] * 8, 1, 2)
    options = {"use_cache": True, "position_ids": inputs[1], "return_dict": True}
    with torch.no_grad():
        trace = capture._trace(model, options, inputs, *memory, 2)
        expected = trace(*inputs)
        trace.graph.eliminate_dead_code()
        constants, parts = lift_constants(trace), []
        whole = share_layers(trace, lambda part: parts.append(part) or part)
        torch.testing.assert_close(whole(*inputs, *constants), expected)
    assert len(parts) == 3  # before, between and after the attentions
    calls = whole.graph.find_nodes(op="call_module")
    assert len({id(whole.get_submodule(node.target)) for node in calls}) == 3 + 4
    assert len(calls) == 9


@pytest.mark.parametrize("method", ["dense", "lrq"])
@pytest.mark.parametrize("architecture", sorted(CAPTURED))
def test_several_tokens_in_a_captured_step(architecture, method, monkeypatch):
    """Whatever is appended to fill the step, whatever is taken back, and when the cache grows."""
    monkeypatch.setattr(module, "CAPACITY", 8)
    model, ids = variant(architecture, method), tokens(1, 30)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)  # in pieces that kernels take, as steps are: no gate can tip over
        expected = torch.cat([model(piece, past_key_values=cache).logits[0] for piece in ids.split(FEW, dim=1)])
        kwargs = {"past_key_values": DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
        kwargs["position_ids"] = torch.arange(3)[None]
        steps = Steps(model, ids[:, :3], kwargs)
        rows = [steps.prompt()]
        for count in (2, 5, 1, 5, 4):
            end = steps.length + count
            if count > 1:
                wrong = ids[:, steps.length : end].flip(1)
                steps.read_captured(wrong, 5)
                steps.rewind(end - count)
                rows.append(steps.read_captured(ids[:, end - count : end], 5))
            else:
                rows.append(steps.next(ids[:, end - 1 : end]))
        rows.append(steps.read(ids[:, steps.length : 27]))
        rows.append(steps.read_captured(ids[:, 27:], 5))
    assert {(1, 1), (1, 5)} == set(module._captures[model][1]) and None not in module._captures[model][1].values()
    torch.testing.assert_close(torch.cat(rows), expected[2:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ["setting", "hook", "config", "data"])
def test_a_capture_knows_what_it_depends_on(change):
    model, ids = variant("llama", "dense"), tokens(1, 6)
    both(model, ids)
    before = module._fingerprint(model)
    assert module._fingerprint(model) == before
    norm = model.model.layers[0].input_layernorm
    if change == "setting":
        norm.variance_epsilon = 10.0
    elif change == "hook":
        norm.register_forward_hook(lambda _, args, y: 3 * y)
    elif change == "config":
        model.config.some_flag = True
    else:
        norm.weight.data = -norm.weight.data
    expected, got = both(model, ids)
    assert torch.equal(expected, got)
    assert module._fingerprint(model) != before
