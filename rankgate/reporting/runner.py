"""What the bench measures, one subject in one process: models of ours, and what torchao makes of a dense one."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rankgate.conversion.evaluation import evaluate
from rankgate.conversion.gates import record_gates
from rankgate.conversion.groups import linears
from rankgate.conversion.reads import weight_reads
from rankgate.decoding.exact import Exact
from rankgate.decoding.loop import decode, fast_generate
from rankgate.errors import RankgateError
from rankgate.experts import unstacked
from rankgate.hub import texts
from rankgate.hub.opening import Opened, open_any, open_dense, open_pair
from rankgate.quantized import GROUP

LONG_PROMPT = 512
NEVER = -1  # a token that no model gives: a text goes on to its full length
QUALITY_TOKENS = 2048  # of held-out text


@dataclass(frozen=True)
class Subject:
    """What to measure: a dense model or a converted directory, and how it is run.

    loop: "generate" (transformers), "decode" (ours), "exact" (a converted directory drafts, its dense model decides) or
    "llama.cpp" (`model` is a GGUF file).
    torchao: weight-only "int8" or "int4", None for neither; compiled: with a static cache and torch.compile.
    against: the dense model that is drafted for, or compared with; None for the recorded one.
    """

    model: str
    loop: str
    dtype: str | None = None
    torchao: str | None = None
    compiled: bool = False
    against: str | None = None

    @property
    def name(self) -> str:
        words = [self.model, self.dtype or "", f"torchao {self.torchao}" if self.torchao else "", self.loop]
        return " ".join(word for word in [*words, "compiled" if self.compiled else ""] if word)

    @property
    def is_dense(self) -> bool:
        return self.loop == "generate" and self.torchao is None and self.dtype is not None


class Clock:
    """A streamer that notes when each token comes; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Runner:
    """One subject, loaded and warm, in this process."""

    def __init__(self, subject: Subject, prompt_tokens: int, new_tokens: int, long_prompt: int) -> None:
        self.subject, self.new_tokens = subject, new_tokens
        self.exact: Exact | None = None
        if subject.loop == "exact":
            opened, converted = open_pair(subject.model, dense=subject.against)
            self.exact = Exact(converted.model)
        else:
            opened = open_any(subject.model)
        model = opened.model
        if subject.dtype is not None:
            model.to(getattr(torch, subject.dtype))
        if subject.torchao is not None:
            quantize_torchao(model, subject.torchao)
        self.model = model.eval()
        limit = opened.positions or long_prompt + new_tokens
        if prompt_tokens + new_tokens > limit:
            raise RankgateError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the {limit} positions of {subject.model}"
            )
        length = min(long_prompt, limit)
        self.long = opened.windows(texts.HELD_OUT, length, length)
        self.prompt = self.long[:, :prompt_tokens]
        self.options: dict[str, Any] = {"do_sample": False, "pad_token_id": opened.tokenizer.pad_token_id or 0}
        self.generate: Any = model.generate
        if subject.loop != "generate":
            self.generate = partial(fast_generate, model, loop=self.exact or decode)
        if subject.compiled:
            self.options["cache_implementation"] = "static"
            model.forward = torch.compile(model.forward)
        start = time.perf_counter()
        self.round()
        self.warm_up_s = time.perf_counter() - start

    def round(self) -> dict[str, float]:
        """Measure once."""
        clock = Clock()
        start = time.perf_counter()
        self._generate(self.prompt, self.new_tokens, clock)
        _, first, *_, last = clock.times
        figures = {"first_token_s": first - start, "decode_tok_s": (self.new_tokens - 1) / (last - first)}
        with torch.inference_mode():
            start = time.perf_counter()
            self.model(input_ids=self.long, use_cache=False, logits_to_keep=1)
        return {**figures, "prefill_tok_s": self.long.numel() / (time.perf_counter() - start)}

    def facts(self) -> dict[str, Any]:
        """What does not change from round to round, and what the last one's drafts came to in exact mode."""
        bytes_per_token = None
        if self.subject.torchao is None and self.exact is None:
            model = unstacked(self.model)
            with record_gates(model) as gates, torch.inference_mode():
                model(input_ids=self.long, use_cache=False, logits_to_keep=1)
            reads = weight_reads(model, gates)
            bytes_per_token = reads.converted + reads.other
        facts = {"bytes_per_token": bytes_per_token, "peak_memory_bytes": peak_memory(), "warm_up_s": self.warm_up_s}
        return facts if self.exact is None else {**facts, "exact": self.exact.statistics.record()}

    def quality(self) -> dict[str, float]:
        """How far predictions are from the dense model's."""
        assert self.subject.against is not None
        dense = open_dense(self.subject.against)
        result = evaluate(dense.model, self.model, quality_windows(dense, self.long.shape[1]))
        return {"kl": result.kl_mean, "top1": result.top1}

    def _generate(self, ids: torch.Tensor, count: int, clock: Clock) -> None:
        length = {"max_new_tokens": count, "eos_token_id": NEVER}
        self.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **length, **self.options)


def quality_windows(dense: Opened, length: int) -> torch.Tensor:
    """Held-out text in windows as long as the long prompt, but no longer than it is by default: logits take memory."""
    return dense.windows(texts.HELD_OUT, QUALITY_TOKENS, min(length, LONG_PROMPT))


def quantize_torchao(model: PreTrainedModel, kind: str) -> None:
    """Torchao's weight-only quantisation on the CPU, output embedding included: "int8", or "int4" in groups of 64."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # the one with a CPU kernel
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8" else PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    chosen = {*linears(model).values(), model.get_output_embeddings()}
    quantize_(model, config, filter_fn=lambda module, name: module in chosen)


def peak_memory() -> int:
    """Bytes of the largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `getrusage` would count the parent's memory before the process was this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
