"""What verbs begin with: the dense model, and its calibration, which processes may share (`conversion.processes`)."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rankgate.cli.options import calibration_text
from rankgate.common.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from rankgate.common.kept import Kept
    from rankgate.conversion.calibration import Stats
    from rankgate.hub.opening import Opened
    from rankgate.methods import Method


def opened(arguments: argparse.Namespace) -> Opened:
    from rankgate.conversion.processes import join, joined, leads
    from rankgate.hub.opening import open_dense

    join(arguments.device)
    if leads(joined()):
        say(f"loading {arguments.model}")
    return open_dense(arguments.model, arguments.device)


@contextmanager
def unfinished(method: Method | None, model: Opened, arguments: argparse.Namespace) -> Iterator[Kept | None]:
    """While open: what an interrupted conversion by `method`, or a plan, has left in OUTPUT.unfinished.

    Nothing is kept without calibration, with statistics from a file, and by processes that share the work.
    """
    import torch

    import rankgate
    from rankgate.common.kept import kept_in
    from rankgate.conversion.calibration import fingerprint
    from rankgate.conversion.processes import joined

    if joined() or arguments.stats is not None or not (method is None or method.needs_stats):
        yield None
        return
    windows = model.windows(calibration_text(arguments), arguments.calibration_tokens, arguments.context)
    facts = {
        "versions": [rankgate.__version__, torch.__version__],
        "model": fingerprint(model.model),
        "device": model.model.device.type,
        "windows": [*windows.shape, hashlib.sha256(windows.numpy().tobytes()).hexdigest()],
        "settings": arguments.budget if method is None else method.record(),
    }
    output = Path(arguments.output).absolute()
    with kept_in(output.with_name(f"{output.name}.unfinished"), json.dumps(facts)) as (kept, parts):
        if parts:
            say(f"going on with {output.name}.unfinished, where {parts} parts are done")
        yield kept


def calibrated(
    model: Opened,
    arguments: argparse.Namespace,
    apart_from: Tensor | None = None,
    *,
    sensitivity: bool = False,
    kept: Kept | None = None,
) -> Stats:
    """Statistics as the options ask for them. Of several processes only the first one returns."""
    from rankgate.conversion.processes import joined, leads, part
    from rankgate.reporting.pipeline import statistics

    text, processes = calibration_text(arguments), joined()
    if leads(processes) and (arguments.stats is None or not Path(arguments.stats).exists()):
        say(f"calibrating on {arguments.calibration_tokens:,} tokens of {text}")
    stats = statistics(
        model,
        text,
        arguments.calibration_tokens,
        arguments.context,
        file=arguments.stats,
        sensitivity=sensitivity,
        apart_from=apart_from,
        progress=leads(processes),
        processes=processes,
        kept=kept,
    )
    part()
    return stats


def calibrated_for(
    method: Method | None,
    model: Opened,
    arguments: argparse.Namespace,
    apart_from: Tensor | None = None,
    kept: Kept | None = None,
) -> Stats | None:
    """The same for a method, or for a plan of them (None); None if it needs no statistics."""
    from rankgate.conversion.processes import part

    if method is not None and not method.needs_stats:
        part()
        return None
    sensitivity = method is None or method.needs_sensitivity
    return calibrated(model, arguments, apart_from, sensitivity=sensitivity, kept=kept)
