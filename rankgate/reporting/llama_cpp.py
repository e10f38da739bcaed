"""llama.cpp on a GGUF file, measured as our own models are: the same tokens, in turn, by llama-cpp-python.

It is not a dependency: the package compiles llama.cpp when it is installed, for the machine that it is on.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.conversion.evaluation import compare, log_probabilities
from rankgate.errors import RankgateError
from rankgate.hub import texts
from rankgate.hub.opening import open_dense
from rankgate.reporting.runner import Subject, peak_memory, quality_windows


class LlamaCpp:
    """One file, loaded and warm, in this process; its tokens are those of the dense model `subject.against`."""

    def __init__(self, subject: Subject, prompt_tokens: int, new_tokens: int, long_prompt: int) -> None:
        assert subject.against is not None
        self.subject, self.new_tokens = subject, new_tokens
        self.dense = open_dense(subject.against)
        self.length = min(long_prompt, self.dense.positions or long_prompt)
        self.long = self.dense.windows(texts.HELD_OUT, self.length, self.length)[0].tolist()
        before = peak_memory()
        self.llama = self._load(max(self.length, prompt_tokens + new_tokens))
        self.prompt = self.long[:prompt_tokens]
        start = time.perf_counter()
        self.round()
        self.warm_up_s = time.perf_counter() - start
        self.memory = peak_memory() - before  # of the dense model only the tokens were needed

    def round(self) -> dict[str, float]:
        """Measure once."""
        llama = self.llama
        llama.reset()
        times = [time.perf_counter()]
        llama.eval(self.prompt)
        for _ in range(self.new_tokens):
            token = int(self._logits().argmax())
            times.append(time.perf_counter())
            llama.eval([token])
        start, first, *_, last = times
        figures = {"first_token_s": first - start, "decode_tok_s": (self.new_tokens - 1) / (last - first)}
        llama.reset()
        start = time.perf_counter()
        llama.eval(self.long)
        return {**figures, "prefill_tok_s": len(self.long) / (time.perf_counter() - start)}

    def facts(self) -> dict[str, Any]:
        """What does not change from round to round; what a token reads of the file, it does not say."""
        return {"bytes_per_token": None, "peak_memory_bytes": self.memory, "warm_up_s": self.warm_up_s}

    def quality(self) -> dict[str, float]:
        """How far predictions are from the dense model's."""
        windows = quality_windows(self.dense, self.length)
        llama = self._load(windows.shape[1], logits_all=True)
        parts = []
        with torch.inference_mode():
            for window in windows:
                reference = log_probabilities(self.dense.model, window[None], "dense")[0]
                parts.append(compare(reference, self._log_probabilities(llama, window), window))
        kl, same = (torch.cat([getattr(part, name) for part in parts]).double() for name in ("kl", "same"))
        return {"kl": float(kl.mean()), "top1": float(same.mean())}

    def _load(self, context: int, **options: Any) -> Any:
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise RankgateError("llama.cpp is not there; pip install llama-cpp-python, which compiles it") from error
        threads = torch.get_num_threads()
        options |= {"n_ctx": context, "n_batch": context, "n_ubatch": context, "flash_attn": True, "verbose": False}
        try:
            llama = Llama(self.subject.model, n_threads=threads, n_threads_batch=threads, **options)
        except (ValueError, RuntimeError) as error:
            raise RankgateError(f"llama.cpp cannot open {self.subject.model}: {error}") from error
        words = self.dense.model.config.get_text_config().vocab_size
        if llama.n_vocab() != words:
            raise RankgateError(
                f"{self.subject.model} has {llama.n_vocab()} tokens, {self.dense.name} has {words}; "
                "give a file of the same model"
            )
        return llama

    def _logits(self) -> np.ndarray:
        """After the last token that was read."""
        import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.llama.n_vocab(),))

    @staticmethod
    def _log_probabilities(llama: Any, window: Tensor) -> Tensor:
        llama.reset()
        llama.eval(window.tolist())
        return F.log_softmax(torch.from_numpy(llama.scores[: len(window)]), dim=-1)
