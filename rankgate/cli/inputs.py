"""What verbs begin with: the dense model, and its calibration, which processes may share (`conversion.processes`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rankgate.cli.options import calibration_text
from rankgate.common.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

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


def calibrated(
    model: Opened, arguments: argparse.Namespace, apart_from: Tensor | None = None, *, sensitivity: bool = False
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
    )
    part()
    return stats


def calibrated_for(
    method: Method | None, model: Opened, arguments: argparse.Namespace, apart_from: Tensor | None = None
) -> Stats | None:
    """The same for a method, or for a plan of them (None); None if it needs no statistics."""
    from rankgate.conversion.processes import part

    if method is not None and not method.needs_stats:
        part()
        return None
    return calibrated(model, arguments, apart_from, sensitivity=method is None or method.needs_sensitivity)
