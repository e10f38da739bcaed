"""Exact mode writes what the dense model writes, whatever the draft is, and knows when drafting does not pay."""

import json
import shutil

import pytest
import torch
from conftest import LLAMA, calibrated, tiny_model, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from rankgate.cli import parser as cli
from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_, converted_layers, share_
from rankgate.decoding import exact, steps
from rankgate.decoding.exact import Costs, Exact, Statistics, best_length, describe, exact_generate
from rankgate.decoding.readers import Ordinary
from rankgate.errors import RankgateError
from rankgate.hub import checkpoint
from rankgate.hub.opening import open_pair
from rankgate.methods import GSIConfig, Int8Config, SVDConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*without the fast path")
ATTENTIVE = ("gpt2", "gptj", "llama", "opt", "qwen2")
CHEAP = Costs(0.1)
DRAFTS = {
    "dense": None,
    "int8": Int8Config(),
    "svd": SVDConfig(rank=8, allow_larger=True),
    "context": GSIConfig(rank=0.25, eps=0.5, basis="context", allow_larger=True),
}


def pair(architecture, name, **options):
    model = tiny_model(architecture)
    draft = twin(model)
    if DRAFTS[name] is not None:
        convert_(draft, DRAFTS[name], calibrated(model) if DRAFTS[name].needs_stats else None, **options)
    return model, draft


def greedy(ids, new=24, **options):
    length = {"max_new_tokens": new, "min_new_tokens": 0 if "eos_token_id" in options else new}
    return {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1, **length, **options}


@pytest.fixture(params=["as it is", "padded"])
def padded(request, monkeypatch):
    """Verification as on a GPU, too: captured, over more tokens than there are."""
    if request.param == "padded":
        monkeypatch.setattr(exact, "PADDED", {"cpu"})


@pytest.mark.parametrize("name", ["dense", "int8", "svd"])
@pytest.mark.parametrize("architecture", ATTENTIVE)
def test_greedy_text_is_the_dense_one(architecture, name, padded):
    model, draft = pair(architecture, name)
    for length in (7, 1):
        ids = tokens(1, length, seed=length)
        expected = model.generate(ids, **greedy(ids))
        for costs in (CHEAP, None):
            got, seen = exact_generate(model, draft, ids, costs=costs, **greedy(ids))
            assert torch.equal(got, expected)
            assert seen.new_tokens == 24 and seen.drafted >= seen.checked >= seen.accepted and seen.runs > 0
            assert seen.dense_passes + seen.accepted == 24
            if name == "dense":
                assert seen.acceptance == 1
        assert name != "dense" or model.generate(ids, custom_generate=Exact(draft, CHEAP), **greedy(ids)).equal(
            expected
        )


@pytest.mark.parametrize("name", ["svd", "context"])
def test_refused_drafts_leave_no_trace(name, padded, monkeypatch):
    """Drafts of the wrong kind are refused now and then, in the middle of runs, also when the cache grows there."""
    monkeypatch.setattr(steps, "CAPACITY", 8)
    model, draft = pair("gpt2", name)
    ids = tokens(1, 7, seed=7)
    got, seen = exact_generate(model, draft, ids, costs=Costs(0.01), **greedy(ids, 40))
    assert torch.equal(got, model.generate(ids, **greedy(ids, 40)))
    assert 0 < seen.accepted < seen.checked < seen.drafted


@pytest.mark.parametrize("name", ["int8", "svd"])
@pytest.mark.parametrize("architecture", ATTENTIVE)
def test_transformers_own_assisted_generation(architecture, name):
    model, draft = pair(architecture, name, lm_head=True)
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    ids = tokens(1, 7)
    expected = model.generate(ids, **greedy(ids))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(model.generate(ids, assistant_model=draft, **greedy(ids)), expected)
    assert name == "svd" or len(passes) < 12


def test_the_end_of_the_text_inside_a_run():
    model, draft = pair("llama", "dense")
    ids = tokens(1, 7)
    free = model.generate(ids, **greedy(ids))
    end = int(free[0, 7 + 8])  # the ninth new token: one is plain, four and one follow, this one is in the second run
    assert end not in free[0, 7 : 7 + 8]
    expected = model.generate(ids, **greedy(ids, eos_token_id=end))
    got, seen = exact_generate(model, draft, ids, costs=CHEAP, **greedy(ids, eos_token_id=end))
    assert torch.equal(got, expected) and got.shape[1] == 7 + 9
    assert seen.new_tokens == 9 and seen.drafted > seen.checked == seen.accepted

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 11)

    stop = StoppingCriteriaList([AtLength()])
    got, _ = exact_generate(model, draft, ids, costs=CHEAP, stopping_criteria=stop, **greedy(ids))
    assert torch.equal(got, free[:, :11])


