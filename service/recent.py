# SPDX-License-Identifier: Apache-2.0
"""What the server did of late: a ring of ten-second slots, for the console of a server that no Prometheus watches."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from detector.policy import Decider, Policy
from service.metrics import LATENCY_BUCKETS, STAGES, Metrics
from service.served import Answer, ServedModel

Values = NDArray[np.float64]

SLOT_S, SLOTS = 10, 90  # a quarter of an hour
BINS = 20  # of the p-value histogram
BEYOND = 0.00135  # share of windows beyond each control limit, that of three standard deviations
DRIFT = ("oodgate_drift_", "oodgate_control_limit_", "oodgate_window_deferral_")


@dataclass
class _Seen:
    """Ten seconds of one model under one policy."""

    accepted: int = 0
    deferred: int = 0
    classes: Counter[tuple[str, str]] = field(default_factory=Counter)
    p_values: Counter[int] = field(default_factory=Counter)


@dataclass
class _Slot:
    """Ten seconds: counts by model and policy, and the stage histograms as they stood when it began."""

    number: int
    stages: dict[str, Values]
    seen: defaultdict[tuple[str, Policy], _Seen] = field(default_factory=lambda: defaultdict(_Seen))


class Recent:
    """The last quarter of an hour; called on the event loop alone.

    Args:
        metrics: where the stages' latencies are read.
        clock: seconds since the epoch.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self._metrics, self._clock = metrics, clock
        self._slots: deque[_Slot] = deque()
        self._current()

    def count(self, model: ServedModel, answers: Sequence[Answer]) -> None:
        """Take in a batch."""
        seen = self._current().seen[_decided_by(model)]
        for answer in answers:
            verdict = answer.verdict
            seen.accepted += verdict.decision == "accept"
            seen.deferred += verdict.decision == "defer"
            seen.classes[verdict.prediction.label, verdict.decision] += 1
            seen.p_values[min(BINS - 1, int(verdict.ood.p_value * BINS))] += 1

    def report(self, models: Sequence[ServedModel]) -> dict[str, Any]:
        """The window as JSON: by slot, oldest first, the present one last."""
        now = self._current().number
        numbers = range(now - SLOTS + 1, now + 1)
        return {
            "slot_seconds": SLOT_S,
            "slots": [number * SLOT_S for number in numbers],
            "models": {model.detector.manifest.name: self._of_model(model, numbers) for model in models},
            "stages": self._latencies(),
            "drift": self._drift(),
        }

    def _of_model(self, model: ServedModel, numbers: Sequence[int]) -> dict[str, Any]:
        decider, key = model.decider, _decided_by(model)
        of_number = {slot.number: slot.seen[key] for slot in self._slots if key in slot.seen}
        accepted = [of_number[n].accepted if n in of_number else 0 for n in numbers]
        deferred = [of_number[n].deferred if n in of_number else 0 for n in numbers]
        images = np.add(accepted, deferred)
        classes: dict[str, dict[str, int]] = {}
        p_values = [0] * BINS
        for seen in of_number.values():
            for (label, decision), images_of in seen.classes.items():
                classes.setdefault(label, {"accept": 0, "defer": 0})[decision] += images_of
            for part, images_of in seen.p_values.items():
                p_values[part] += images_of
        return {
            "version": model.detector.manifest.version,
            "score": decider.policy.score_name,
            "target_id_acceptance": decider.policy.target_id_acceptance,
            "p_cutoff": float(max(cut.p_cutoff for cut in decider.thresholds)),
            "accepted": accepted,
            "deferred": deferred,
            "limits": control_limits(decider, [*images.tolist(), int(images.sum())]),
            "classes": classes,
            "p_values": p_values,
        }

    def _current(self) -> _Slot:
        number = int(self._clock() // SLOT_S)
        if not self._slots or self._slots[-1].number != number:
            self._slots.append(_Slot(number, self._stages()))
        while self._slots[0].number <= number - SLOTS:
            self._slots.popleft()
        return self._slots[-1]

    def _stages(self) -> dict[str, Values]:
        """By stage, since the start: observations up to each bucket's bound, then the sum of seconds."""
        found: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for family in self._metrics.stage_seconds.collect():
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_sum")):
                    found[sample.labels["stage"]].append(sample.value)
        return {stage: np.array(values) for stage, values in found.items()}

    def _latencies(self) -> dict[str, dict[str, float]]:
        before, now = self._slots[0].stages, self._stages()
        return {stage: _latency(now[stage] - before[stage]) for stage in STAGES}

    def _drift(self) -> dict[str, float]:
        """The gauges of drift and control limits, by name and labels, where there are any."""
        return {
            f"{sample.name.removeprefix('oodgate_')} {' '.join(sample.labels.values())}".strip(): sample.value
            for family in self._metrics.registry.collect()
            if family.name.startswith(DRIFT) and family.type == "gauge"
            for sample in family.samples
        }


def _decided_by(model: ServedModel) -> tuple[str, Policy]:
    # What another version or policy decided says nothing of these limits; a decider would hold on to its calibration.
    return model.detector.manifest.model_digest, model.decider.policy


def control_limits(decider: Decider, images: Sequence[int]) -> list[tuple[float, float] | None]:
    """Limits of the deferral rate of windows of in-distribution images, None for an empty window.

    Binomial, three standard deviations' worth, for any deferral rate in the calibration's 95 % interval.
    """
    low, high = decider.expected_acceptance()
    n = np.asarray(images)
    with np.errstate(invalid="ignore", divide="ignore"):
        lower, upper = binomial_quantile(BEYOND, n, 1 - high) / n, binomial_quantile(1 - BEYOND, n, 1 - low) / n
    return [(float(below), float(above)) if seen else None for seen, below, above in zip(n, lower, upper, strict=True)]


def binomial_quantile(q: float, n: NDArray[np.int64], p: float) -> Values:
    """The least number of n images that is not exceeded with probability q; scipy.stats has it, for 48 MB more."""
    found = np.ceil(special.bdtrik(q, n, p))
    below = np.maximum(found - 1, 0)
    quantile: Values = np.where(special.bdtr(below, n, p) >= q, below, found)
    return quantile


def _latency(change: Values) -> dict[str, float]:
    """Number, mean, median and 95th percentile in milliseconds, the last two as good as the buckets are narrow."""
    *upto, seconds = change
    count = upto[-1]
    if not count:
        return {"count": 0, "mean_ms": 0.0, "p50_ms": 0.0, "p95_ms": 0.0}
    # What lies beyond the last bound is put there.
    bounds = [0.0, *LATENCY_BUCKETS, LATENCY_BUCKETS[-1]]
    median, high = np.interp([count / 2, 0.95 * count], [0.0, *upto], bounds)
    return {
        "count": int(count),
        "mean_ms": 1000 * seconds / count,
        "p50_ms": 1000 * float(median),
        "p95_ms": 1000 * float(high),
    }
