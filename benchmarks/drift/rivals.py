# SPDX-License-Identifier: Apache-2.0
"""Two common tests that forget the calibration's own error; measured beside ours, not shipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from detector.calibration import Scores
from service.drift import Reference
from service.drift.betting import Capital
from service.drift.exchangeability import factors
from service.drift.windows import MILLION


class BinomialWindow:
    """Windows as ours, with limits of Binomial(size, (n + 1 - k) / (n + 1)): the threshold taken as exact."""

    def __init__(self, reference: Reference, size: int, alarms_per_million: float) -> None:
        rate = (reference.n + 1 - reference.rank) / (reference.n + 1)
        level = alarms_per_million / 2 * size / MILLION
        self.size, self.low, self.high = size, stats.binom.ppf(level, size, rate), stats.binom.isf(level, size, rate)
        self.filled = self.hits = self.alarms = 0

    def update(self, deferred: NDArray[np.bool_]) -> None:
        """Take in images; their number must divide the window's size."""
        self.filled += len(deferred)
        self.hits += int(np.count_nonzero(deferred))
        if self.filled == self.size:
            self.alarms += not self.low <= self.hits <= self.high
            self.filled = self.hits = 0


class FixedMartingale:
    """The bets of the exchangeability test on p-values against the calibration alone."""

    def __init__(self, reference: Reference, probability: float, seed: int) -> None:
        self.scores, self.probability = reference.scores, probability
        self._generator = np.random.default_rng(seed)
        self._capital = Capital(factors(np.zeros(1)).shape[1], probability)

    @property
    def alarms(self) -> int:
        return self._capital.status(self.probability).alarms

    def update(self, scores: Scores) -> None:
        above = len(self.scores) - np.searchsorted(self.scores, scores, side="right")
        tied = len(self.scores) - np.searchsorted(self.scores, scores, side="left") - above
        smooth = self._generator.random(len(scores))
        self._capital.play(factors((above + smooth * (1 + tied)) / (len(self.scores) + 1)))
