# SPDX-License-Identifier: Apache-2.0
"""The deferral ratio of non-overlapping windows: exact control limits, and what it says of the OOD share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from scipy import special

from detector.calibration import acceptance_interval, clopper_pearson
from service.drift.reference import Reference

MILLION = 1_000_000


@dataclass(frozen=True)
class WindowStatus:
    """The last complete window.

    Args:
        size: images in a window.
        filled: images in the window that is open.
        windows: complete windows so far.
        deferred: images deferred in the last complete window; None before there is one, as the next two.
        ratio: the same as a share.
        ood_share_lower: the share of OOD images in that window is at least this, with the stated confidence.
        lower, upper: control limits of the ratio.
        alarm: the last complete window lies outside them.
        alarms: windows outside so far.
    """

    size: int
    filled: int
    windows: int
    deferred: int | None
    ratio: float | None
    ood_share_lower: float | None
    lower: float
    upper: float
    alarm: bool
    alarms: int


class WindowState(BaseModel, extra="forbid", strict=True):
    """One window, as stored."""

    filled: int = Field(ge=0)
    hits: int = Field(ge=0)
    windows: int = Field(ge=0)
    last: int | None = Field(ge=0)
    alarms: int = Field(ge=0)


class Window:
    """Counts deferrals in windows of `size` images.

    A complete window of in-distribution images holds R ~ BetaBinomial(size, n + 1 - k, k) deferrals: the limits of
    Binomial(size, 1 - target) would forget that the threshold's own error is common to all windows. A window is looked
    at once, when it is full, and an expectation adds up however windows depend on each other, so
    `alarms_per_million` / 2 windows a million images are expected above the upper limit at most, and as many below
    the lower one, on average over calibrations.

    Args:
        reference: the calibration.
        size: images in a window.
        alarms_per_million: false alarms expected in a million in-distribution images, both limits together.
        confidence: of the lower bound on the OOD share.
    """

    def __init__(self, reference: Reference, size: int, alarms_per_million: float, confidence: float) -> None:
        self.reference, self.size, self.confidence = reference, size, confidence
        self.low, self.high = control_limits(reference, size, min(0.5, alarms_per_million / 2 * size / MILLION))
        self.reset()

    def reset(self) -> None:
        self.state = WindowState(filled=0, hits=0, windows=0, last=None, alarms=0)

    def restore(self, state: WindowState) -> None:
        if state.hits > state.filled or state.filled >= self.size or (state.last or 0) > self.size:
            raise ValueError(f"a window of {self.size} images cannot hold these counts")
        self.state = state

    def update(self, deferred: NDArray[np.bool_]) -> None:
        state = self.state
        while len(deferred):
            taken, deferred = deferred[: self.size - state.filled], deferred[self.size - state.filled :]
            state.filled += len(taken)
            state.hits += int(np.count_nonzero(taken))
            if state.filled == self.size:
                state.last, state.windows = state.hits, state.windows + 1
                state.alarms += self._outside(state.hits)
                state.filled = state.hits = 0

    def _outside(self, hits: int) -> bool:
        return not self.low <= hits <= self.high

    def status(self) -> WindowStatus:
        state = self.state
        last = state.last
        return WindowStatus(
            size=self.size,
            filled=state.filled,
            windows=state.windows,
            deferred=last,
            ratio=None if last is None else last / self.size,
            ood_share_lower=None if last is None else ood_share_lower(self.reference, last, self.size, self.confidence),
            lower=self.low / self.size,
            upper=self.high / self.size,
            alarm=last is not None and self._outside(last),
            alarms=state.alarms,
        )


def control_limits(reference: Reference, size: int, level: float) -> tuple[int, int]:
    """The narrowest low and high with P(R < low) <= level and P(R > high) <= level for R deferrals in a window.

    R ~ BetaBinomial(size, n + 1 - k, k), exact for continuous scores (Marques, arXiv 2303.02770).
    """
    alpha, beta = reference.n + 1 - reference.rank, reference.rank
    hits = np.arange(size + 1)
    ways = -special.betaln(hits + 1, size - hits + 1) - np.log(size + 1)
    mass = np.exp(ways + special.betaln(hits + alpha, size - hits + beta) - special.betaln(alpha, beta))
    below = np.cumsum(mass) - mass  # P(R < r)
    above = np.cumsum(mass[::-1])[::-1] - mass  # P(R > r), summed from the small end
    return int(np.flatnonzero(below <= level)[-1]), int(np.flatnonzero(above <= level)[0])


def ood_share_lower(reference: Reference, deferred: int, images: int, confidence: float) -> float:
    """At least this share of the images is OOD, with this confidence for each look.

    With acceptance A of in-distribution images and OOD share s, the deferral rate D is at most s + (1 - s)(1 - A), so
    s >= 1 - (1 - D) / A. D takes its Clopper-Pearson and A its Beta lower bound, each with half the error. OOD images
    that are accepted are not seen: the true share may be far larger.
    """
    acceptance, _ = acceptance_interval(reference.rank, reference.n, confidence)
    rate, _ = clopper_pearson(deferred, images, confidence)
    return max(0.0, 1 - (1 - rate) / acceptance)
