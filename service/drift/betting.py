# SPDX-License-Identifier: Apache-2.0
"""Capital that cannot grow, on average, while nothing has changed: the core of both anytime-valid tests."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, log10

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

ROUND = 100  # images between two new starts
STRETCH = 50  # images multiplied up at once; so few that no product overflows


@dataclass(frozen=True)
class EvidenceStatus:
    """One anytime-valid test now.

    Args:
        evidence_log10: log10 of the capital, which started at 1.
        limit_log10: alarm iff the evidence reaches it.
        alarm: whether it does.
        alarms: how often it has risen to it.
        images: images the test has seen.
        false_alarm_probability: P(an alarm, ever) on in-distribution images is at most this.
    """

    evidence_log10: float
    limit_log10: float
    alarm: bool
    alarms: int
    images: int
    false_alarm_probability: float


class CapitalState(BaseModel, extra="forbid", strict=True):
    """A capital, as stored."""

    bets: list[float] = Field(max_length=1000)
    images: int = Field(ge=0)
    alarms: int = Field(ge=0)


class Capital:
    """A test martingale: a mixture over bets and over the moment they are first placed.

    One unit is dealt out over time: after j rounds of 100 images the share 1 / log2(2 + j) is still in reserve, the
    rest went in equal parts to the bets, which multiply it by their factors. A change after a million images then costs
    six decades of evidence, whatever was lost before it. If each factor has mean at most 1 given the past, so
    has the capital, and P(it ever reaches 1 / a) <= a (Ville). Capital above 1 / a^2 is thrown away, which a promise
    from above survives, so that an alarm clears when its cause is gone.

    Args:
        bets: number of bets.
        probability: a.
    """

    def __init__(self, bets: int, probability: float) -> None:
        self.size, self.limit = bets, 1 / probability
        self.reset()

    def reset(self) -> None:
        self.restore(CapitalState(bets=[0.0] * self.size, images=0, alarms=0))

    def state(self) -> CapitalState:
        return CapitalState(bets=self._bets.tolist(), images=self.images, alarms=self._alarms)

    def restore(self, state: CapitalState) -> None:
        if len(state.bets) != self.size or not all(0 <= bet < np.inf for bet in state.bets):
            raise ValueError(f"the capital of {self.size} bets must be as many finite numbers from 0")
        self._bets = np.array(state.bets)
        self.images, self._alarms = state.images, state.alarms
        self._reserve = _reserve(-(-self.images // ROUND))
        self._total = self._sum()

    @property
    def alarm(self) -> bool:
        """Whether the capital has reached 1 / a."""
        return self._total >= self.limit

    def play(self, factors: NDArray[np.float64], *, to_turn: bool = False) -> int:
        """Multiply by the factors float64 [images, bets] of each image in turn.

        Args:
            to_turn: stop after the image with which the alarm comes or goes.

        Returns:
            images played.
        """
        played = 0
        while played < len(factors):
            if self.images % ROUND == 0:
                self._deal()
            before = self.alarm
            if before:  # what is too much is thrown away after each image
                self._single(factors[played])
                played += 1
            else:
                played += self._stretch(factors[played : played + min(STRETCH, ROUND - self.images % ROUND)])
            self._alarms += self.alarm > before
            if to_turn and self.alarm != before:
                break
        return played

    def _stretch(self, factors: NDArray[np.float64]) -> int:
        """Play up to the image with which the alarm comes; without a deal between. Returns images played."""
        path = np.cumprod(np.vstack([self._bets, factors]), axis=0)[1:]
        totals = path.sum(axis=1) + self._reserve
        turns = np.flatnonzero(totals >= self.limit)
        last = int(turns[0]) if len(turns) else len(factors) - 1
        self._bets, self._total = path[last].copy(), float(totals[last])
        self.images += last + 1
        self._throw_excess_away()
        return last + 1

    def _single(self, factors: NDArray[np.float64]) -> None:
        self._bets = self._bets * factors
        self._total = self._sum()
        self.images += 1
        self._throw_excess_away()

    def _throw_excess_away(self) -> None:
        if self._total > self.limit**2:
            self._bets *= (self.limit**2 - self._reserve) / (self._total - self._reserve)
            self._total = self._sum()

    def _sum(self) -> float:
        return float(self._bets.sum()) + self._reserve

    def _deal(self) -> None:
        left = _reserve(self.images // ROUND + 1)
        self._bets += (self._reserve - left) / self.size
        self._reserve = left

    def status(self, false_alarm_probability: float) -> EvidenceStatus:
        evidence, limit = log10(self._total), log10(self.limit)
        return EvidenceStatus(evidence, limit, self.alarm, self._alarms, self.images, false_alarm_probability)


def _reserve(rounds: int) -> float:
    return 1 / log2(2 + rounds)


def won(
    event: NDArray[np.bool_], probability: NDArray[np.float64] | float, stake: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The factor of a stake at fair odds: 1 - stake, and stake / probability more where the event came."""
    factor: NDArray[np.float64] = 1 - stake + stake * event / probability
    return factor
