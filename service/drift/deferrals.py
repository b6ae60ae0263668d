# SPDX-License-Identifier: Apache-2.0
"""Are more images deferred than the calibration can explain? An e-process on deferrals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.drift.betting import Capital, CapitalState, EvidenceStatus, won
from service.drift.reference import Reference

STAKES = np.array([0.01, 0.02, 0.04, 0.08, 0.16, 0.32])


class DeferralRate:
    """The mixture of prod(1 + lambda (1{deferred} - p0)), lambda = stake / p0, over stakes and starting moments.

    p0 is the in-distribution deferral rate that a share delta of calibrations exceeds. For the others each factor has
    mean at most 1, so P(an alarm, ever) <= probability + delta (Ville).

    Args:
        reference: the calibration.
        probability: a, for calibrations that keep p0.
        delta: share of calibrations that need not.
    """

    def __init__(self, reference: Reference, probability: float, delta: float) -> None:
        self.p0 = reference.deferral_upper(delta)
        self.probability = probability + delta
        self._capital = Capital(len(STAKES), probability)

    def reset(self) -> None:
        self._capital.reset()

    def state(self) -> CapitalState:
        return self._capital.state()

    def restore(self, state: CapitalState) -> None:
        self._capital.restore(state)

    def update(self, deferred: NDArray[np.bool_]) -> None:
        self._capital.play(won(deferred[:, None], self.p0, STAKES))

    def status(self) -> EvidenceStatus:
        return self._capital.status(self.probability)
