import json

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens
from safetensors.torch import save_file

from rankgate.calibration import Stats, add_outer, calibrate
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


def test_low_precision_models_are_accumulated_in_float32():
    assert all(group.C.dtype == torch.float32 for group in calibrated(tiny_model("llama", torch.bfloat16)).groups)


def test_save_and_load(tmp_path):
    model = tiny_model("llama")
    stats = calibrated(model)
    stats.text = "a source"
    stats.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    loaded.check(model)
    assert loaded.tokens == stats.tokens and loaded.text == stats.text and torch.equal(loaded.hashes, stats.hashes)
    for a, b in zip(stats.groups, loaded.groups, strict=True):
        assert a.members == b.members and a.tokens == b.tokens and torch.equal(a.C, b.C)


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
