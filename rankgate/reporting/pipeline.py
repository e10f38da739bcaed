"""The steps that the command line, the demo and the benchmarks share: calibrate, convert, compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from rankgate.attention.attend import AttentionConfig, select_tokens_
from rankgate.attention.heads import check_share, try_heads
from rankgate.common.copies import twin
from rankgate.common.kept import Kept
from rankgate.conversion.calibration import Stats, calibrate, fingerprint
from rankgate.conversion.convert import LayerReport, convert_
from rankgate.conversion.evaluation import Evaluation, TextComparison, compare_text, continuations, evaluate
from rankgate.conversion.processes import leads
from rankgate.conversion.windows import overlap, run_hashes
from rankgate.errors import RankgateError
from rankgate.hub.checkpoint import Provenance
from rankgate.hub.opening import Opened, open_pair
from rankgate.hub.texts import CALIBRATION, HELD_OUT
from rankgate.methods import Method

PROMPT_TOKENS = 32
HEAD_WINDOWS = 2  # of calibration text, on which the heads' windows are chosen


def statistics(
    opened: Opened,
    text: str,
    tokens: int,
    context: int,
    *,
    file: str | None = None,
    sensitivity: bool = False,
    apart_from: Tensor | None = None,
    progress: bool = False,
    processes: ProcessGroup | None = None,
    kept: Kept | None = None,
) -> Stats:
    """Calibration statistics: read from `file` if it exists, otherwise measured on `text` and saved there.

    processes, kept: see `calibrate`; the first one saves.
    Raises RankgateError, before any work, if the text overlaps the windows `apart_from`.
    """
    if file is not None and Path(file).exists():
        stats = Stats.load(file)
        stats.check(opened.model)
        if sensitivity and not stats.has_sensitivity:
            raise RankgateError(f"{file} was calibrated without output sensitivities; delete it or choose another file")
        hashes = stats.hashes
    else:
        windows = opened.windows(text, tokens, context)
        stats, hashes = None, run_hashes(windows)
    if apart_from is not None:
        check_text(apart_from, hashes, allow=False)
    if stats is None:
        stats = calibrate(
            opened.model, windows, sensitivity=sensitivity, progress=progress, processes=processes, kept=kept
        )
        stats.text = str(Path(text).absolute()) if Path(text).is_file() else text
        if file is not None and leads(processes):
            stats.save(file)
    return stats


def attention_config(
    opened: Opened,
    settings: Mapping[str, Any] | None,
    text: str | None,
    windows: Tensor,
    *,
    in_sample: bool = False,
    progress: bool = False,
) -> AttentionConfig | None:
    """The settings of `AttentionConfig`, or `keys`: then each head's are chosen on the dense model and `text`.

    text: by default that of calibration, in windows as long as `windows`, with which it must share nothing.
    Raises RankgateError if they do, unless `in_sample` allows it, or if the settings cannot be.
    """
    if settings is None or "keys" not in settings:
        return None if settings is None else AttentionConfig(**settings)
    context, keys = windows.shape[1], settings["keys"]
    check_share(keys)
    own = opened.windows(text or CALIBRATION, HEAD_WINDOWS * context, context)
    check_text(windows, run_hashes(own), allow=in_sample)
    return AttentionConfig(heads=try_heads(opened.model, own, progress=progress).plan(keys).heads)


def provenance(opened: Opened, stats: Stats | None) -> Provenance:
    """What a checkpoint records of `stats` (None: the method was not calibrated) and the dense model."""
    return Provenance(
        source=opened.name,
        fingerprint=fingerprint(opened.model),
        calibration_text=stats.text if stats else None,
        calibration_tokens=stats.tokens if stats else 0,
        hashes=stats.hashes if stats else torch.empty(0, dtype=torch.int64),
    )


def check_text(windows: Tensor, hashes: Tensor, *, allow: bool) -> bool:
    """Whether `windows` share text with the calibration. Raises RankgateError if they do and may not."""
    shared = overlap(windows, hashes)
    if shared and not allow:
        raise RankgateError("the evaluation text overlaps the calibration text; use other text, or --in-sample")
    return shared


@dataclass(frozen=True)
class Conversion:
    """How the model of a row came about, and whether the row's text was calibrated on."""

    method: Method
    layers: list[LayerReport]
    calibration_tokens: int
    in_sample: bool


@dataclass(frozen=True)
class Attended:
    """How the candidate attended, and the share of the keys that it read on the text."""

    config: AttentionConfig
    keys_read: float

    def record(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.config)
        return {**settings, "keys_read": self.keys_read}