@pytest.mark.parametrize("name", ["dense", "svd"])
def test_the_room_ends_inside_a_run(name):
    model, draft = pair("llama", name)
    ids = tokens(1, 5)
    free = model.generate(ids, **greedy(ids, 12))
    for new in range(1, 12):
        got, seen = exact_generate(model, draft, ids, costs=CHEAP, **greedy(ids, new))
        assert torch.equal(got, free[:, : 5 + new]) and seen.new_tokens == new
        assert seen.drafted < new or name == "svd"


class Recorder(BaseStreamer):
    def __init__(self):
        self.received = []

    def put(self, value):
        self.received.append(value.flatten().tolist())

    def end(self):
        self.received.append("end")


def test_streamers_hear_what_generate_tells_them():
    model, draft = pair("llama", "int8")
    ids = tokens(1, 5)
    plain, ours = Recorder(), Recorder()
    model.generate(ids, streamer=plain, **greedy(ids))
    exact_generate(model, draft, ids, costs=CHEAP, streamer=ours, **greedy(ids))
    assert ours.received == plain.received


SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 3, "top_p": 0.95}
WARPERS = LogitsProcessorList([TemperatureLogitsWarper(1.3), TopKLogitsWarper(3), TopPLogitsWarper(0.95)])
VOCAB, SEEDS = 5, 300
CHI_SQUARE = 58.6  # exceeded once in ten thousand with 24 degrees of freedom


def tiny_vocabulary():
    torch.manual_seed(1)
    config = {
        **LLAMA,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    draft = twin(model)
    convert_(draft, SVDConfig(rank=3, allow_larger=True))
    return model, draft


def chi_square(model, draft, ids):
    """How far the second and third tokens (25 pairs) of many texts are from what the dense model gives them."""
    with torch.no_grad():
        texts, weights = ids, torch.ones(1)
        for _ in range(3):
            p = WARPERS(texts, model(input_ids=texts).logits[:, -1]).softmax(-1)
            weights = (weights[:, None] * p).flatten()
            tails = torch.arange(VOCAB).repeat(len(texts))[:, None]
            texts = torch.cat([texts.repeat_interleave(VOCAB, 0), tails], dim=1)
    likely = weights.double().view(VOCAB, VOCAB, VOCAB).sum(0)
    counts, loop = torch.zeros(VOCAB, VOCAB, dtype=torch.float64), Exact(draft, CHEAP)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0}
        out = model.generate(ids, custom_generate=loop, **options, **SAMPLING)[0]
        counts[out[ids.shape[1] + 1], out[ids.shape[1] + 2]] += 1
    assert loop.statistics.drafted > 0
    if counts[likely == 0].any():
        return float("inf")
    expected = likely[likely > 0] * SEEDS
    return float(((counts[likely > 0] - expected) ** 2 / expected).sum())


def test_sampling_has_the_distribution_of_the_dense_model(monkeypatch):
    model, draft = tiny_vocabulary()
    ids = torch.tensor([[1, 3, 2]])
    assert chi_square(model, draft, ids) < CHI_SQUARE
    monkeypatch.setattr(exact._Choice, "accepts", lambda *_: True)  # and with drafts that nobody refuses it has not
    assert chi_square(model, draft, ids) > 2 * CHI_SQUARE


@pytest.mark.parametrize("p, q", [([0.7, 0.2, 0.1, 0.0], [0.1, 0.1, 0.4, 0.4]), ([0.25] * 4, [0.25] * 4)])
def test_a_token_drawn_from_the_draft_becomes_one_of_the_dense_model(p, q):
    """Of one drafted token, on 5,000 draws: within four standard errors of p for every token."""
    torch.manual_seed(0)
    p, q = torch.tensor([p]), torch.tensor([q])
    choice, ids = exact._Choice(LogitsProcessorList(), sample=True), torch.zeros(1, 1, dtype=torch.long)
    counts = torch.zeros(4)
    for _ in range(5_000):
        ahead = torch.cat([ids, choice.draw(q)], dim=1)
        token, _ = next(exact._verified(choice, ids, ahead, [q], p.log().repeat(2, 1)))
        counts[token] += 1
    assert ((counts / 5_000 - p[0]).abs() <= 4 * (p[0] * (1 - p[0]) / 5_000).sqrt()).all()


