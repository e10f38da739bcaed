"""The bench's side of llama.cpp, with a model of ours in its place: it is not installed where tests run."""

import ctypes
import sys
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rankgate import RankgateError
from rankgate.reporting.llama_cpp import LlamaCpp
from rankgate.reporting.runner import Subject


@pytest.fixture
def installed(monkeypatch, model_dir):
    """Llama of llama-cpp-python, as far as it is used, over the model in `model_dir`; .noise: of its logits."""
    module = types.ModuleType("llama_cpp")

    class Llama:
        noise, words = 0.0, None

        def __init__(self, path, *, n_ctx, logits_all=False, **_):
            if "broken" in path:
                raise ValueError("not a GGUF file")
            self.model = AutoModelForCausalLM.from_pretrained(model_dir)
            self.scores = np.zeros((n_ctx, self.n_vocab()), np.float32)
            self.ctx = self
            self.reset()

        def n_vocab(self):
            return self.words or self.model.config.vocab_size

        def reset(self):
            self.tokens = []

        def eval(self, tokens):
            self.tokens += tokens
            with torch.no_grad():
                logits = self.model(torch.tensor([self.tokens])).logits[0].numpy()
            self.scores[: len(logits)] = logits + self.noise * np.random.default_rng(0).standard_normal(logits.shape)
            self.last = np.ascontiguousarray(logits[-1])

    def last_logits(context, index):
        assert index == -1
        return context.last.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    module.Llama, module.llama_get_logits_ith = Llama, last_logits
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return Llama


def opened(model_dir, name="model.gguf"):
    return LlamaCpp(Subject(name, "llama.cpp", against=str(model_dir)), 8, 4, 64)


def test_it_reads_and_answers_the_same_tokens_as_ours(installed, model_dir):
    subject = opened(model_dir)
    figures = subject.round()
    assert all(value > 0 for value in figures.values())
    assert len(subject.llama.tokens) == subject.length  # the long prompt, last
    assert subject.facts()["bytes_per_token"] is None
    quality = subject.quality()
    assert quality["kl"] < 1e-6 and quality["top1"] == 1


def test_quality_is_measured(installed, model_dir):
    installed.noise = 1.0
    quality = opened(model_dir).quality()
    assert quality["kl"] > 0.1 and quality["top1"] < 1


def test_what_cannot_be_compared_is_said(installed, model_dir, monkeypatch):
    with pytest.raises(RankgateError, match=r"cannot open broken\.gguf"):
        opened(model_dir, "broken.gguf")
    installed.words = 7
    with pytest.raises(RankgateError, match="give a file of the same model"):
        opened(model_dir)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(RankgateError, match="pip install llama-cpp-python"):
        opened(model_dir)
