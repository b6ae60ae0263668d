# SPDX-License-Identifier: Apache-2.0
"""One report on a detector: how well its scores separate, what it accepts, what mistakes cost, how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.calibration import clopper_pearson
from detector.data import Dataset
from detector.detector import Detector
from detector.features import Report, silent
from detector.measuring import Measured as Measured, OodSet as OodSet, Scored as Scored, failures, measure as measure
from detector.metrics import (
    REPLICATES,
    Scores,
    augrc,
    aurc,
    auroc as auroc,
    auroc_replicates,
    histogram,
    histogram_edges,
    id_flag_rate_at_ood95 as id_flag_rate_at_ood95,
    measures as measures,
    ood_miss_rate_at_id95 as ood_miss_rate_at_id95,
    percentiles,
)
from detector.tables import scores_table as scores_table, summary as summary, table as table

BINS = 20
# Of p-values: fine where thresholds lie, so that what another target would defer can be read off.
P_VALUE_EDGES = np.concatenate([np.linspace(0, 0.1, 21), np.linspace(0.15, 1, 18)]).round(3)
GROUPS = ("near", "far")


def evaluate(
    detector: Detector,
    id_test: Dataset,
    ood: Mapping[str, OodSet] | None = None,
    *,
    shifted: Mapping[str, Dataset] | None = None,
    backward: bool = False,
    replicates: int = REPLICATES,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure a detector on in-distribution test images, named OOD sets, and its own classes under other imaging.

    Args:
        detector: a loaded model.
        id_test: in-distribution images of no split; labelled where accuracy, AURC and AUGRC are wanted.
        ood: OOD sets by name; their labels are not used.
        shifted: images of the same classes under other imaging, by name; never counted as OOD.
        backward: include the scores that run a backward pass.
        replicates: of the bootstrap.
        report: told of images done.

    Returns:
        as `summarise`.

    Raises:
        SplitOverlap: more than 1 % of the test or shifted images are in a split of the model; fewer are left out.
        DataError: a data set has no images, or an OOD set none that is new to the fit.
    """
    measured = measure(detector, id_test, ood, shifted=shifted, backward=backward, report=report)
    return summarise(measured, replicates)


def summarise(measured: Measured, replicates: int = REPLICATES) -> dict[str, Any]:
    """The report, for JSON.

    Returns:
        `id` and, by name, `shifted`: n, accuracy, acceptance, acceptance_interval, accuracy_of_accepted.
        `decisions`: n, left_out (images that the fit was given), deferral and group by OOD set.
        `scores`: for each score `ood` (measures by set), `near` and `far` (unweighted means), `id` (AURC and AUGRC
        without OOD images), and `histogram` and `p_values`: counts of images between `edges`, the end bins holding
        what lies beyond. Intervals are 95 %.
        `seconds_per_image`: batch (images at a time), read, network, and scores by name.
        Rates and areas in 0-1; None where labels are missing.
    """
    known = measured.known
    decisions = {
        name: {
            "n": len(part),
            "left_out": part.left_out,
            "deferral": float(np.mean(~part.accepted)),
            "group": part.group,
        }
        for name, part in measured.ood.items()
    }
    views = [(values, [part.scores[name] for part in measured.ood.values()]) for name, values in known.scores.items()]
    drawn = auroc_replicates(views, replicates)
    return {
        "precision": measured.precision,
        "id": _acceptance(known),
        "decisions": decisions,
        "scores": {name: _score_report(measured, name, sets) for name, sets in zip(known.scores, drawn, strict=True)},
        "shifted": {name: _acceptance(part) for name, part in measured.shifted.items()},
        "seconds_per_image": dict(measured.seconds),
    }


def _acceptance(part: Scored) -> dict[str, Any]:
    accepted, total = int(part.accepted.sum()), len(part)
    return {
        "n": total,
        "accuracy": part.accuracy(np.ones(total, dtype=bool)),
        "acceptance": accepted / total,
        "acceptance_interval": list(clopper_pearson(accepted, total)),
        "accuracy_of_accepted": part.accuracy(part.accepted),
    }


def _score_report(measured: Measured, name: str, drawn: NDArray[np.float64]) -> dict[str, Any]:
    """The report of one score; `drawn` float64 [sets, n] are bootstrap replicates of its AUROC."""
    known, ood = measured.known, measured.ood
    rows = {
        key: measures(known.scores[name], part.scores[name]) | _areas(name, known, part) | _interval(replicates)
        for (key, part), replicates in zip(ood.items(), drawn, strict=True)
    }
    means: dict[str, Any] = {}
    for group in GROUPS:
        members = [index for index, part in enumerate(ood.values()) if part.group == group]
        chosen = [list(rows.values())[index] for index in members]
        means[group] = _mean(chosen) | _interval(drawn[members].mean(axis=0)) if members else {}
    scores = {key: part.scores[name] for key, part in ood.items()}
    p_values = {key: part.p_values[name] for key, part in ood.items()}
    return {
        "ood": rows,
        **means,
        "id": _areas(name, known),
        "histogram": _counts(known.scores[name], scores, histogram_edges([known.scores[name], *scores.values()], BINS)),
        "p_values": _counts(known.p_values[name], p_values, P_VALUE_EDGES),
    }


def _areas(name: str, known: Scored, ood: Scored | None = None) -> dict[str, float | None]:
    """AURC and AUGRC; None without labelled images."""
    if not known.labelled.any():
        return {"aurc": None, "augrc": None}
    values, wrong = failures(name, known, ood)
    return {"aurc": aurc(values, wrong), "augrc": augrc(values, wrong)}


def _counts(known: Scores, ood: Mapping[str, Scores], edges: Scores) -> dict[str, Any]:
    counts = {key: histogram(values, edges).tolist() for key, values in ood.items()}
    return {"edges": edges.tolist(), "id": histogram(known, edges).tolist(), "ood": counts}


def _interval(replicates: Scores) -> dict[str, list[float]]:
    return {"auroc_interval": list(percentiles(replicates))}


def _mean(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Unweighted means of the numbers of several rows."""
    numbers = [key for key in rows[0] if key != "auroc_interval"]
    return {
        key: None if any(row[key] is None for row in rows) else float(np.mean([row[key] for row in rows]))
        for key in numbers
    }
