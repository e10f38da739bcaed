"""How fast models answer at batch 1, side by side.

Every subject lives in a process of its own, so that thread pools, compilers and memory peaks do not mix; the subjects
are measured in turn, round after round, so that a slow minute of the machine hits all of them. Reported are medians
with the 10 % and 90 % quantiles over rounds, and the ratio to dense. Dense is `generate()` of transformers, in float32
or bfloat16, whichever is faster.

    decode     tokens per second between the first and the last new token
    first      seconds from the prompt to the first new token
    prefill    prompt tokens per second of one long prompt
    bytes      weight bytes that one token reads (see `reads`), and their share of what a plain copy moves per second
    peak       largest resident memory of the process, loading included
    warm-up    the first round, which compiles kernels (unless they are on disk) and captures the decode step
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rankgate.common.progress import track
from rankgate.conversion.gates import record_gates
from rankgate.conversion.groups import linears
from rankgate.conversion.reads import weight_reads
from rankgate.decoding.exact import Exact
from rankgate.decoding.loop import decode, fast_generate
from rankgate.errors import RankgateError
from rankgate.hub import texts
from rankgate.hub.opening import open_any, open_pair
from rankgate.quantized import GROUP

LONG_PROMPT = 512
COPY_BYTES = 1 << 28
TORCHAO = ("int8", "int4")


@dataclass(frozen=True)
class Subject:
    """What to measure: a dense model or a converted directory, and how it is run.

    loop: "generate" (transformers), "decode" (ours) or "exact" (a converted directory drafts, its dense model decides).
    torchao: weight-only "int8" or "int4", None for neither; compiled: with a static cache and torch.compile.
    against: the dense model of an exact pair, None for the recorded one.
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

    def __init__(self, subject: Subject, prompt_tokens: int, new_tokens: int) -> None:
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
        limit = opened.positions or LONG_PROMPT + new_tokens
        if prompt_tokens + new_tokens > limit:
            raise RankgateError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the {limit} positions of {subject.model}"
            )
        length = min(LONG_PROMPT, limit)
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
            with record_gates(self.model) as gates, torch.inference_mode():
                self.model(input_ids=self.long, use_cache=False, logits_to_keep=1)
            reads = weight_reads(self.model, gates)
            bytes_per_token = reads.converted + reads.other
        facts = {"bytes_per_token": bytes_per_token, "peak_memory_bytes": peak_memory(), "warm_up_s": self.warm_up_s}
        return facts if self.exact is None else {**facts, "exact": self.exact.statistics.record()}

    def _generate(self, ids: torch.Tensor, count: int, clock: Clock) -> None:
        length = {"max_new_tokens": count, "min_new_tokens": count}
        self.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **length, **self.options)


def quantize_torchao(model: PreTrainedModel, kind: str) -> None:
    """Torchao's weight-only quantisation on the CPU, output embedding included: "int8", or "int4" in groups of 64."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # the one with a CPU kernel
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8" else PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    chosen = {*linears(model).values(), model.get_output_embeddings()}
    quantize_(model, config, filter_fn=lambda module, name: module in chosen)


def _serve(pipe: Connection, subject: Subject, prompt_tokens: int, new_tokens: int) -> None:
    """The loop of a subject's process: answer each request with a result, or with the error that prevents one."""
    from rankgate.common.terminal import quiet_libraries

    try:
        quiet_libraries()
        runner = Runner(subject, prompt_tokens, new_tokens)
        pipe.send(None)
        while (request := pipe.recv()) is not None:
            pipe.send(getattr(runner, request)())
    except Exception as error:  # whatever a library under test may raise is this subject's result
        reason = (
            str(error) if isinstance(error, RankgateError) else traceback.format_exc(limit=-1).strip().splitlines()[-1]
        )
        pipe.send(RankgateError(" ".join(reason.split())[:300]))


class Worker:
    """A subject's process, seen from outside."""

    def __init__(self, subject: Subject, prompt_tokens: int, new_tokens: int) -> None:
        self.subject = subject
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, subject, prompt_tokens, new_tokens), daemon=True)
        self.process.start()
        child.close()
        self._answer()

    def ask(self, request: str) -> dict[str, Any]:
        self.pipe.send(request)
        answer: dict[str, Any] = self._answer()
        return answer

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RankgateError(f"{self.subject.name} ended without an answer, out of memory perhaps") from None
        if isinstance(answer, RankgateError):
            raise answer
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended already
            self.pipe.send(None)
        self.process.join(timeout=10)
        self.process.terminate()
        self.process.join()


