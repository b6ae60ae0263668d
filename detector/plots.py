# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation, drawn with matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detector.measuring import Measured, failures
from detector.metrics import Scores, augrc, auroc, histogram, histogram_edges, risk_coverage, roc

KNOWN = "in-distribution"
BINS = 40
POINTS = 1_000  # on a curve; more cannot be seen
STYLE = {
    "svg.hashsalt": "oodgate",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def write(measured: Measured, directory: Path) -> list[Path]:
    """Draw the deciding score: ROC, scores, p-values, and, where images are labelled, risk over coverage.

    Returns:
        the files written, NAME.svg and NAME.png of each figure.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for name, figure in _figures(measured):
            for suffix, metadata in (("svg", {"Date": None}), ("png", {})):  # no date: the same data, the same file
                written.append(directory / f"{name}.{suffix}")
                figure.savefig(written[-1], dpi=150, metadata=metadata)
    return written


def _figures(measured: Measured) -> Iterator[tuple[str, Figure]]:
    score = measured.score_name
    known, ood = measured.known, measured.ood
    scores = {KNOWN: known.scores[score]} | {name: part.scores[score] for name, part in ood.items()}
    p_values = {KNOWN: known.p_values[score]} | {name: part.p_values[score] for name, part in ood.items()}
    if ood:
        yield "roc", _roc(scores)
    figure, axes = _axes(f"score {score}, the bulk; end bins hold what lies beyond", "share of images")
    _histograms(axes, scores, histogram_edges(list(scores.values()), BINS))
    yield "scores", figure
    figure, axes = _axes(f"p-value of {score}", "share of images")
    _histograms(axes, p_values, np.linspace(0, 1, BINS // 2 + 1))
    yield "p_values", figure
    if known.labelled.any():
        yield "risk_coverage", _risk_coverage(measured)


def _roc(scores: Mapping[str, Scores]) -> Figure:
    figure, axes = _axes("in-distribution images flagged", "OOD images flagged")
    known, *others = scores.values()
    for name, values in zip(list(scores)[1:], others, strict=True):
        flagged, caught = roc(known, values)
        _line(axes, np.append(0, flagged), np.append(0, caught), f"{name}, AUROC {auroc(known, values):.1%}")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes.legend()
    return figure


def _risk_coverage(measured: Measured) -> Figure:
    figure, axes = _axes("coverage: share of images accepted", "selective risk: mistakes among the accepted")
    for name, part in {KNOWN: None, **measured.ood}.items():
        scores, wrong = failures(measured.score_name, measured.known, part)
        coverage, joint = risk_coverage(scores, wrong)
        mixed = name if part is None else f"with {name}"
        _line(axes, coverage, joint / coverage, f"{mixed}, AUGRC {augrc(scores, wrong):.2%}")
    axes.legend()
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    # Figure rather than pyplot: nothing global is kept, and no display is looked for.
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _histograms(axes: Axes, parts: Mapping[str, Scores], edges: Scores) -> None:
    for name, values in parts.items():
        axes.stairs(histogram(values, edges) / len(values), edges, label=name, fill=name == KNOWN, alpha=0.8)
    axes.legend()


def _line(axes: Axes, x: Scores, y: Scores, label: str) -> None:
    chosen = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(int))
    axes.plot(x[chosen], y[chosen], label=label)
