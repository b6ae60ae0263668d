# SPDX-License-Identifier: Apache-2.0
"""From calibration scores to thresholds and p-values, with their guarantees.

Scores: larger = more OOD. n calibration images of the in-distribution, disjoint from everything that was fitted.
An image is deferred iff its score exceeds S_(k), the k-th smallest calibration score; k is the whole decision.
Everything that decides compares integers; only reports use floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, isfinite, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import special

from detector.errors import CalibrationError, TooFewSamples

DRAWS = 100_000  # from a fixed seed, for what has no closed form
Scores = NDArray[np.float64]
GuaranteeKind = Literal["pac", "marginal", "simultaneous"]


class Guarantee(BaseModel):
    """What is promised about the share of in-distribution images accepted.

    Args:
        kind: `pac`: at least the target, for all but a share delta of calibrations. `marginal`: the target on average
            over calibrations; half of them miss it. `simultaneous`: at least the target for every target at once, for
            all but a share delta of calibrations; needed where the target is chosen after seeing the calibration.
        delta: share of calibrations that may break a `pac` or `simultaneous` promise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: GuaranteeKind = "pac"
    delta: float = Field(default=0.05, gt=0, lt=0.5)


@dataclass(frozen=True)
class Threshold:
    """One calibrated cut.

    Args:
        value: the k-th smallest calibration score; an image above it is deferred.
        rank: k.
        n: calibration scores.
    """

    value: float
    rank: int
    n: int

    @property
    def p_cutoff(self) -> Fraction:
        """(n + 1 - k) / (n + 1): deferred iff p <= p_cutoff iff score > value."""
        return Fraction(self.n + 1 - self.rank, self.n + 1)


def exact(ratio: float | str | Fraction) -> Fraction:
    """The fraction a person means: 0.95 is 19/20, not the nearest binary number."""
    return ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))


def calibration_rank(n: int, alpha: Fraction, guarantee: Guarantee) -> int:
    """The rank k of the threshold among n sorted calibration scores.

    marginal: ceil((n + 1)(1 - alpha)), the split-conformal rank (Vovk).
    pac: the smallest k with P(Beta(k, n + 1 - k) < 1 - alpha) <= delta (Wilks).
    simultaneous: ceil(n (1 - alpha + sqrt(ln(1 / delta) / 2n))), the one-sided DKW band (Massart).

    Args:
        n: calibration scores.
        alpha: share of in-distribution images that may be deferred, in (0, 1).
        guarantee: what is promised.

    Raises:
        TooFewSamples: no rank up to n keeps the promise; the message says which n does.
    """
    if not 0 < alpha < 1:
        raise CalibrationError(f"the share of images that may be deferred must lie between 0 and 1; got {alpha}")
    rank = _rank(n, alpha, guarantee)
    if rank > n:
        needed = smallest_sample(alpha, guarantee)
        delta = "" if guarantee.kind == "marginal" else f" with delta {guarantee.delta:.3g}"
        raise TooFewSamples(
            f"{n} calibration images cannot promise {guarantee.kind} acceptance of {float(1 - alpha):.4g}{delta}; "
            f"at least {needed} are needed"
        )
    return rank


def smallest_sample(alpha: Fraction, guarantee: Guarantee) -> int:
    """The smallest n for which `calibration_rank` has an answer."""
    high = 1
    while _rank(high, alpha, guarantee) > high:
        high *= 2
    low = high // 2  # too small, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _rank(middle, alpha, guarantee) <= middle else (middle, high)
    return high


def threshold(scores: Scores, alpha: Fraction, guarantee: Guarantee) -> Threshold:
    """The threshold of sorted calibration scores float64 [n]; raises TooFewSamples."""
    rank = calibration_rank(len(scores), alpha, guarantee)
    return Threshold(float(scores[rank - 1]), rank, len(scores))


def sorted_scores(scores: Scores) -> Scores:
    """Calibration scores in order; CalibrationError where one is NaN or infinite."""
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    if not all(map(isfinite, ordered[[0, -1]] if len(ordered) else ())):
        raise CalibrationError("a calibration score is NaN or infinite")
    return ordered


