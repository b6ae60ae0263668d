# SPDX-License-Identifier: Apache-2.0
"""What a detector says of whole data sets: the raw material of a report and of its figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detector.artifact import OOD_SPLIT, without_overlap
from detector.backbone import Precision
from detector.calibration import p_values
from detector.data import UNLABELLED, Dataset, Labels
from detector.detector import Detector
from detector.errors import DataError
from detector.features import Collected, Report, collect, silent
from detector.metrics import Flags, Scores
from detector.outputs import BATCH

TIMED = 3  # runs, of which the fastest counts


@dataclass(frozen=True)
class OodSet:
    """A named OOD data set; group `near`, `far`, or `other` (in no mean)."""

    dataset: Dataset
    group: str = "other"


@dataclass(frozen=True)
class Scored:
    """What a detector says of one data set.

    Args:
        scores, p_values: float64 [N] by score.
        accepted: bool [N], under the artifact's policy.
        predicted, labels: int64 [N]; label UNLABELLED where there is none.
        group: `near`, `far` or `other`, of an OOD set.
        left_out: images of an OOD set that the fit was given, which are not among the N.
    """

    scores: Mapping[str, Scores]
    p_values: Mapping[str, Scores]
    accepted: Flags
    predicted: Labels
    labels: Labels
    group: str = "other"
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def labelled(self) -> Flags:
        labelled: Flags = self.labels != UNLABELLED
        return labelled

    def accuracy(self, among: Flags) -> float | None:
        """Share of right answers among the labelled images of a selection bool [N]; None where there are none."""
        chosen = among & self.labelled
        return float(np.mean(self.predicted[chosen] == self.labels[chosen])) if chosen.any() else None


@dataclass(frozen=True)
class Measured:
    """All that a report is made of.

    Args:
        score_name: the score that decides.
        precision: what the network ran in.
        known: in-distribution test images.
        ood, shifted: other data sets by name.
        seconds: what `seconds_per_image` gives.
    """

    score_name: str
    precision: Precision
    known: Scored
    ood: Mapping[str, Scored]
    shifted: Mapping[str, Scored]
    seconds: Mapping[str, Any]


def measure(
    detector: Detector,
    id_test: Dataset,
    ood: Mapping[str, OodSet] | None = None,
    *,
    shifted: Mapping[str, Dataset] | None = None,
    backward: bool = False,
    report: Report = silent,
) -> Measured:
    """Scores, p-values and decisions of every image; arguments and errors as for `evaluation.evaluate`."""
    ood, shifted = ood or {}, shifted or {}
    sets = {"in-distribution test": id_test} | {name: part.dataset for name, part in ood.items()} | dict(shifted)
    for name, dataset in sets.items():
        if not len(dataset):
            raise DataError(f"the {name} set has no images; leave it out or give another path")
    deciding = {detector.manifest.policy.score_name, *detector.decider.shadows}
    names = [name for name, score in detector.fitted.items() if backward or not score.backward or name in deciding]
    run = _Runner(detector, names, report)
    return Measured(
        score_name=detector.manifest.policy.score_name,
        precision=detector.backbone.precision,
        known=run.new(id_test, "in-distribution test"),
        ood={name: run.ood(part, name) for name, part in ood.items()},
        shifted={name: run.new(dataset, name) for name, dataset in shifted.items()},
        seconds=seconds_per_image(detector, id_test, names),
    )


def failures(score: str, known: Scored, ood: Scored | None = None) -> tuple[Scores, Flags]:
    """What classify-or-defer is judged on: scores float64 [N], and bool [N] whether accepting the image is a mistake.

    In-distribution images that are labelled, a mistake where the answer is wrong; images of an OOD set, always one.
    """
    chosen = known.labelled
    values, wrong = known.scores[score][chosen], known.predicted[chosen] != known.labels[chosen]
    if ood is None:
        return values, wrong
    return np.concatenate([values, ood.scores[score]]), np.concatenate([wrong, np.ones(len(ood), dtype=bool)])


def seconds_per_image(detector: Detector, dataset: Dataset, names: Sequence[str]) -> dict[str, Any]:
    """Time of reading, of the network and of each named score on one batch: the fastest of a few runs."""
    size = min(BATCH, len(dataset))
    started = time.perf_counter()
    images = torch.from_numpy(np.stack([dataset.read(index) for index in range(size)]))
    read = time.perf_counter() - started
    runs: dict[str, list[float]] = {"": [], **{name: [] for name in names}}
    for _ in range(TIMED):
        started = time.perf_counter()
        outputs = detector.backbone.outputs(images)
        outputs.logits.cpu()  # an accelerator is waited for
        runs[""].append(time.perf_counter() - started)
        for name in names:
            started = time.perf_counter()
            detector.scores(outputs, [name])
            runs[name].append(time.perf_counter() - started)
    network, *scores = (min(times) / size for times in runs.values())
    return {"batch": size, "read": read / size, "network": network, "scores": dict(zip(names, scores, strict=True))}


class _Runner:
    """Runs data sets through a detector and the named scores."""

    def __init__(self, detector: Detector, names: Sequence[str], report: Report) -> None:
        self.detector, self.names, self.report = detector, names, report

    def ood(self, part: OodSet, name: str) -> Scored:
        """What the detector says of an OOD set, less the images that the fit was given."""
        collected = self._collect(part.dataset)
        given = self.detector.splits.get(OOD_SPLIT, torch.zeros(0, dtype=torch.int64))
        seen = torch.isin(collected.ids, given)
        if seen.all():
            raise DataError(f"the OOD prototype was made of all images of the {name} set; give images new to the fit")
        scored = self._scored(collected[(~seen).nonzero().flatten()], part.group)
        return replace(scored, left_out=int(seen.sum()))

    def new(self, dataset: Dataset, name: str) -> Scored:
        """What it says of in-distribution images, less those that are in a split of the model."""
        collected = self._collect(dataset)
        kept, _ = without_overlap(collected.ids, self.detector.splits, name)
        return self._scored(collected[kept], "other")

    def _collect(self, dataset: Dataset) -> Collected:
        detector = self.detector
        return collect(detector.backbone, dataset, scores=detector.fitted, names=self.names, report=self.report)

    def _scored(self, collected: Collected, group: str) -> Scored:
        detector, logits = self.detector, collected.outputs.logits
        values = {name: value.cpu().numpy() for name, value in collected.values.items()}
        predicted = logits.argmax(1).cpu().numpy()
        return Scored(
            scores=values,
            p_values={name: _p_values(detector, name, predicted, scores) for name, scores in values.items()},
            accepted=np.array([verdict.decision == "accept" for verdict in detector.decider.decide(logits, values)]),
            predicted=predicted,
            labels=collected.labels,
            group=group,
        )


def _p_values(detector: Detector, name: str, predicted: NDArray[np.int64], scores: Scores) -> Scores:
    """Conformal p-values, each in the group of the predicted class."""
    group = np.asarray(detector.calibration.grouping.of_class)[predicted]
    result = np.ones(len(scores))
    for index, calibration in enumerate(detector.calibration.scores[name]):
        result[group == index] = p_values(calibration, scores[group == index])
    return result
