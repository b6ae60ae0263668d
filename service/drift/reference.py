# SPDX-License-Identifier: Apache-2.0
"""What a stream is compared with: one calibration under one policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from detector.calibration import Scores
from detector.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Reference:
    """The calibration of the deciding score, and where it was cut.

    In-distribution images are deferred with a probability that is itself random, Beta(n + 1 - k, k), because the
    threshold is the k-th smallest of n calibration scores. It is one draw for the whole life of the calibration.
    Tied scores make deferrals rarer than that; only the lower control limit minds.

    Args:
        scores: sorted calibration scores float64 [n], larger = more OOD.
        rank: k; an image is deferred iff its score exceeds the k-th smallest.
        model_digest: of the model that scored.
        score_name: the score that decides.
        target_id_acceptance: the policy's target.
        group: the calibration group; a model with several has one `Drift` for each.

    Raises:
        CalibrationError: no scores, not sorted, not finite, or a rank outside 1..n.
    """

    scores: Scores
    rank: int
    model_digest: str
    score_name: str
    target_id_acceptance: float
    group: str = "all"

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= len(self.scores):
            raise CalibrationError(f"the rank {self.rank} lies outside 1..{len(self.scores)}")
        if not np.all(np.isfinite(self.scores)) or np.any(np.diff(self.scores) < 0):
            raise CalibrationError("calibration scores must be finite and sorted")

    @property
    def n(self) -> int:
        """Calibration scores."""
        return len(self.scores)

    def deferral_upper(self, delta: float) -> float:
        """The in-distribution deferral rate that a share `delta` of calibrations exceeds."""
        return 1 - float(special.betaincinv(self.rank, self.n + 1 - self.rank, delta))

    def identity(self) -> dict[str, Any]:
        """What a stored state must agree with."""
        return {
            "model": self.model_digest,
            "score": self.score_name,
            "group": self.group,
            "target": self.target_id_acceptance,
            "rank": self.rank,
            "calibration": hashlib.sha256(np.ascontiguousarray(self.scores, dtype="<f8").tobytes()).hexdigest(),
        }
