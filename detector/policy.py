# SPDX-License-Identifier: Apache-2.0
"""p-value -> decision: which score decides, at which target, under which guarantee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from detector.calibration import (
    Guarantee,
    Scores,
    Threshold,
    exact,
    mixed_acceptance_interval,
    p_values,
    sorted_scores,
    threshold,
)
from detector.errors import CalibrationError, TooFewSamples

Decision = Literal["accept", "defer"]
Reason = Literal["none", "ood", "low_confidence"]
DOUBT = "low_confidence"  # the score of the second defer reason


class Policy(BaseModel):
    """What the operator asks for.

    Args:
        target_id_acceptance: share of in-distribution images to accept.
        guarantee: what is promised about it.
        score_name: the score that decides.
        alpha_conf: share of in-distribution images that may be deferred for low confidence, out of the deferral budget
            1 - target; OOD keeps the rest. Like the budget it counts images: at target 0.95 all of it would be 0.05.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_id_acceptance: float = Field(
        default=0.95, gt=0, lt=1, description="Share of in-distribution images to accept; the rest is the budget."
    )
    guarantee: Guarantee = Guarantee()
    score_name: str = Field(default="grood", description="The score that decides.")
    alpha_conf: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of in-distribution images that may be deferred for low confidence. Taken from the budget "
        "1 - target_id_acceptance, so below it: with 0.95 and 0.01, OOD keeps 0.04.",
    )


@dataclass(frozen=True)
class Grouping:
    """Which calibration group judges which predicted class.

    Args:
        of_class: group index of each class.
        names: name of each group.
    """

    of_class: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def single(cls, num_classes: int) -> Grouping:
        """One group for all classes."""
        return cls((0,) * num_classes, ("all",))

    @classmethod
    def by_class(cls, of_class: Sequence[int], class_names: Sequence[str]) -> Grouping:
        """Groups as `calibration.class_groups` numbers them, named by their class, or `other`."""
        members = {
            group: [name for name, g in zip(class_names, of_class, strict=True) if g == group] for group in of_class
        }
        names = [members[group][0] if len(members[group]) == 1 else "other" for group in sorted(members)]
        return cls(tuple(of_class), tuple(names))


@dataclass(frozen=True)
class CalibrationScores:
    """Sorted scores of the calibration images in one precision: for each score (and DOUBT), one array a group."""

    grouping: Grouping
    scores: Mapping[str, Sequence[Scores]]

    @classmethod
    def build(cls, grouping: Grouping, scores: Mapping[str, Scores], predicted: NDArray[np.int64]) -> CalibrationScores:
        """Split scores float64 [n] by the group of the predicted class and sort them."""
        group = np.asarray(grouping.of_class)[predicted]
        split = {
            name: [sorted_scores(values[group == index]) for index in range(len(grouping.names))]
            for name, values in scores.items()
        }
        return cls(grouping, split)


@dataclass(frozen=True)
class Prediction:
    """The untouched network's answer: class index, its name, and its softmax probability."""

    index: int
    label: str
    confidence: float


@dataclass(frozen=True)
class Shadow:
    """What another score says of the same image; it decides nothing."""

    score: float
    p_value: float


@dataclass(frozen=True)
class OodEvidence:
    """Why the image counts as in-distribution or not. Deferred as OOD iff p_value <= p_cutoff iff score > threshold."""

    score_name: str
    score: float
    threshold: float
    p_value: float
    p_cutoff: float
    group: str
    target_id_acceptance: float
    borderline: bool
    shadow: Mapping[str, Shadow]

    @property
    def sound(self) -> bool:
        """Whether the score is a finite number; one that is not says nothing of the image, which is then deferred."""
        return isfinite(self.score)


@dataclass(frozen=True)
class Verdict:
    """The answer for one image."""

    decision: Decision
    reason: Reason
    prediction: Prediction
    ood: OodEvidence


def doubt(logits: Tensor) -> Tensor:
    """Low confidence as a score: -log of the largest softmax probability, float64 [N], larger = less confident."""
    logits = logits.double()
    return torch.logsumexp(logits, dim=1) - logits.amax(dim=1)