def at_least(calibration: Scores, scores: Scores) -> NDArray[np.int64]:
    """How many sorted calibration scores are >= each score: int64 [N], the numerator of the p-value less one."""
    return len(calibration) - np.searchsorted(calibration, scores, side="left").astype(np.int64)


def p_values(calibration: Scores, scores: Scores) -> Scores:
    """Conformal p-values (1 + #{S_i >= s}) / (n + 1) (Bates et al., arXiv 2104.08279): float64 [N]."""
    return (1 + at_least(calibration, scores)) / (len(calibration) + 1)


def acceptance_interval(rank: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Central interval of the acceptance that a threshold of this rank realises: quantiles of Beta(k, n + 1 - k)."""
    tail = (1 - level) / 2
    quantiles = special.betaincinv(rank, n + 1 - rank, np.array([tail, 1 - tail]))
    return float(quantiles[0]), float(quantiles[1])


@lru_cache(maxsize=64)  # of a thousand groups the draws take seconds
def mixed_acceptance_interval(cuts: tuple[Threshold, ...], level: float = 0.95) -> tuple[float, float]:
    """The same over several groups, weighted by their calibration scores: the mean of independent Betas."""
    if len(cuts) == 1:
        return acceptance_interval(cuts[0].rank, cuts[0].n, level)
    generator = np.random.default_rng(0)
    total = sum(cut.n for cut in cuts)
    draws = sum(cut.n / total * generator.beta(cut.rank, cut.n + 1 - cut.rank, DRAWS) for cut in cuts)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clopper_pearson(accepted: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share of which `accepted` of `total` independent images were seen."""
    tail = (1 - level) / 2
    low = 0.0 if accepted == 0 else float(special.betaincinv(accepted, total - accepted + 1, tail))
    high = 1.0 if accepted == total else float(special.betaincinv(accepted + 1, total - accepted, 1 - tail))
    return low, high


def class_groups(predicted: NDArray[np.int64], num_classes: int, minimum: int) -> list[int]:
    """Which group each predicted class is calibrated in, fixed on the tune split.

    Classes predicted at least `minimum` times keep a group of their own; the rest share one, called `other`.
    A rest that is itself too small takes in the smallest of the large classes.

    Args:
        predicted: int64 [N], the network's answers on the tune split.
        num_classes: C.
        minimum: images a group needs there.

    Returns:
        a group index for each class; groups are numbered from 0 in the order of their first class.

    Raises:
        TooFewSamples: all classes together are fewer than `minimum`.
    """
    counts = np.bincount(predicted, minlength=num_classes)
    if counts.sum() < minimum:
        raise TooFewSamples(f"{counts.sum()} tune images are too few to form one group; at least {minimum} are needed")
    by_size = sorted(range(num_classes), key=lambda label: (counts[label], label))
    other = [label for label in by_size if counts[label] < minimum]
    for label in by_size[len(other) :]:
        if not other or counts[other].sum() >= minimum:
            break
        other.append(label)
    key = [num_classes if label in other else label for label in range(num_classes)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(key))}
    return [numbers[name] for name in key]


def one_per_group(ids: NDArray[np.int64], groups: Sequence[str]) -> NDArray[np.int64]:
    """The image of each group with the smallest id: one draw per camera, patient or burst, so that n counts groups.

    Images of one group are no independent evidence; groups are, and the promise then speaks of a new group.

    Returns:
        int64, indices of the images kept, ascending.
    """
    chosen: dict[str, int] = {}
    for index, group in enumerate(groups):
        if group not in chosen or ids[index] < ids[chosen[group]]:
            chosen[group] = index
    return np.array(sorted(chosen.values()), dtype=np.int64)


def _rank(n: int, alpha: Fraction, guarantee: Guarantee) -> int:
    marginal = ceil((n + 1) * (1 - alpha))
    if guarantee.kind == "marginal":
        return marginal
    if guarantee.kind == "simultaneous":
        return ceil(n * (float(1 - alpha) + sqrt(log(1 / guarantee.delta) / (2 * n))))
    ranks = np.arange(1, n + 1)
    misses = special.betainc(ranks, n + 1 - ranks, float(1 - alpha))  # P(realised acceptance < 1 - alpha), falling in k
    kept = np.flatnonzero(misses <= guarantee.delta)
    return int(ranks[kept[0]]) if len(kept) else n + 1
