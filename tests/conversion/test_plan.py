"""The planner: budgets, the choice, the check, plans on disk."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens

from rankgate.common.copies import twin
from rankgate.conversion import plan as planning
from rankgate.conversion.budget import Budget, Measured
from rankgate.conversion.calibration import Stats, calibrate
from rankgate.conversion.convert import convert_
from rankgate.conversion.plan import SETTINGS, Option, Planner, load_settings, predictions
from rankgate.conversion.timing import Timer
from rankgate.core import GroupedLinear
from rankgate.errors import RankgateError
from rankgate.methods.planned import PlannedConfig, Setting


@pytest.fixture(scope="module")
def stats() -> Stats:
    return calibrate(tiny_model("llama"), tokens(16, 32, seed=1), sensitivity=True)


@pytest.fixture(scope="module")
def prepared(stats: Stats) -> Planner:
    """With made-up timings: fewer bits are faster, and every setting is faster than dense."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timer, "_dense", lambda self, outputs, n: 1.0)
        patch.setattr(Timer, "_quantized", made_up)
        return Planner(tiny_model("llama"), stats, {"own": tokens(8, 64, seed=2), "other": tokens(4, 64, seed=3)})


@pytest.fixture
def planner(prepared: Planner) -> Planner:
    return copy.copy(prepared)


def made_up(timer: Timer, m: int, n: int, setting: Setting) -> tuple[float, float]:
    share = setting.bits / 32 + setting.rank / 1000 + setting.refine / 8
    return share, timer._group(m, n, setting, 0)[1]


@pytest.mark.parametrize("text", ["ppl=1.01", "top1=0.98", "bits=5"])
def test_budget_is_read_as_it_is_written(text: str) -> None:
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "ppl", "ppl=", "ppl=1", "ppl=0.9", "ppl=nan", "top1=1", "bits=3", "speed=2", "ppl=x"]
)
def test_budget_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(RankgateError, match="budget"):
        Budget.parse(text)


def test_choice_is_optimal_up_to_one_group(planner: Planner) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {
        name: [Option(None, 0.0, 1.0, 4.0)]
        + [Option(s, *torch.rand(3, generator=generator).tolist()) for s in SETTINGS[:3]]
        for name in "abcd"
    }
    planner.options = options
    for limit in (0.0, 0.2, 0.5, 1.0, 2.0):
        chosen = planner._choose(lambda o: o.kl, lambda o: o.seconds, limit)
        assert sum(o.kl for o in chosen.values()) <= limit
        every = itertools.product(*options.values())
        best = min(
            sum(o.seconds for o in combination) for combination in every if sum(o.kl for o in combination) <= limit
        )
        assert sum(o.seconds for o in chosen.values()) <= best + 1.0


def test_bits_budget_holds_in_stored_bytes_and_as_measured(planner: Planner) -> None:
    plan = planner.plan(Budget("bits", 9.0))
    read = sum(option.bytes for option in plan.chosen.values())
    weights = sum(option.bytes for option in plan.dense.values()) / 4
    assert 8 * read / weights <= 9.0
    assert max(found.bits for found in plan.measured.values()) <= 9.0
    assert plan.predicted["bits"] == pytest.approx(8 * read / weights)


@pytest.mark.parametrize("budget", [Budget("ppl", 1.05), Budget("top1", 0.7)])
def test_quality_budget_holds_at_its_upper_bound(planner: Planner, budget: Budget) -> None:
    plan = planner.plan(budget)
    assert plan.measured.keys() == planner.windows.keys()
    assert max(found.excess(budget) for found in plan.measured.values()) <= 1
    assert any(option.setting for option in plan.chosen.values())


def test_more_loss_allowed_is_never_slower(planner: Planner) -> None:
    def seconds(level: float) -> float:
        chosen = planner._choose(lambda o: o.kl, lambda o: o.seconds, level)
        return sum(option.seconds for option in chosen.values())

    times = [seconds(level) for level in (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 10.0)]
    assert times == sorted(times, reverse=True)


