"""The exact limits of every method on every architecture, and what `convert_` reports."""

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens

from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_, converted_layers
from rankgate.core import GatedGroup
from rankgate.errors import RankgateError
from rankgate.methods import ASVDConfig, GSIConfig, SparseConfig, SVDConfig
from rankgate.methods.svd import rank_at

EXACT = {
    "svd full rank": SVDConfig(rank=1.0, allow_larger=True),
    "svd all energy": SVDConfig(energy=1.0, allow_larger=True),
    "asvd full rank": ASVDConfig(rank=1.0, allow_larger=True),
    "gsi full rank": GSIConfig(rank=1.0, eps=1.0, allow_larger=True),
    "gsi eps 0": GSIConfig(rank=0.25, eps=0.0),
    "gsi context full rank": GSIConfig(rank=1.0, eps=1e-3, basis="context", allow_larger=True),
    "gsi context eps 0": GSIConfig(rank=0.25, eps=0.0, basis="context"),
    "sparse keep 1": SparseConfig(keep=1.0),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", EXACT)
def test_exact_limits_equal_dense(architecture, name, dtype):
    dense = tiny_model(architecture, dtype)
    model = twin(dense)
    reports = convert_(model, EXACT[name], calibrated(dense))
    assert sum(not report.reason for report in reports) >= 4
    ids = tokens(2, 24)
    expected, actual = logits(dense, ids), logits(model, ids)
    if name == "gsi context eps 0" or (name == "gsi eps 0" and dtype != torch.bfloat16):
        torch.testing.assert_close(actual, expected)  # the same products; only their batching may differ
    elif dtype == torch.bfloat16:  # two roundings a layer or more instead of one, perhaps of factors rounded themselves
        reference = logits(twin(dense).double(), ids)
        error = (actual.double() - reference).norm()
        assert error <= 4 * (expected.double() - reference).norm()
    else:
        scale = expected.abs().max().item()
        tolerance = scale * (2e-3 if "context" in name else 2e-5 if dtype == torch.float32 else 1e-10)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_limits_are_not_trivial():
    """Away from the limits every method must differ from dense, or the tests above test nothing."""
    dense = tiny_model("llama")
    stats = calibrated(dense)
    ids = tokens(2, 24)
    contenders = SVDConfig(rank=4), ASVDConfig(rank=4), GSIConfig(4, 0.9), GSIConfig(4, 0.9, "context"), SparseConfig()
    for method in contenders:
        model = twin(dense)
        convert_(model, method, stats)
        assert (logits(model, ids) - logits(dense, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_svd_is_the_best_approximation_of_the_weight(rank):
    torch.manual_seed(0)
    dense = tiny_model("gpt2", torch.float64)
    model = twin(dense)
    reports = {report.name: report for report in convert_(model, SVDConfig(rank=rank))}
    for name, layer in converted_layers(model):
        assert isinstance(layer.group, GatedGroup)
        W = dense.get_submodule(name).weight.T
        sigma = torch.linalg.svdvals(W)
        error = (W - layer.group.A @ layer.group.subspace.B).square().sum()
        torch.testing.assert_close(error, sigma[rank:].square().sum())
        kept = sigma[:rank].square().sum() / sigma.square().sum()
        assert reports[name].kept == pytest.approx(kept.item())


def test_asvd_has_the_least_output_error_on_the_calibration_text():
    dense = tiny_model("llama", torch.float64)
    stats = calibrated(dense)
    moments = {name: group.C for group in stats.groups for name in group.members}

    def output_error(model):
        errors = {}
        for name, layer in converted_layers(model):
            E = dense.get_submodule(name).weight - layer.group.A @ layer.group.subspace.B
            errors[name] = (E @ moments[name] @ E.T).trace()
        return errors

    models = {method.name: twin(dense) for method in (SVDConfig(rank=6), ASVDConfig(rank=6))}
    convert_(models["svd"], SVDConfig(rank=6))
    reports = {r.name: r for r in convert_(models["asvd"], ASVDConfig(rank=6), stats)}
    plain, aware = output_error(models["svd"]), output_error(models["asvd"])
    assert all(aware[name] < plain[name] for name in aware)
    for name, error in aware.items():  # what is lost is what the report says is lost
        W = dense.get_submodule(name).weight
        total = (W @ moments[name] @ W.T).trace()
        assert 1 - reports[name].kept == pytest.approx((error / total).item(), rel=1e-3)


def test_gsi_keeps_the_reported_share_of_the_inputs_energy():
    dense = tiny_model("llama", torch.float64)
    stats = calibrated(dense)
    model = twin(dense)
    reports = {report.name: report for report in convert_(model, GSIConfig(rank=8), stats)}
    for group in stats.groups:
        V = model.get_submodule(group.members[0]).group.subspace.B.T
        torch.testing.assert_close(V.T @ V, torch.eye(8, dtype=V.dtype))
        kept = (V.T @ group.C @ V).trace() / group.C.trace()
        assert all(reports[name].kept == pytest.approx(kept.item()) for name in group.members)


def test_gsi_stacks_a_group_and_shares_single_weights_with_the_dense_model():
    dense = tiny_model("llama")
    model = twin(dense)
    convert_(model, GSIConfig(rank=4), calibrated(dense))
    block, original = model.model.layers[0], dense.model.layers[0]
    group = block.self_attn.q_proj.group
    assert group is block.self_attn.v_proj.group and group is not block.mlp.gate_proj.group
    for name in ("q_proj", "k_proj", "v_proj"):
        layer, weight = getattr(block.self_attn, name), getattr(original.self_attn, name).weight
        assert torch.equal(group.W[layer.start : layer.stop], weight)
    assert block.mlp.down_proj.group.W.data_ptr() == original.mlp.down_proj.weight.data_ptr()


def test_layers_that_gain_nothing_stay_dense_and_say_why():
    model = tiny_model("llama")
    reports = convert_(model, SVDConfig(rank=20))
    assert all(type(model.get_submodule(r.name)) is torch.nn.Linear for r in reports if r.reason)
    by_kind = {report.name.rsplit(".", 1)[-1]: report.reason for report in reports}
    assert by_kind["q_proj"] == "rank 20 reads 1.25 x dense"
    assert by_kind["k_proj"] == "rank 16 reads 1.50 x dense"  # a rank is cut to min(m, n)
    assert {r.reason for r in convert_(tiny_model("mamba"), SVDConfig(rank=2)) if "dt_proj" in r.name} == {
        "never called as a layer"
    }


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (GSIConfig, {"rank": 0}, "rank 0"),
        (GSIConfig, {"rank": -3}, "rank -3"),
        (GSIConfig, {"rank": 1.5}, "rank 1.5"),
        (GSIConfig, {"rank": float("nan")}, "rank nan"),
        (GSIConfig, {"eps": -0.1}, "eps -0.1"),
        (GSIConfig, {"eps": float("nan")}, "eps nan"),
        (GSIConfig, {"basis": "other"}, "unknown basis"),
        (GSIConfig, {"basis": "context", "eps": 1.0}, "never opens"),
        (SVDConfig, {}, "either a rank or an energy"),
        (SVDConfig, {"rank": 4, "energy": 0.9}, "either a rank or an energy"),
        (SVDConfig, {"energy": 0.0}, "energy 0.0"),
        (ASVDConfig, {"energy": 1.1}, "energy 1.1"),
        (SparseConfig, {"keep": 0.0}, "keep 0.0"),
        (SparseConfig, {"keep": float("nan")}, "keep nan"),
    ],
)
def test_settings_out_of_range_are_refused(config, settings, message):
    with pytest.raises(RankgateError, match=message):
        config(**settings)


def test_bad_combinations_are_refused_with_one_line():
    model = tiny_model("llama")
    stats = calibrated(model)
    with pytest.raises(RankgateError, match="needs calibration"):
        convert_(model, GSIConfig())
    with pytest.raises(RankgateError, match="exceeds the 32 inputs"):
        convert_(model, GSIConfig(rank=33), stats)
    for group in stats.groups:
        group.tokens = 7
    with pytest.raises(RankgateError, match="too few for rank 8"):
        convert_(model, GSIConfig(rank=8), stats)
    convert_(model, SVDConfig(rank=4))
    with pytest.raises(RankgateError, match="converted already"):
        convert_(model, SVDConfig(rank=4))


def test_weights_that_are_not_finite_are_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(RankgateError, match=r"layers\.1\.mlp\.up_proj has weights that are not finite"):
        convert_(model, SVDConfig(rank=4))


def test_asvd_survives_inputs_that_are_always_zero():
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[:8] = 0
        model.model.decoder.layers[0].fc1.bias[:8] = -1
    dense, stats = twin(model), calibrated(model)
    dead = next(group for group in stats.groups if group.members[0].endswith("layers.0.fc2"))
    assert dead.eigen()[0][-1] == 0
    convert_(model, ASVDConfig(rank=1.0, allow_larger=True), stats)
    ids = tokens(2, 20)
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-3, atol=1e-3)


def test_rank_at_an_energy():
    energy = torch.tensor([0.5, 0.75, 0.9, 1.0])
    assert [rank_at(energy, share) for share in (0.1, 0.5, 0.51, 0.9, 1.0)] == [1, 1, 2, 3, 4]
