import pytest
from conftest import calibrated, tiny_model, tokens

from rankgate.common.copies import twin
from rankgate.conversion.convert import LayerReport, convert_
from rankgate.conversion.evaluation import evaluate
from rankgate.methods import ASVDConfig, GSIConfig, LRQConfig, SparseConfig
from rankgate.reporting.pipeline import Conversion, Result
from rankgate.reporting.tables import HEADERS, describe, layer_rows, markdown, row, verdict


@pytest.fixture(scope="module")
def records():
    dense = tiny_model("llama")
    stats = calibrated(dense)
    made = []
    for method, in_sample in ((GSIConfig(rank=8, eps=0.0), False), (ASVDConfig(rank=0.25), True)):
        model = twin(dense)
        layers = convert_(model, method, stats)
        result = Result(
            Conversion(method, layers, stats.tokens, in_sample), evaluate(dense, model, tokens(2, 16)), None
        )
        made.append(result.record())
    return made


def test_rows_say_what_was_measured(records):
    gsi, asvd = (dict(zip(HEADERS, row(record), strict=True)) for record in records)
    assert gsi["method"] == "gsi k=8 eps=0" and gsi["text"] == "held-out" and gsi["fire rate"] == "100.0%"
    assert float(gsi["reads / dense"]) > 1 and gsi["ppl ratio"] == "1.0000" and gsi["same text"] == "-"
    assert asvd["method"] == "asvd k=0.25·min(m,n)" and asvd["text"] == "in-sample" and asvd["fire rate"] == "-"
    assert asvd["layers"] == "14 of 15"


def test_the_verdict_counts_only_held_out_rows_within_the_loss(records):
    gsi, asvd = records
    assert verdict(records).startswith("Fewest reads within 1% of the dense perplexity: gsi")
    assert verdict([gsi]).endswith("which saves nothing.")
    assert verdict([{**asvd, "in_sample": False, "ppl_ratio": 1.009}, gsi]).endswith("x dense.")
    assert verdict([asvd]) == "No setting stays within 1% of the dense perplexity."


def test_markdown_and_settings():
    assert markdown(("a", "b"), [("1", "2")]).splitlines() == ["| a | b |", "| :-- | --: |", "| 1 | 2 |"]
    assert describe({"name": "svd", "energy": 0.9, "allow_larger": True}) == "svd energy=0.9 all layers"
    assert describe(LRQConfig(bits=8, rank=24, symmetric=False).record()) == "lrq 8 bits asymmetric r=24 refine=0.05"
    assert describe(SparseConfig(keep=0.4).record()) == "sparse keep=0.4" and describe({"name": "int8"}) == "int8"
    assert (
        describe({"name": "gsi", "rank": 0.25, "eps": 0.2, "basis": "context"}) == "gsi k=0.25·n eps=0.2 context basis"
    )


def test_experts_of_a_stack_have_one_row():
    def expert(number, **more):
        return LayerReport(f"mlp.experts.{number}.down_proj", "", 8, 4, **more)

    experts = [expert(0, rank=2, kept=0.5), expert(1, rank=3, kept=1.0), expert(2, reason="too large")]
    others = [LayerReport("layers.3.down_proj", "", 6, 5, 2, 0.25), LayerReport("head", "", 9, 5, reason="dense")]
    assert layer_rows([*others, *experts, expert(3)], {"mlp.experts"}) == [
        ("layers.3.down_proj", "6 x 5", "2", "0.2500", ""),
        ("head", "9 x 5", "-", "-", "dense"),
        ("mlp.experts.*.down_proj", "4 of 8 x 4", "2-3", "0.7500, least 0.5000", "1: too large"),
    ]
    assert layer_rows([expert(e, reason="as asked") for e in range(2)], {"mlp.experts"})[0][2:] == (
        "-",
        "-",
        "as asked",
    )