def test_what_is_slower_stays_dense_and_says_so(stats: Stats, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Timer, "_dense", lambda self, outputs, n: 1e-9)
    monkeypatch.setattr(Timer, "_quantized", lambda self, m, n, setting: (1.0, 1.0))
    plan = Planner(tiny_model("llama"), stats, {"own": tokens(4, 32, seed=2)}).plan(Budget("ppl", 1.5))
    assert all(option.setting is None for option in plan.chosen.values())
    plan.save(tmp_path / "plan.json")
    groups = json.loads((tmp_path / "plan.json").read_text())["groups"]
    assert all("faster" in group["reason"] for group in groups.values())


def test_impossible_budget_is_refused(planner: Planner) -> None:
    planner.options = {"a": [Option(Setting(8), 1.0, 1.0, 100.0)]}
    with pytest.raises(RankgateError, match="fits"):
        planner._choose(lambda o: o.bytes, lambda o: o.kl, 1.0)


def test_saved_plan_applies_and_can_be_edited(planner: Planner, stats: Stats, tmp_path: Path) -> None:
    plan = planner.plan(Budget("bits", 9.0))
    plan.save(tmp_path / "plan.json")
    method = load_settings(tmp_path / "plan.json")
    assert method == plan.method()
    model = twin(planner.model)
    convert_(model, method, stats)
    for kind, text in planner.windows.items():
        loss, _ = predictions(model, text)
        ratio = (loss - planner.reference[kind][0]).mean().exp().item()
        assert ratio == pytest.approx(plan.measured[kind].ppl_ratio, rel=1e-5)
    edited = json.loads((tmp_path / "plan.json").read_text())
    first = next(iter(edited["groups"]))
    edited["groups"][first]["setting"] = None
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    model = twin(planner.model)
    reports = {r.name: r for r in convert_(model, load_settings(tmp_path / "plan.json"), stats)}
    assert "dense" in reports[first].reason
    assert not isinstance(model.get_submodule(first), GroupedLinear)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"groups": {"a": 3}}',
        '{"groups": {"a": {"setting": {"bits": 5}}}}',
        '{"groups": {"a": {"setting": {"width": 4}}}}',
    ],
)
def test_damaged_plan_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(RankgateError):
        load_settings(tmp_path / "plan.json")


def test_plan_of_another_model_is_refused(stats: Stats) -> None:
    with pytest.raises(RankgateError, match="plan names nowhere"):
        convert_(tiny_model("llama"), PlannedConfig({"nowhere": Setting(4)}), stats)


def test_statistics_without_sensitivity_are_refused() -> None:
    model = tiny_model("llama")
    plain = calibrate(model, tokens(4, 32))
    with pytest.raises(RankgateError, match="sensitivit"):
        Planner(model, plain, {"own": tokens(2, 32)})


def test_predicted_losses_fall_with_rank_bits_and_refinement(planner: Planner, stats: Stats) -> None:
    for name, group in planner.groups.items():
        reference = planner.built[name, planning.REFERENCE]
        losses = planning.predicted_losses(planner._layers(name), group, reference, [*SETTINGS, Setting(4, 16, 0.9)])
        by_rank = [losses[s] for s in SETTINGS if s.bits == 4 and not s.refine and s.rank != 16]
        assert by_rank == sorted(by_rank, reverse=True)
        assert losses[Setting(4, 16, 0.9)] < losses[Setting(4, 16)]
        assert losses[Setting(8)] < losses[Setting(4)]


def test_excess_is_one_at_the_bound() -> None:
    measured = Measured(ppl_ratio=1.0, top1=0.99, loss_error=0.01 / 1.645, top1_error=0.01 / 1.645, bits=5.0, scored=10)
    assert measured.excess(Budget("ppl", 1.0100502)) == pytest.approx(1, rel=1e-3)
    assert measured.excess(Budget("top1", 0.98)) == pytest.approx(1)
    assert measured.excess(Budget("bits", 5)) == 1


def test_timer_measures_and_accounts() -> None:
    timer = Timer(torch.float32)
    seconds, read = timer.quantized(128, 64, Setting(4, 16, 0.5))
    assert seconds > 0
    base, factors, plane = 128 * (32 + 2), 16 * (128 + 64) + 4 * 16, 64 * 64 + 2 * (128 + 64 + 64)
    assert read == base + factors + plane - 0.5 * 64 * 64
    assert timer.dense((128,), 64) > 0