@dataclass(frozen=True)
class Result:
    """One row of a table: a conversion (None: the dense model itself) on a text."""

    conversion: Conversion | None
    evaluation: Evaluation
    text: TextComparison | None
    attention: Attended | None = None

    def record(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        done, e, reads = self.conversion, self.evaluation, self.evaluation.reads
        return {
            "method": done.method.record() if done else {"name": "dense"},
            "in_sample": done is not None and done.in_sample,
            "calibration_tokens": done.calibration_tokens if done else 0,
            "layers": len(done.layers) if done else 0,
            "layers_converted": sum(not layer.reason for layer in done.layers) if done else 0,
            "tokens": e.tokens,
            "scored": e.scored,
            "context": e.context,
            "ppl_dense": e.ppl_dense,
            "ppl": e.ppl,
            "ppl_ratio": e.ppl_ratio,
            "top1": e.top1,
            "kl_mean": e.kl_mean,
            "kl_max": e.kl_max,
            "fire_rate": e.fire_rate,
            "lm_head": reads.head_converted,
            "read_speedup": reads.speedup,
            "model_read_speedup": reads.model_speedup,
            "bits_per_weight": reads.bits_per_weight,
            "bytes_per_token": reads.converted + reads.other,
            "identical_text": self.text.identical if self.text else None,
            "first_difference": self.text.first_difference if self.text else None,
            "fire_rates": e.fire_rates,
            "attention": self.attention.record() if self.attention else None,
        }


@dataclass(frozen=True)
class Reference:
    """The dense side of a comparison: the text to compare on, and the dense continuations of its first prompts."""

    opened: Opened
    windows: Tensor
    continued: list[str]

    @classmethod
    def of(cls, opened: Opened, windows: Tensor, prompts: int) -> Reference:
        """Continue the beginnings of the first `prompts` windows (0: compare no text)."""
        beginnings = windows[:prompts, :PROMPT_TOKENS]
        continued = continuations(opened.model, opened.tokenizer, beginnings) if prompts else []
        return cls(opened, windows, continued)

    def compare(
        self,
        model: PreTrainedModel,
        conversion: Conversion | None = None,
        *,
        attention: AttentionConfig | None = None,
        progress: bool = False,
    ) -> Result:
        """Evaluate `model`, attending by `attention`, against the dense one, and continue the same prompts with it."""
        with select_tokens_(model, attention) if attention else nullcontext() as selection:
            evaluation = evaluate(self.opened.model, model, self.windows, progress=progress)
            attended = Attended(attention, selection.share) if attention and selection else None
            if not self.continued:
                return Result(conversion, evaluation, None, attended)
            beginnings = self.windows[: len(self.continued), :PROMPT_TOKENS]
            prompts = self.opened.tokenizer.batch_decode(beginnings, skip_special_tokens=True)
            converted = continuations(model, self.opened.tokenizer, beginnings)
        return Result(conversion, evaluation, compare_text(prompts, self.continued, converted), attended)

    def measure(
        self,
        method: Method,
        stats: Stats | None,
        *,
        lm_head: bool = False,
        attention: AttentionConfig | None = None,
        in_sample: bool = False,
        progress: bool = False,
    ) -> Result:
        """Convert a twin of the dense model with `method` and compare the two. `lm_head`: see `convert_`.

        Raises RankgateError if the text was calibrated on, unless `in_sample` allows it.
        """
        used = stats if method.needs_stats else None
        overlaps = used is not None and check_text(self.windows, used.hashes, allow=in_sample)
        model = twin(self.opened.model)
        layers = convert_(model, method, stats, lm_head=lm_head, progress=progress)
        done = Conversion(method, layers, used.tokens if used else 0, overlaps)
        return self.compare(model, done, attention=attention, progress=progress)


def measure_checkpoint(
    directory: str,
    text: str | None,
    tokens: int,
    context: int,
    *,
    dense: str | None = None,
    prompts: int = 8,
    attention: Mapping[str, Any] | None = None,
    in_sample: bool = False,
    device: str | None = "cpu",
    progress: bool = False,
) -> Result:
    """Compare a converted model on disk with `dense`, by default the model that it was converted from.

    `text` defaults to the held-out part of the default text, in-sample to what the model was calibrated on.
    Raises RankgateError if the dense model is not the one that was converted, or is neither given nor recorded.
    """
    opened, converted = open_pair(directory, device, dense=dense)
    origin = converted.provenance
    calibrated_on = origin.calibration_text if origin else None
    windows = opened.windows(text or (calibrated_on if in_sample else None) or HELD_OUT, tokens, context)
    overlaps = origin is not None and check_text(windows, origin.hashes, allow=in_sample)
    done = Conversion(converted.method, converted.layers, origin.calibration_tokens if origin else 0, overlaps)
    chosen = attention_config(opened, attention, calibrated_on, windows, in_sample=in_sample, progress=progress)
    reference = Reference.of(opened, windows, prompts)
    return reference.compare(converted.model, done, attention=chosen, progress=progress)