def peak_memory() -> int:
    """Bytes of the largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `getrusage` would count the parent's memory before the process was this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy_ceiling(repeats: int = 5) -> float:
    """Bytes per second that a plain copy of 256 MiB moves, reading and writing counted, on all threads."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / min(seconds)


def subjects_for(models: Sequence[str], against: str, *, torchao: bool, exact: bool = False) -> list[Subject]:
    """Dense in float32 and bfloat16, torchao if wanted, each of `models` through both loops and, if wanted, exact."""
    subjects = [Subject(against, "generate", dtype) for dtype in ("float32", "bfloat16")]
    if torchao:
        subjects += [
            Subject(against, "generate", "bfloat16", kind, compiled) for kind in TORCHAO for compiled in (False, True)
        ]
    subjects += [Subject(model, loop) for model in models for loop in ("generate", "decode")]
    return subjects + [Subject(model, "exact", against=against) for model in models if exact]


def bench(
    subjects: Sequence[Subject],
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    rounds: int = 5,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure `subjects` in turn; returns plain JSON values, one row per subject under "rows".

    A subject of torchao that cannot run is a row with an "error"; any other raises RankgateError.
    """
    if prompt_tokens > LONG_PROMPT or new_tokens < 3:
        raise RankgateError(f"the bench takes prompts of at most {LONG_PROMPT} tokens and at least 3 new ones")
    workers: list[Worker] = []
    rows: dict[str, dict[str, Any]] = {}
    try:
        for subject in track(subjects, "loading and warming up", enabled=progress):
            rows[subject.name] = {
                "name": subject.name,
                "model": subject.model,
                "loop": subject.loop,
                "dense": subject.is_dense,
            }
            try:
                workers.append(Worker(subject, prompt_tokens, new_tokens))
            except RankgateError as error:
                if subject.torchao is None:
                    raise
                rows[subject.name]["error"] = str(error)
        ceiling = copy_ceiling()
        samples: dict[str, list[dict[str, float]]] = {worker.subject.name: [] for worker in workers}
        for _ in track(range(rounds), "measuring", enabled=progress):
            for worker in workers:
                samples[worker.subject.name].append(worker.ask("round"))
        for worker in workers:
            rows[worker.subject.name] |= _summary(samples[worker.subject.name]) | worker.ask("facts")
    finally:
        for worker in workers:
            worker.close()
    _compare(list(rows.values()), ceiling)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "copy_bytes_per_s": ceiling,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchao": importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") else None,
        "rows": list(rows.values()),
    }


def _summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for key in samples[0]:
        values = sorted(sample[key] for sample in samples)
        figures[key] = statistics.median(values)
        figures[f"{key}_quantiles"] = [values[round(q * (len(values) - 1))] for q in (0.1, 0.9)]
    return figures


def _compare(rows: list[dict[str, Any]], ceiling: float) -> None:
    """Add the ratios to the faster dense row, and the achieved bandwidth."""
    dense = [row for row in rows if row["dense"] and "error" not in row]
    best = max(dense, key=lambda row: row["decode_tok_s"]) if dense else None
    for row in rows:
        if "error" in row:
            continue
        if best is not None:
            row["decode_speedup"] = row["decode_tok_s"] / best["decode_tok_s"]
            row["prefill_speedup"] = row["prefill_tok_s"] / max(other["prefill_tok_s"] for other in dense)
        if row["bytes_per_token"] is not None:
            row["bytes_per_s"] = row["bytes_per_token"] * row["decode_tok_s"]
            row["ceiling_share"] = row["bytes_per_s"] / ceiling


HEADERS = (
    "model",
    "decode tok/s",
    "10-90 %",
    "x dense",
    "first token ms",
    "prefill tok/s",
    "MB/token",
    "GB/s",
    "of copy",
    "peak MB",
    "warm-up s",
)


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report as rows of text under HEADERS."""
    lines = []
    for row in report["rows"]:
        if "error" in row:
            lines.append((row["name"], "failed", row["error"][:60], *[""] * (len(HEADERS) - 3)))
            continue
        low, high = row["decode_tok_s_quantiles"]
        reads = row["bytes_per_token"]
        lines.append(
            (
                row["name"],
                f"{row['decode_tok_s']:.1f}",
                f"{low:.1f}-{high:.1f}",
                f"{row.get('decode_speedup', float('nan')):.2f}",
                f"{1000 * row['first_token_s']:.0f}",
                f"{row['prefill_tok_s']:.0f}",
                "-" if reads is None else f"{reads / 1e6:.0f}",
                "-" if reads is None else f"{row['bytes_per_s'] / 1e9:.1f}",
                "-" if reads is None else f"{row['ceiling_share']:.0%}",
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
                f"{row['warm_up_s']:.1f}",
            )
        )
    return lines
