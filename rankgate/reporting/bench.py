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
    KL, top-1  beside files of llama.cpp: nats from the dense model on held-out text, and predictions like its own
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from rankgate.common.progress import track
from rankgate.errors import RankgateError
from rankgate.reporting.llama_cpp import LlamaCpp
from rankgate.reporting.runner import LONG_PROMPT, Runner, Subject

COPY_BYTES = 1 << 28
TORCHAO = ("int8", "int4")


def _serve(pipe: Connection, subject: Subject, *lengths: int) -> None:
    """The loop of a subject's process: answer each request with a result, or with the error that prevents one."""
    from rankgate.common.terminal import quiet_libraries

    try:
        quiet_libraries()
        kind: type[Runner] | type[LlamaCpp] = LlamaCpp if subject.loop == "llama.cpp" else Runner
        runner = kind(subject, *lengths)
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

    def __init__(self, subject: Subject, *lengths: int) -> None:
        self.subject = subject
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, subject, *lengths), daemon=True)
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


def subjects_for(
    models: Sequence[str], against: str, *, torchao: bool, exact: bool = False, gguf: Sequence[str] = ()
) -> list[Subject]:
    """Dense in two dtypes and two loops, torchao if wanted, `models` in both loops and, if wanted, exact, and files."""
    dtypes = "float32", "bfloat16"
    subjects = [Subject(against, "generate", dtype) for dtype in dtypes]
    if torchao:
        subjects += [
            Subject(against, "generate", "bfloat16", kind, compiled) for kind in TORCHAO for compiled in (False, True)
        ]
    subjects += [Subject(against, "decode", dtype) for dtype in dtypes]
    subjects += [Subject(model, loop, against=against) for model in models for loop in ("generate", "decode")]
    subjects += [Subject(model, "exact", against=against) for model in models if exact]
    return subjects + [Subject(file, "llama.cpp", against=against) for file in gguf]


def bench(
    subjects: Sequence[Subject],
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    rounds: int = 5,
    long_prompt: int = LONG_PROMPT,
    quality: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure `subjects` in turn; returns plain JSON values, one row per subject under "rows".

    quality: whether to measure it, too, where there are files of llama.cpp.
    A subject of torchao that cannot run is a row with an "error"; any other raises RankgateError.
    """
    if prompt_tokens > long_prompt or new_tokens < 3:
        raise RankgateError(f"the bench takes prompts of at most {long_prompt} tokens and at least 3 new ones")
    compares = quality and any(subject.loop == "llama.cpp" for subject in subjects)
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
                workers.append(Worker(subject, prompt_tokens, new_tokens, long_prompt))
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
        for worker in sorted(workers, key=_has_quality):
            if compares and _has_quality(worker):
                rows[worker.subject.name] |= worker.ask("quality")
            worker.close()  # quality takes memory, which those before give back
    finally:
        for worker in workers:
            worker.close()
    _compare(list(rows.values()), ceiling)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "long_prompt": long_prompt,
        "copy_bytes_per_s": ceiling,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchao": importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") else None,
        "rows": list(rows.values()),
    }


def _has_quality(worker: Worker) -> bool:
    """Whether there is something to compare it with that it is not itself."""
    return worker.subject.against is not None and worker.subject.loop != "generate"


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
    "KL",
    "top-1",
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
                f"{row['kl']:.4f}" if "kl" in row else "-",
                f"{row['top1']:.3f}" if "top1" in row else "-",
            )
        )
    return lines
