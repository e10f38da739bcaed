"""The report of `rankgate analyze`."""

from __future__ import annotations

from collections.abc import Mapping

from rankgate.reporting.analyze import ActivationProfile, WeightSpectrum
from rankgate.reporting.page import Report
from rankgate.reporting.spectra import TOLERANCES, plots, profiles_table, spectra_summary, spectra_table
from rankgate.reporting.tokens import SelectionView


def analysis_report(
    facts: Mapping[str, str],
    spectra: list[WeightSpectrum],
    profiles: list[ActivationProfile],
    selection: SelectionView | None = None,
) -> Report:
    """The report of `rankgate analyze`."""
    tokens = [] if selection is None else [("Tokens that stand for others", selection.note, *selection.table)]
    note = "Rank that keeps the given share of Σσ², and compression m n / (rank (m + n)): below 1, factors are larger."
    return Report(
        "Rankgate: how low-rank is this model?",
        facts,
        [
            ("Weights, median layer of each kind", note, *spectra_summary(spectra)),
            ("Inputs", "Effective rank of the second moment; median residual of a token.", *profiles_table(profiles)),
            *tokens,
            ("Weights, every layer", note, *spectra_table(spectra)),
        ],
        plots=[*plots(spectra, profiles, eps=TOLERANCES), *([selection.plot()] if selection else [])],
    )
