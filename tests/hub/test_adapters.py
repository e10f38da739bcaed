"""LoRA adapters on converted models."""

import pytest
import torch
from conftest import calibrated, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model

from rankgate.conversion.convert import convert_, converted_layers
from rankgate.errors import RankgateError
from rankgate.hub.adapters import adaptable
from rankgate.methods import GSIConfig, Int4Config, LRQConfig, SparseConfig

METHODS = (Int4Config(), LRQConfig(rank=4, refine=0.3, rounds=1), GSIConfig(rank=0.5, eps=0.3), SparseConfig(keep=0.5))
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
IDS = tokens(2, 12)


def converted(architecture, method, dtype=torch.float32):
    model = tiny_model(architecture, dtype)
    convert_(model, method, calibrated(model, sensitivity=method.needs_sensitivity))
    return model


def adapted(architecture, method):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[architecture])
    return get_peft_model(converted(architecture, method), adaptable(config))


def loss(model):
    return model(input_ids=IDS, labels=IDS).loss


def train(model, steps=5):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("architecture", TARGETS)
def test_an_adapter_learns_and_the_converted_weights_stay(architecture, method):
    model = adapted(architecture, method)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = loss(model).item()
    train(model)
    assert loss(model).item() < first - 0.1
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    adapters = [
        name for name, _ in model.get_base_model().named_modules() if name.endswith(tuple(TARGETS[architecture]))
    ]
    assert len({name.partition(".lora_")[0] for name in changed}) == len(adapters)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_an_untrained_adapter_changes_nothing(method):
    with torch.no_grad():
        expected = converted("llama", method)(input_ids=IDS).logits
        assert torch.equal(adapted("llama", method)(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_gradients_pass_converted_layers(method):
    """As far as no gate changes its mind, which a step this small does not bring about."""
    model = converted("llama", method, torch.float64)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def score(inputs):
        return model(inputs_embeds=inputs).logits.log_softmax(-1)[..., 5].sum()

    score(embedded).backward()
    step = 1e-5 * embedded.grad / embedded.grad.norm()
    with torch.no_grad():
        slope = (score(embedded + step) - score(embedded - step)).item() / 2e-5
    assert slope == pytest.approx(embedded.grad.norm().item(), rel=0.02)


def test_saved_and_loaded(tmp_path):
    model = adapted("llama", METHODS[0])
    train(model, steps=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        converted("llama", METHODS[0]), tmp_path, config=adaptable(LoraConfig.from_pretrained(tmp_path))
    )
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_merging_is_refused():
    model = adapted("llama", METHODS[0])
    with pytest.raises(RankgateError, match="cannot be merged into converted weights"):
        model.merge_and_unload()
    assert list(converted_layers(model.get_base_model()))
