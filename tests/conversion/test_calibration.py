import json

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens
from safetensors.torch import save_file

from rankgate.conversion import calibration
from rankgate.conversion.calibration import Stats, add_outer, calibrate, sample_stride
from rankgate.errors import RankgateError


@pytest.mark.parametrize("n", [1, 3, 5, 8, 33])
def test_blockwise_outer_product_is_complete_above_the_diagonal(n):
    x = torch.randn(20, n, dtype=torch.float64)
    C = torch.zeros(n, n, dtype=torch.float64)
    add_outer(C, x)
    torch.testing.assert_close(C.triu(), (x.T @ x).triu())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_moment_equals_the_direct_one(architecture):
    model = tiny_model(architecture, torch.float64)
    windows = tokens(5, 16)
    stats = calibrate(model, windows, batch_size=2)
    for group in stats.groups:
        seen = []
        handle = model.get_submodule(group.members[-1]).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        with torch.no_grad():
            model(input_ids=windows)
        handle.remove()
        x = torch.cat(seen)
        assert group.tokens == len(x) == 80
        torch.testing.assert_close(group.C, x.T @ x / len(x))


def test_several_passes_see_what_one_does(monkeypatch):
    model, windows = tiny_model("llama"), tokens(5, 16)
    once = calibrate(model, windows)
    monkeypatch.setattr(calibration, "split_passes", lambda _, members: [[names] for names in members])
    for a, b in zip(once.groups, calibrate(model, windows).groups, strict=True):
        assert a.members == b.members
        assert a.tokens == b.tokens
        assert torch.equal(a.C, b.C)
        assert torch.equal(a.sample, b.sample)


def test_low_precision_models_are_accumulated_in_float32():
    assert all(group.C.dtype == torch.float32 for group in calibrated(tiny_model("llama", torch.bfloat16)).groups)


def test_samples_are_tokens_of_the_text_at_every_position():
    model = tiny_model("llama", torch.float64)
    windows = tokens(64, 32)
    stats = calibrate(model, windows, batch_size=3)
    assert sample_stride(windows) == 9  # 8 would always pick the same 4 positions
    seen = []
    handle = model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    group = next(g for g in stats.groups if g.members[0] == "model.layers.0.mlp.gate_proj")
    torch.testing.assert_close(group.sample, seen[0].flatten(0, 1)[::9].bfloat16())
    assert all(g.sample.shape == (228, len(g.C)) for g in stats.groups)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sensitivity_is_the_mean_square_of_the_gradient_at_the_outputs(architecture):
    """With labels drawn from the model, the mean squared gradient at the logits is E[p (1 − p)]."""
    model = tiny_model(architecture, torch.float64)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    stats = calibrate(model, tokens(6, 32), sensitivity=True)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    again = calibrate(model, tokens(6, 32), sensitivity=True)
    for group, twin in zip(stats.groups, again.groups, strict=True):
        outputs = [model.get_submodule(name) for name in group.members]
        assert len(group.sensitivity) == sum(getattr(m, "out_features", getattr(m, "nf", 0)) for m in outputs)
        assert (group.sensitivity >= 0).all() and group.sensitivity.sum() > 0
        assert torch.equal(group.sensitivity, twin.sensitivity)


def test_sensitivity_equals_the_expected_kl_of_a_small_disturbance():
    """½ F_i δ² is the mean KL that a random sign times δ on output i causes, summed over the tokens that see it."""
    model = tiny_model("llama", torch.float64)
    windows = tokens(64, 32)
    group = calibrate(model, windows, sensitivity=True).groups[-1]
    layer = model.get_submodule(group.members[0])
    total, delta = 0.0, 1e-2
    with torch.no_grad():
        p = model(input_ids=windows).logits.log_softmax(-1)
        for seed in range(4):
            noise = delta * torch.randn(64, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            handle = layer.register_forward_hook(lambda _, args, y, noise=noise: y + noise)
            q = model(input_ids=windows).logits.log_softmax(-1)
            handle.remove()
            total += (p.exp() * (p - q)).sum(-1).mean().item() / 4
    assert total == pytest.approx(0.5 * delta**2 * group.sensitivity.sum().item(), rel=0.15)


def test_non_finite_gradients_raise():
    model = tiny_model("llama")
    handle = model.model.layers[1].mlp.register_full_backward_hook(lambda *_: (torch.full((1, 32, 32), torch.nan),))
    with pytest.raises(RankgateError, match="non-finite gradients"):
        calibrated(model, sensitivity=True)
    handle.remove()


@pytest.mark.parametrize("sensitivity", [False, True])
def test_save_and_load(tmp_path, sensitivity):
    model = tiny_model("llama")
    stats = calibrated(model, sensitivity=sensitivity)
    stats.text = "a source"
    stats.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    loaded.check(model)
    assert loaded.tokens == stats.tokens and loaded.text == stats.text and torch.equal(loaded.hashes, stats.hashes)
    for a, b in zip(stats.groups, loaded.groups, strict=True):
        assert a.members == b.members and a.tokens == b.tokens and torch.equal(a.C, b.C)
        assert torch.equal(a.sample, b.sample)
        assert b.sensitivity is None if a.sensitivity is None else torch.equal(a.sensitivity, b.sensitivity)
    assert loaded.has_sensitivity == sensitivity


@pytest.mark.parametrize("other", ["opt", "llama"])
def test_statistics_of_another_model_are_refused(other):
    model = tiny_model(other)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(RankgateError, match="another model"):
        calibrated(tiny_model("llama")).check(model)


def test_damaged_or_foreign_files_are_named(tmp_path):
    path = tmp_path / "stats"
    with pytest.raises(RankgateError, match="no statistics file"):
        Stats.load(path)
    for content in (b"", b"not safetensors", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(RankgateError, match="damaged"):
            Stats.load(path)
    save_file({"C.0": torch.eye(2)}, path, metadata={"rankgate": json.dumps({"format": "other"})})
    with pytest.raises(RankgateError, match="damaged"):
        Stats.load(path)


def test_non_finite_activations_raise():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(float("inf"))
    with pytest.raises(RankgateError, match="non-finite"):
        calibrated(model)
