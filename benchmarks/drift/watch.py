# SPDX-License-Identifier: Apache-2.0
"""Run every drift test, and the rivals, over one stream of scores, and note when each first raised an alarm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.rivals import BinomialWindow, FixedMartingale
from detector.calibration import Guarantee, Scores, calibration_rank
from service.drift import Drift, DriftOptions, Reference

BATCH = 250  # images at once where nobody looks
LOOK = 50  # images between two looks: delays are known to that many
OPTIONS = DriftOptions()
WINDOW_BUDGET = OPTIONS.window_alarms_per_million / len(OPTIONS.windows)
OURS = (*(f"window_{size}" for size in OPTIONS.windows), "cusum", "exchangeability", "deferral_rate")
RIVALS = (*(f"binomial_window_{size}" for size in OPTIONS.windows), "fixed_martingale")
TARGET = 0.95


class Watch:
    """All tests on one stream.

    Args:
        reference: the calibration.
        seed: of the smoothing.
    """

    def __init__(self, reference: Reference, seed: int) -> None:
        self.threshold = reference.scores[reference.rank - 1]
        self.drift = Drift(reference, OPTIONS, seed)
        self.windows = [BinomialWindow(reference, size, WINDOW_BUDGET) for size in OPTIONS.windows]
        self.martingale = FixedMartingale(reference, OPTIONS.exchangeability_probability, seed)

    def update(self, scores: Scores) -> None:
        deferred: NDArray[np.bool_] = scores > self.threshold
        self.drift.update(scores, deferred)
        for window in self.windows:
            window.update(deferred)
        self.martingale.update(scores)

    def feed(self, scores: Scores) -> None:
        """Take in many images; the windows' sizes are multiples of BATCH."""
        for start in range(0, len(scores), BATCH):
            self.update(scores[start : start + BATCH])

    def alarms(self) -> dict[str, int]:
        """Alarms raised so far by each test."""
        now = self.drift.snapshot()
        counts = {f"window_{window.size}": window.alarms for window in now.windows}
        counts |= {name: getattr(now, name).alarms for name in ("cusum", "exchangeability", "deferral_rate")}
        counts |= {f"binomial_window_{window.size}": window.alarms for window in self.windows}
        return counts | {"fixed_martingale": self.martingale.alarms}


def reference(calibration: Scores) -> Reference:
    """A PAC threshold at 95 % on these scores, as the server sets one."""
    ordered = np.sort(calibration)
    rank = calibration_rank(len(ordered), Fraction("0.05"), Guarantee())
    return Reference(ordered, rank, "sha256:benchmark", "score", TARGET)


def alarms_on(stream: Scores, calibration: Reference, seed: int) -> dict[str, int]:
    """Alarms of each test over a stream."""
    watch = Watch(calibration, seed)
    watch.feed(stream)
    return watch.alarms()


def delays_on(before: Scores, after: Scores, calibration: Reference, seed: int) -> dict[str, int | None]:
    """Images from the change to each test's first alarm; None where it raised none; absent where it had before."""
    watch = Watch(calibration, seed)
    watch.feed(before)
    open_tests = [name for name, count in watch.alarms().items() if count == 0]
    delays: dict[str, int | None] = dict.fromkeys(open_tests)
    for start in range(0, len(after), LOOK):
        watch.update(after[start : start + LOOK])
        counts = watch.alarms()
        for name in [name for name in open_tests if counts[name]]:
            delays[name] = min(start + LOOK, len(after))
            open_tests.remove(name)
        if not open_tests:
            break
    return delays


def summary(runs: Sequence[Mapping[str, int | None]]) -> dict[str, dict[str, float | None]]:
    """For each test: runs without an earlier alarm, share that found the change, median and 90 % quantile of delays.

    A quantile that lies among the runs that did not find it is None.
    """
    table: dict[str, dict[str, float | None]] = {}
    for name in (*OURS, *RIVALS):
        delays = sorted(np.inf if run[name] is None else float(run[name] or 0) for run in runs if name in run)
        table[name] = {"runs": len(delays), "found": float(np.mean(np.isfinite(delays))) if delays else None}
        for label, level in (("median", 0.5), ("within", 0.9)):
            value = delays[int(np.ceil(level * len(delays))) - 1] if delays else np.inf
            table[name][label] = value if np.isfinite(value) else None
    return table
