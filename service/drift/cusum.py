# SPDX-License-Identifier: Apache-2.0
"""Bernoulli CUSUM of deferrals with an exact average run length."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from scipy import linalg

from service.drift.reference import Reference


@dataclass(frozen=True)
class CusumStatus:
    """The CUSUM now.

    Args:
        value, limit: in steps of one accepted image; alarm iff value >= limit.
        alarm: whether it stands above.
        alarms: how often it has risen above.
        deferral_rate: p0, the rate from which the run length is counted.
        shifted_rate: p1, the rate it finds soonest.
        run_length: images to a false alarm, on average, at p0 from a start at 0.
        delay: images to an alarm, on average, at p1 from a start at 0.
    """

    value: int
    limit: int
    alarm: bool
    alarms: int
    deferral_rate: float
    shifted_rate: float
    run_length: float
    delay: float


class CusumState(BaseModel, extra="forbid", strict=True):
    """The CUSUM, as stored."""

    value: int = Field(ge=0)
    alarms: int = Field(ge=0)


class Cusum:
    """C <- max(0, C - 1) on an accepted image, C + q on a deferred one; alarm while C >= limit (Page 1954).

    It is the log-likelihood ratio of p1 against p0 in units of one accepted image; p1 is moved a little so that q is
    whole (Reynolds and Stoumbos 1999), and the run length then comes from a finite Markov chain, exactly. p0 is the
    upper Beta bound of the in-distribution deferral rate: in all but a share `delta` of calibrations the mean run to a
    false alarm is at least `run_length`. C is held at twice the limit, so that an alarm clears when its cause is gone;
    the run length does not feel that.

    Args:
        reference: the calibration.
        delta: share of calibrations that may defer more than p0.
        ratio: p1 / p0, before q is made whole; above 1.
        run_length: images to a false alarm, on average.
    """

    def __init__(self, reference: Reference, delta: float, ratio: float, run_length: float) -> None:
        self.p0 = reference.deferral_upper(delta)
        self.step, self.p1 = whole_step(self.p0, ratio)
        self.limit = limit_for(self.p0, self.step, run_length)
        self.run_length = average_run_length(self.p0, self.step, self.limit)
        self.delay = average_run_length(self.p1, self.step, self.limit)
        self.reset()

    def reset(self) -> None:
        self.state = CusumState(value=0, alarms=0)

    def restore(self, state: CusumState) -> None:
        if state.value > 2 * self.limit:
            raise ValueError(f"the CUSUM {state.value} lies above twice its limit {self.limit}")
        self.state = state

    def update(self, deferred: NDArray[np.bool_]) -> None:
        value, previous = self.state.value, -1
        for place in np.flatnonzero(deferred).tolist():
            value = max(0, value - (place - previous - 1))
            raised = min(2 * self.limit, value + self.step)
            self.state.alarms += value < self.limit <= raised
            value, previous = raised, place
        self.state.value = max(0, value - (len(deferred) - previous - 1))

    def status(self) -> CusumStatus:
        value, alarms = self.state.value, self.state.alarms
        return CusumStatus(
            value, self.limit, value >= self.limit, alarms, self.p0, self.p1, self.run_length, self.delay
        )


def whole_step(p0: float, ratio: float) -> tuple[int, float]:
    """q and the p1 nearest to ratio * p0 for which a deferral weighs exactly q accepted images."""
    aim = min(ratio * p0, (1 + p0) / 2)
    step = max(1, round(_weight(p0, aim)))
    high = 1 - 1e-12
    if _weight(p0, high) >= step:
        return step, high
    low = p0 * (1 + 1e-9)
    for _ in range(100):  # scipy.optimize would take ten steps, and 18 MB for as long as the server lives
        middle = (low + high) / 2
        low, high = (middle, high) if _weight(p0, middle) >= step else (low, middle)
    return step, (low + high) / 2


def _weight(p0: float, p1: float) -> float:
    return log(p1 / p0) / log((1 - p0) / (1 - p1))


def average_run_length(rate: float, step: int, limit: int) -> float:
    """Images until C >= limit, on average, from C = 0 at this deferral rate: the hitting time of a Markov chain.

    E[i] = 1 + (1 - rate) E[max(0, i - 1)] + rate E[i + step], with E = 0 from the limit on; a banded system.
    """
    reach = min(step, limit - 1)
    bands = np.zeros((reach + 2, limit))  # row `reach` is the diagonal, the one above it the first superdiagonal
    bands[reach] = 1.0
    bands[reach, 0] -= 1 - rate
    if step < limit:
        bands[0, step:] -= rate
    bands[reach + 1, : limit - 1] -= 1 - rate
    return float(linalg.solve_banded((1, reach), bands, np.ones(limit))[0])


def limit_for(rate: float, step: int, run_length: float) -> int:
    """The smallest limit whose average run length at this deferral rate is at least `run_length`."""
    high = step
    while average_run_length(rate, step, high) < run_length:
        high = ceil(1.5 * high) + 1
    low = 0  # too small
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if average_run_length(rate, step, middle) < run_length else (low, middle)
    return high