def test_the_same_seed_draws_the_same_text_with_given_costs():
    model, draft = pair("llama", "svd")
    ids = tokens(1, 5)
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(exact_generate(model, draft, ids, costs=CHEAP, **greedy(ids) | SAMPLING)[0])
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_the_length_of_runs():
    assert best_length(0.9, Costs(1.0)) == 0  # a draft as slow as the dense model
    assert best_length(0.0, CHEAP) == best_length(0.3, Costs(0.1, several=1.5)) == 0
    assert best_length(1.0, Costs(0.01)) == exact.LONGEST
    lengths = [best_length(a, CHEAP) for a in (0.2, 0.5, 0.7, 0.9, 0.97)]
    assert lengths == sorted(lengths) and len(set(lengths)) == 5 and lengths[0] > 0
    a, n = 0.8, best_length(0.8, CHEAP)

    def rate(n):
        return (1 - a ** (n + 1)) / (1 - a) / (0.1 * (n + a**n) + 1)

    assert rate(n) > max(rate(n - 1), rate(n + 1), 1)


def test_drafting_pauses_where_it_does_not_pay():
    model, draft = pair("llama", "svd")
    ids = tokens(1, 7)
    got, seen = exact_generate(model, draft, ids, costs=Costs(0.9), **greedy(ids, 40))
    assert torch.equal(got, model.generate(ids, **greedy(ids, 40)))
    assert seen.pauses == 1 and seen.runs == exact.TRIALS and "paused 1 time because" in describe(seen.record())
    assert not exact_generate(model, twin(model), ids, costs=CHEAP, **greedy(ids, 40))[1].pauses
    assert describe(Statistics(new_tokens=3, dense_passes=3).record()) == "nothing drafted, 3 dense passes for 3 tokens"


@pytest.mark.parametrize(("accepted", "goes_on"), [((4, 3, 3), True), ((2, 2, 2), False)])
def test_drafting_is_not_left_for_a_few_refusals(accepted, goes_on):
    """By the mean of what is expected after ten of twelve drafting does not pay; but that may have been bad luck."""
    costs, reader = Costs(0.25, 2.4), Ordinary(tiny_model("llama"), {})
    pace = exact.Pace(reader, reader, costs, Statistics())
    for count in accepted:
        assert pace.next() == exact.FIRST
        pace.note(exact.FIRST, count, refused=count < exact.FIRST)
    assert best_length(10 / 12, costs) > 0 and best_length(11 / 14, costs) == 0
    assert (pace.next() > 0) == goes_on


@pytest.mark.parametrize("ordinary", ["none", "draft", "dense"])
@pytest.mark.parametrize("architecture", ATTENTIVE)
def test_after_a_pause_the_draft_reads_what_it_missed(architecture, ordinary, padded, monkeypatch):
    """A draft that is the dense model, but costs as much, is tried again and again, and always right."""
    monkeypatch.setattr(exact, "PAUSE", 5)
    model, draft = pair(architecture, "dense")
    if ordinary != "none":  # what has a hook is not captured
        (draft if ordinary == "draft" else model).register_forward_hook(lambda *_: None)
    ids = tokens(1, 7)
    got, seen = exact_generate(model, draft, ids, costs=Costs(1.0), **greedy(ids, 50))
    assert torch.equal(got, model.generate(ids, **greedy(ids, 50)))
    assert seen.pauses == 2 and seen.runs >= 2 * exact.TRIALS and seen.acceptance == 1


def storages(model):
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


@pytest.fixture
def converted(model_dir, tmp_path, capsys):
    assert cli.main(["convert", str(model_dir), "-o", str(tmp_path / "int8"), "--method", "int8"]) == 0
    capsys.readouterr()
    return tmp_path / "int8"


def test_a_pair_shares_what_was_not_converted(converted):
    dense, draft = open_pair(str(converted))
    ours, theirs = dict(draft.model.named_parameters()), dict(dense.model.named_parameters())
    same = ours.keys() & theirs.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= same
    assert all(ours[name] is theirs[name] for name in same)
    own = storages(draft.model) - storages(dense.model)
    layers = [t.data_ptr() for _, layer in converted_layers(draft.model) for t in layer.parameters()]
    assert own and own <= set(layers)
    alone = checkpoint.load(converted)
    assert not storages(alone.model) & storages(dense.model)


