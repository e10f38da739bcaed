"""Tasks of lm-evaluation-harness (extra `eval`) on a dense or a converted model.

The model is handed over as it is, so that in a program of one's own this is enough:

    lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=["lambada_openai"])

`run_tasks` differs in one thing: to a text whose perplexity is taken the harness adds a first token itself; where the
tokenizer adds one, too, it would stand there twice, and be scored.
"""

from __future__ import annotations

import io
import logging
import math
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankgate.errors import RankgateError
from rankgate.hub.opening import Opened
from rankgate.hub.remote import offline_if_unreachable

HEADERS = ("task", "metric", "value", "stderr")
RESAMPLES = 1000  # for standard errors that have no formula


@dataclass(frozen=True)
class Score:
    """One figure of a task; `stderr` is None where the harness gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None

    @property
    def row(self) -> tuple[str, ...]:
        return self.task, self.metric, f"{self.value:.4f}", "-" if self.stderr is None else f"{self.stderr:.4f}"


def run_tasks(opened: Opened, names: list[str], *, folder: str | None = None, limit: int | None = None) -> list[Score]:
    """Figures of the tasks `names`, which the harness or `folder` (its YAML files) describes.

    limit: documents of each task. Raises RankgateError if the harness is not installed, does not know a task, or cannot
    get its data, or if a figure is not finite.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RankgateError("tasks need the extra: pip install 'rankgate[eval]'") from error
    if folder is not None and not Path(folder).is_dir():
        raise RankgateError(f"no folder of tasks at {folder}")
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise RankgateError(f"no task {unknown[0]!r}; `lm-eval ls tasks` lists the harness's, --tasks-path adds yours")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant

    class BegunOnce(HFLM):  # type: ignore[misc]
        add_bos_token: bool | None

        def loglikelihood_rolling(self, *requests: Any, **options: Any) -> Any:
            given, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(*requests, **options)
            finally:
                self.add_bos_token = given

    lm = BegunOnce(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=1)
    try:
        with offline_if_unreachable(), redirect_stderr(io.StringIO()):  # a progress bar for every window
            found: Any = simple_evaluate(
                model=lm,
                tasks=list(names),
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=RESAMPLES,
            )
    except Exception as error:  # of its data sources, each in its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RankgateError(f"cannot run {', '.join(names)}: {reason}") from error
    return [score for task, figures in found["results"].items() for score in scores(task, figures)]


def scores(task: str, figures: dict[str, Any]) -> list[Score]:
    """Of the harness's `"metric,filter": value` and `"metric_stderr,filter": value`."""
    out = []
    for key, value in figures.items():
        metric, _, which = key.partition(",")
        if not which or metric.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise RankgateError(f"{task}: {metric} is {value}; the model's outputs are not usable")
        spread = figures.get(f"{metric}_stderr,{which}")
        known = isinstance(spread, float) and math.isfinite(spread)
        out.append(Score(task, metric if which == "none" else f"{metric} ({which})", value, spread if known else None))
    return out
