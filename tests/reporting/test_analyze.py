import pytest
import torch
from conftest import calibrated, tiny_model, tokens

from rankgate.reporting.analyze import (
    ENERGIES,
    FRACTIONS,
    QUANTILES,
    activation_profiles,
    theoretical_speedup,
    weight_spectra,
)
from rankgate.reporting.report import analysis_report
from rankgate.reporting.spectra import spectra_table


def test_ranks_and_compression_of_a_known_spectrum():
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    sigma = torch.ones(32)
    sigma[:4] = 6.0  # 144 of 172 is 83.7 %
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(32, 32))[0] * sigma)
    spectrum = weight_spectra(model)[0]
    assert spectrum.name.endswith("layers.0.self_attn.q_proj")
    assert spectrum.ranks == {0.80: 4, 0.85: 7, 0.90: 15, 0.95: 24}
    assert spectrum.compression(0.80) == pytest.approx(32 * 32 / (4 * 64))
    assert spectrum.curve[0] == 0 and spectrum.curve[-1] == pytest.approx(1)


def test_theoretical_speedup_never_counts_a_layer_that_grows():
    spectra = weight_spectra(tiny_model("llama"))
    read = sum(min(s.m * s.n, s.ranks[0.95] * (s.m + s.n)) for s in spectra)
    assert theoretical_speedup(spectra, 0.95) == pytest.approx(sum(s.m * s.n for s in spectra) / read)
    assert all(theoretical_speedup(spectra, e) >= 1 for e in ENERGIES)


def test_residual_profiles_equal_a_direct_projection():
    model = tiny_model("llama", torch.float64)
    stats = calibrated(model)
    held_out = tokens(3, 20, seed=7)
    profiles = activation_profiles(model, stats, {"in-sample": tokens(16, 32, seed=1), "held-out": held_out})
    name = stats.groups[2].members[0]
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=held_out)
    handle.remove()
    V = stats.groups[2].eigen()[1][:, : round(0.25 * 32)]
    ratio = (seen[0] - seen[0] @ V @ V.T).norm(dim=1) / seen[0].norm(dim=1)
    profile = profiles[2]
    assert profile.name == name
    torch.testing.assert_close(profile.ratios[:, FRACTIONS.index(0.25)].double(), ratio, rtol=1e-5, atol=1e-6)
    median = profile.residuals["held-out"][FRACTIONS.index(0.25)][QUANTILES.index(0.5)]
    assert median == pytest.approx(ratio.quantile(0.5).item(), rel=1e-5)
    C = stats.groups[2].C
    in_sample = profile.residuals["in-sample"]
    assert in_sample[0][2] > in_sample[-1][2]
    assert 1 <= profile.effective_rank <= C.shape[0]


def test_effective_rank_counts_equal_directions():
    model = tiny_model("llama")
    stats = calibrated(model)
    stats.groups[0].C = torch.diag(torch.tensor([1.0] * 5 + [0.0] * 27))
    profile = activation_profiles(model, stats, {"held-out": tokens(1, 8)})[0]
    assert profile.effective_rank == pytest.approx(5, rel=1e-4)


def test_report_is_one_file_with_every_plot_inside(tmp_path):
    model = tiny_model("opt")
    stats = calibrated(model)
    spectra = weight_spectra(model)
    profiles = activation_profiles(model, stats, {"in-sample": tokens(2, 16), "held-out": tokens(2, 16, seed=3)})
    facts = {"model": "<tiny> & odd"}
    html = analysis_report(facts, spectra, profiles).write(tmp_path / "report").read_text()
    assert html.count("data:image/png;base64,") == 4
    assert "&lt;tiny&gt; &amp; odd" in html
    assert all(s.name in html for s in spectra) and len(spectra_table(spectra)[1]) == len(spectra)
    pngs = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert pngs == ["gates.png", "ranks.png", "residuals.png", "spectra.png"]
    assert all((tmp_path / "report" / png).read_bytes().startswith(b"\x89PNG") for png in pngs)
