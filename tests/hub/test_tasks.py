"""lm-evaluation-harness on our models, against our own perplexity on the same tokens."""

import json
import math
import sys

import pytest
import torch
from conftest import calibrated, tiny_model

from rankgate.cli import parser as cli
from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_
from rankgate.conversion.evaluation import evaluate
from rankgate.errors import RankgateError
from rankgate.hub.opening import Opened
from rankgate.hub.tasks import run_tasks
from rankgate.methods import GSIConfig, Int4Config

DOCUMENTS = (
    "Bees dance to tell where flowers are.",
    "A lighthouse needs a keeper, or a clock and a lamp.",
    "Snow fell.",
)
TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "local.yaml").write_text(TASK.format(data=data))
    return str(tmp_path)


@pytest.mark.parametrize("begins", [False, True], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("method", [None, Int4Config(), GSIConfig(rank=0.5, eps=0.3)], ids=str)
def test_the_harness_finds_our_perplexity(method, begins, folder, tokenizer, prefixing):
    dense = tiny_model("llama")
    model = twin(dense)
    if method is not None:
        convert_(model, method, calibrated(dense))
    (score,) = run_tasks(Opened("tiny", model, prefixing if begins else tokenizer), ["local"], folder=folder)
    loss = 0.0
    for text in DOCUMENTS:
        window = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        found = evaluate(dense, model, window)
        loss += found.loss * found.scored
    expected = math.exp(loss / sum(len(text.encode()) for text in DOCUMENTS))
    assert (score.task, score.metric) == ("local", "byte_perplexity")
    assert score.value == pytest.approx(expected, rel=1e-4)


def test_command(folder, model_dir, capsys):
    words = ["evaluate", str(model_dir), "--tasks", "local", "--tasks-path", folder, "--limit", "2", "--json"]
    values = []
    for more in ([], ["--method", "svd", "--rank", "0.25"]):
        assert cli.main([*words, *more]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        (score,) = record["tasks"]
        values.append(score["value"])
    assert record["method"]["name"] == "svd" and values[0] != values[1]


def test_bad_input(folder, model_dir, refuses, monkeypatch):
    words = ["evaluate", model_dir, "--tasks"]
    assert "no task 'nowhere'" in refuses(*words, "nowhere", "--tasks-path", folder)
    assert "no folder of tasks at /nowhere" in refuses(*words, "local", "--tasks-path", "/nowhere")
    assert "leave out --attention" in refuses(*words, "local", "--attention", "windowed")
    assert "belong to --tasks" in refuses("evaluate", model_dir, "--limit", "3")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'rankgate[eval]'" in refuses(*words, "local")


def test_figures_that_are_no_numbers_are_refused(folder, tokenizer):
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RankgateError, match="byte_perplexity is nan"):
        run_tasks(Opened("tiny", model, tokenizer), ["local"], folder=folder)