def test_only_equal_tensors_are_shared():
    model = tiny_model("gpt2")
    other = tiny_model("gpt2")
    with torch.no_grad():
        other.transformer.ln_f.weight.add_(1)
    changed = other.transformer.ln_f.weight
    share_(other, model)
    assert other.transformer.ln_f.weight is changed
    assert other.transformer.wte.weight is model.transformer.wte.weight is other.lm_head.weight


def test_pairs_that_do_not_match_are_refused(converted, model_dir, tmp_path, tokenizer):
    with pytest.raises(RankgateError, match="not a converted model"):
        open_pair(str(model_dir))
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(RankgateError, match="not the model that"):
        open_pair(str(converted), dense=str(tmp_path / "other"))


def test_what_exact_mode_does_not_have():
    model, draft = pair("llama", "int8")
    ids = tokens(1, 5)
    two = tokens(2, 5)
    padded = greedy(ids) | {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    cases = {
        "more than one sequence": (two, greedy(two)),
        "beams": (ids, greedy(ids, num_beams=2)),
        "padding": (ids, padded),
        "a dictionary": (ids, greedy(ids, return_dict_in_generate=True)),
        "a cache other": (ids, greedy(ids, cache_implementation="static")),
    }
    for message, (prompt, options) in cases.items():
        with pytest.raises(RankgateError, match=message):
            model.generate(prompt, custom_generate=Exact(draft), **options)
    with pytest.raises(RankgateError, match="not a conversion of this dense model"):
        exact_generate(model, tiny_model("qwen2"), ids, **greedy(ids))
    with pytest.raises(RankgateError, match="a cache other"):
        exact_generate(tiny_model("mamba"), tiny_model("mamba"), ids, **greedy(ids))
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(RankgateError, match="out of range"):
            Costs(bad)
    with pytest.raises(RankgateError, match="out of range"):
        Costs(0.1, several=0)


@pytest.mark.parametrize("which", ["dense", "draft"])
def test_scores_that_are_not_numbers_are_an_error(which):
    model, draft = pair("llama", "int8")
    broken = {"dense": model, "draft": draft}[which]
    broken.model.norm.weight = torch.nn.Parameter(torch.full_like(broken.model.norm.weight, float("nan")))
    ids = tokens(1, 5)
    with pytest.raises(RankgateError, match="not numbers"):
        exact_generate(model, draft, ids, costs=CHEAP, **greedy(ids))


def test_generate_from_the_command_line(run, refuses, converted, model_dir):
    dense = json.loads(run("generate", model_dir, "The ", "-n", "20", "--json").splitlines()[-1])
    out = run("generate", converted, "The ", "-n", "20", "--exact", "--json")
    record = json.loads(out.splitlines()[-1])
    assert record["text"] == dense["text"]
    assert record["exact"]["acceptance"] > 0.5 and record["exact"]["mean_accepted"] > 0
    streamed = run("generate", converted, "The ", "-n", "20", "--exact", "--dense", model_dir)
    assert streamed.startswith("The ") and "accepted per verification" in streamed.splitlines()[-1]
    assert "is not a converted model" in refuses("generate", model_dir, "x", "--exact")
    assert "--dense belongs to --exact" in refuses("generate", converted, "x", "--dense", model_dir)
    assert "--exact takes converted models" in refuses("bench", model_dir, "--exact")


def test_generate_needs_the_dense_model(run, refuses, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "source")
    run("convert", tmp_path / "source", "-o", tmp_path / "out", "--method", "int8")
    shutil.rmtree(tmp_path / "source")
    assert "no model at" in refuses("generate", tmp_path / "out", "x", "--exact")
    assert run("generate", tmp_path / "out", "x", "-n", "3", "--exact", "--dense", model_dir).startswith("x")


def test_bench_puts_exact_mode_beside_the_others(run, converted):
    out = run("bench", converted, "--exact", "--prompt-tokens", "8", "-n", "16", "--rounds", "2", "--json")
    rows = {row["loop"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    assert rows.keys() == {"generate", "decode", "exact"}
    ours = rows["exact"]
    assert ours["decode_speedup"] > 0 and ours["bytes_per_token"] is None
    assert ours["exact"]["acceptance"] > 0.5 and ours["exact"]["mean_accepted"] > 0 and ours["exact"]["runs"] > 0
    assert f"{converted} exact: acceptance" in out