class Decider:
    """A policy applied to one calibration.

    Args:
        policy: what is asked for.
        calibration: what was measured.
        class_names: in the order of the network's outputs.
        tolerances: how far scores, and DOUBT, of one image move with its batch-mates. Where such a move could change
            the decision a verdict is marked borderline.
        shadows: other scores to report.

    Raises:
        TooFewSamples: the calibration cannot keep the promise.
        CalibrationError: an unknown score, or no budget left for OOD.
    """

    def __init__(
        self,
        policy: Policy,
        calibration: CalibrationScores,
        class_names: Sequence[str],
        *,
        tolerances: Mapping[str, float] | None = None,
        shadows: Sequence[str] = (),
    ) -> None:
        self.policy, self.calibration, self.class_names = policy, calibration, class_names
        self.tolerances = tolerances or {}
        self.shadows = [name for name in shadows if name != policy.score_name]
        missing = [name for name in (policy.score_name, *self.shadows) if name not in calibration.scores]
        if missing:
            known = ", ".join(name for name in calibration.scores if name != DOUBT)
            raise CalibrationError(f"there is no calibration of {', '.join(missing)}; calibrated scores: {known}")
        alpha, alpha_conf = 1 - exact(policy.target_id_acceptance), exact(policy.alpha_conf)
        if alpha_conf >= alpha:
            raise CalibrationError(
                f"alpha_conf {policy.alpha_conf} leaves nothing of the budget {float(alpha):.4g} for OOD; both "
                "are shares of the in-distribution images, so give less than the budget"
            )
        # Every promise that must hold at once takes an equal share of delta.
        promises = len(calibration.grouping.names) * (2 if alpha_conf else 1)
        guarantee = policy.guarantee.model_copy(update={"delta": policy.guarantee.delta / promises})
        self.thresholds = self._thresholds(policy.score_name, alpha - alpha_conf, guarantee)
        self.doubt_thresholds = self._thresholds(DOUBT, alpha_conf, guarantee) if alpha_conf else None
        self._p_cutoffs = [float(cut.p_cutoff) for cut in self.thresholds]

    def _thresholds(self, name: str, alpha: Fraction, guarantee: Guarantee) -> list[Threshold]:
        cuts = []
        for group, scores in zip(self.calibration.grouping.names, self.calibration.scores[name], strict=True):
            try:
                cuts.append(threshold(scores, alpha, guarantee))
            except TooFewSamples as error:
                raise TooFewSamples(f"group {group!r}: {error}") from None
        return cuts

    def expected_acceptance(self, level: float = 0.95) -> tuple[float, float]:
        """Interval that holds the acceptance of this share of calibrations, all groups and both reasons together.

        Groups count by their calibration images. With a second defer reason it is an outer interval: how often both
        would defer the same image is not known.
        """
        reasons = [cuts for cuts in (self.thresholds, self.doubt_thresholds) if cuts]
        level = 1 - (1 - level) / len(reasons)
        intervals = [mixed_acceptance_interval(tuple(cuts), level) for cuts in reasons]
        together = 1 - sum(1 - low for low, _ in intervals)
        return max(0.0, together), min(high for _, high in intervals)

    def decide(self, logits: Tensor, scores: Mapping[str, Scores]) -> list[Verdict]:
        """Verdicts for a batch. An image whose deciding score is NaN or infinite is deferred; see `OodEvidence.sound`.

        Args:
            logits: [N, C] of the untouched network.
            scores: float64 [N] by name; the deciding score, and all shadows or none.
        """
        probabilities = torch.softmax(logits.double(), dim=1)
        confidence, predicted = (part.tolist() for part in probabilities.max(dim=1))
        doubts = doubt(logits).tolist() if self.doubt_thresholds else [0.0] * len(predicted)
        group_of = [self.calibration.grouping.of_class[label] for label in predicted]
        evidence = self._evidence(group_of, scores, self._torn(logits, group_of, doubts))
        verdicts = []
        for i, (label, group, ood) in enumerate(zip(predicted, group_of, evidence, strict=True)):
            reason = self.reason(group, ood.score, doubts[i])
            prediction = Prediction(label, self.class_names[label], confidence[i])
            verdicts.append(Verdict("accept" if reason == "none" else "defer", reason, prediction, ood))
        return verdicts

    def reason(self, group: int, score: float, doubt: float) -> Reason:
        """Why an image of a calibration group is deferred, by its deciding score and its doubt; `none` if it is not."""
        if not isfinite(score) or score > self.thresholds[group].value:
            return "ood"
        if self.doubt_thresholds and doubt > self.doubt_thresholds[group].value:
            return "low_confidence"
        return "none"

    def _torn(self, logits: Tensor, group_of: Sequence[int], doubts: Sequence[float]) -> list[bool]:
        """Whether rounding could move an image over the confidence threshold or into another calibration group."""
        width, cuts, groups = self.tolerances.get(DOUBT, 0.0), self.doubt_thresholds, self.calibration.grouping
        torn = [cuts is not None and abs(d - cuts[g].value) <= width for g, d in zip(group_of, doubts, strict=True)]
        if len(groups.names) > 1 and logits.shape[1] > 1:
            (first, second), classes = (part.unbind(dim=1) for part in logits.double().topk(2, dim=1))
            close = (first - second <= 2 * width).tolist()  # the doubts of both classes may move
            for i, (one, other) in enumerate(zip(*(part.tolist() for part in classes), strict=True)):
                torn[i] |= close[i] and groups.of_class[one] != groups.of_class[other]
        return torn

    def _evidence(
        self, group_of: Sequence[int], scores: Mapping[str, Scores], torn: Sequence[bool]
    ) -> list[OodEvidence]:
        deciding = self.policy.score_name
        tolerance = self.tolerances.get(deciding, 0.0)
        columns = {
            name: list(zip(scores[name].tolist(), self._p_values(name, group_of, scores[name]), strict=True))
            for name in (deciding, *self.shadows)
            if name in scores
        }
        evidence = []
        for i, (group, (score, p_value)) in enumerate(zip(group_of, columns[deciding], strict=True)):
            cut = self.thresholds[group]
            evidence.append(
                OodEvidence(
                    score_name=deciding,
                    score=score,
                    threshold=cut.value,
                    p_value=p_value,
                    p_cutoff=self._p_cutoffs[group],
                    group=self.calibration.grouping.names[group],
                    target_id_acceptance=self.policy.target_id_acceptance,
                    borderline=torn[i] or abs(score - cut.value) <= tolerance,
                    shadow={name: Shadow(*columns[name][i]) for name in columns if name != deciding},
                )
            )
        return evidence

    def _p_values(self, name: str, group_of: Sequence[int], scores: Scores) -> list[float]:
        """One p-value an image, each among the calibration of its own group; 1 where that has no scores."""
        scores = np.where(np.isfinite(scores), scores, np.inf)  # what is no number is like nothing that was calibrated
        calibration, groups = self.calibration.scores[name], set(group_of)
        values = np.empty(len(scores))
        for group in groups:
            mine = np.asarray(group_of) == group if len(groups) > 1 else slice(None)
            values[mine] = p_values(calibration[group], scores[mine])
        return [float(value) for value in values]
