# SPDX-License-Identifier: Apache-2.0
"""How well scores separate in-distribution from OOD images, under both conventions of "FPR at 95 %"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from detector.artifact import without_overlap
from detector.calibration import clopper_pearson
from detector.data import Dataset
from detector.detector import Detector
from detector.features import Report, collect, silent

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class OodSet:
    """A named OOD data set; group `near`, `far`, or `other` (in no mean)."""

    dataset: Dataset
    group: str = "other"


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Probability that an OOD image scores above an in-distribution one, ties counting half."""
    ranks = stats.rankdata(np.concatenate([id_scores, ood_scores]))
    n_id, n_ood = len(id_scores), len(ood_scores)
    return float((ranks[n_id:].sum() - n_ood * (n_ood + 1) / 2) / (n_id * n_ood))


def ood_miss_rate_at_id95(id_scores: Scores, ood_scores: Scores) -> float:
    """Share of OOD images accepted where 95 % of in-distribution images are: the FPR95 of most papers."""
    cut = np.quantile(id_scores, 0.95, method="inverted_cdf")
    return float(np.mean(ood_scores <= cut))


def id_flag_rate_at_ood95(id_scores: Scores, ood_scores: Scores) -> float:
    """Share of in-distribution images flagged where 95 % of OOD images are: the FPR@95 of OpenOOD."""
    cut = np.quantile(-ood_scores, 0.95, method="inverted_cdf")
    return float(np.mean(-id_scores <= cut))


def measures(id_scores: Scores, ood_scores: Scores) -> dict[str, float]:
    """All three, by name."""
    return {
        "auroc": auroc(id_scores, ood_scores),
        "ood_miss_rate_at_id95": ood_miss_rate_at_id95(id_scores, ood_scores),
        "id_flag_rate_at_ood95": id_flag_rate_at_ood95(id_scores, ood_scores),
    }


def evaluate(
    detector: Detector, id_test: Dataset, ood: Mapping[str, OodSet] | None = None, *, report: Report = silent
) -> dict[str, Any]:
    """Measure a detector on in-distribution test images and named OOD sets.

    Args:
        detector: a loaded model.
        id_test: in-distribution images of no split; labelled where accuracy is wanted.
        ood: OOD sets by name.
        report: told of images done.

    Returns:
        `id` (n, accuracy, acceptance, acceptance_interval), `decisions` (deferral rate by OOD set) and `scores`:
        for each score `ood` (measures by set), `near` and `far` (unweighted means). Rates and AUROC in 0-1.

    Raises:
        SplitOverlap: more than 1 % of the test images are in a split of the model; fewer are left out.
    """
    everything = collect(detector.backbone, id_test, report=report)
    kept, _ = without_overlap(everything.ids, detector.splits, "in-distribution test")
    known = everything[kept]
    id_scores = detector.scores(known.outputs)
    accepted = sum(verdict.decision == "accept" for verdict in detector.judge(known.outputs))
    accuracy = known.accuracy()
    result: dict[str, Any] = {
        "id": {
            "n": len(kept),
            "accuracy": None if np.isnan(accuracy) else accuracy,
            "acceptance": accepted / len(kept),
            "acceptance_interval": list(clopper_pearson(accepted, len(kept))),
        },
        "decisions": {},
        "scores": {name: {"ood": {}} for name in id_scores},
    }
    groups: dict[str, list[str]] = {"near": [], "far": []}
    for name, ood_set in (ood or {}).items():
        outputs = collect(detector.backbone, ood_set.dataset, report=report).outputs
        deferred = sum(verdict.decision == "defer" for verdict in detector.judge(outputs))
        result["decisions"][name] = {"n": len(outputs), "deferral": deferred / len(outputs), "group": ood_set.group}
        groups.setdefault(ood_set.group, []).append(name)
        for score, values in detector.scores(outputs).items():
            result["scores"][score]["ood"][name] = measures(id_scores[score], values)
    for score in result["scores"].values():
        for group in ("near", "far"):
            score[group] = _mean([score["ood"][name] for name in groups[group]])
    return result


def table(result: Mapping[str, Any], score: str) -> str:
    """The evaluation of the deciding score as a Markdown table."""
    known = result["id"]
    low, high = known["acceptance_interval"]
    accuracy = "" if known["accuracy"] is None else f", accuracy {known['accuracy']:.2%}"
    lines = [
        f"In-distribution test images: {known['n']:,}{accuracy}, accepted {known['acceptance']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}).",
        "",
        f"| OOD set | images | deferred | AUROC of `{score}` | OOD missed at ID 95 % | ID flagged at OOD 95 % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["scores"][score]["ood"].items():
        decision = result["decisions"][name]
        lines.append(_row(f"{name} ({decision['group']})", f"{decision['n']:,}", f"{decision['deferral']:.1%}", row))
    for group in ("near", "far"):
        if result["scores"][score][group]:
            lines.append(_row(f"mean {group}", "", "", result["scores"][score][group]))
    return "\n".join(lines)


def _row(name: str, n: str, deferral: str, row: Mapping[str, float]) -> str:
    return (
        f"| {name} | {n} | {deferral} | {row['auroc']:.2%} | {row['ood_miss_rate_at_id95']:.1%} | "
        f"{row['id_flag_rate_at_ood95']:.1%} |"
    )


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} if rows else {}
