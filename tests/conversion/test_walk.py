"""Running a model layer by layer is running it as a whole."""

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens

from rankgate.conversion.calibration import calibrate
from rankgate.conversion.walk import Walk


def as_a_whole(monkeypatch):
    monkeypatch.setattr(Walk, "of", classmethod(lambda cls, model: cls(model, [], 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_are_those_of_whole_runs(monkeypatch, architecture, dtype):
    model, windows = tiny_model(architecture, dtype), tokens(5, 140, seed=1) % 100 + 4
    if architecture != "mamba":
        windows = windows[:, :100]
    assert [name.rpartition(".")[2] for name, _ in Walk.of(model).layers] == ["0", "1"]
    stats = calibrate(model, windows, sensitivity=True, batch_size=2)
    as_a_whole(monkeypatch)
    for a, b in zip(stats.groups, calibrate(model, windows, sensitivity=True, batch_size=2).groups, strict=True):
        assert a.members == b.members and a.tokens == b.tokens
        torch.testing.assert_close(a.C, b.C)
        torch.testing.assert_close(a.sensitivity, b.sensitivity)
        assert torch.equal(a.sample, b.sample)


def test_linears_around_the_layers_are_seen_once():
    model = tiny_model("opt", torch.float64, word_embed_proj_dim=20)
    stats = calibrated(model, sensitivity=True)
    assert {"model.decoder.project_in", "model.decoder.project_out"} < {g.members[0] for g in stats.groups}
    assert all(group.tokens == 512 and group.sensitivity.sum() > 0 for group in stats.groups)


def test_a_model_is_left_as_it_was():
    model = tiny_model("llama")
    own = model.model.layers[1].forward
    model.model.layers[0].forward = wrapped = model.model.layers[0].forward  # as accelerate's hooks do
    calibrated(model, sensitivity=True)
    assert model.model.layers[0].forward is wrapped
    assert model.model.layers[1].forward == own and "forward" not in vars(model.model.layers[1])


def shared(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def passed_on(model):
    """The second layer reads what the first one found beside its hidden states."""
    first, second = model.model.layers
    first.register_forward_hook(lambda layer, _, y: setattr(layer, "found", y.mean()))
    second.register_forward_hook(lambda _, args, y: y * first.found)
    own = first.forward
    first.forward = lambda x, **rest: own(x * 1.5, **rest)


@pytest.mark.parametrize("change", [shared, passed_on])
def test_layers_that_depend_on_more_than_hidden_states_are_run_as_a_whole(monkeypatch, change):
    model = tiny_model("llama")
    change(model)
    assert not Walk.of(model).layers
    stats = calibrated(model, sensitivity=True)
    as_a_whole(monkeypatch)
    for a, b in zip(stats.groups, calibrated(model, sensitivity=True).groups, strict=True):
        assert torch.equal(a.C, b.C) and torch.equal(a.sensitivity, b.sensitivity)
