# SPDX-License-Identifier: Apache-2.0
"""Do the scores of the stream look like more of the calibration? A martingale on online ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from detector.calibration import Scores
from service.drift.betting import Capital, CapitalState, EvidenceStatus, won
from service.drift.reference import Reference

CHUNK = 64  # images ranked against each other at once
# Each bet stakes a share of its capital on a p-value among the smallest (or the largest): (probability, stake) [12, 2].
BETS = np.array([(chance, stake) for chance in (0.02, 0.1, 0.5) for stake in (0.015, 0.05, 0.15, 0.5)])


class ExchangeabilityState(BaseModel, extra="forbid", strict=True):
    """The test, as stored."""

    weights: list[int] = Field(max_length=100_001)
    capital: CapitalState


class Uniforms:
    """Reproducible numbers in [0, 1), two for each image whatever the batches; only how many were drawn is kept."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seek(0)

    def seek(self, images: int) -> None:
        """Go to where this many images have drawn theirs."""
        self.images = images
        bits = np.random.PCG64([self.seed, 0])
        bits.advance(2 * images)
        self._generator = np.random.Generator(bits)

    def take(self, images: int) -> NDArray[np.float64]:
        """float64 [images, 2]"""
        self.images += images
        return self._generator.random((images, 2))


class Exchangeability:
    """Ranks each score among the calibration and all earlier scores of the stream, and bets against a flat rank.

    The memory is bounded and the p-values stay exact. Of the calibration, the scores at fixed ranks are kept as edges
    (all of them up to `edges`). A gap between edges weighs one more than the other scores that fell into it so far;
    under exchangeability the next score falls into it with probability weight / total (a Polya urn), and its place
    within is uniform. So p = (weight of the gaps above + U * weight of its own) / total is uniform and independent of
    all earlier p, for every n and every number of edges: not a property of the limit. (Ranking *binned* scores would
    not do: quantiles of the calibration as bins treat calibration and stream unequally.) Tied scores are ordered at
    random, once for each score. p-values against the calibration alone would not do either: they share its error, and
    a martingale on them wins by learning it.

    While the alarm stands no score joins the ranking, so that the alarm lasts as long as the stream differs from what
    came before it, instead of until the difference is learnt. The promise speaks of the first alarm since a reset.

    Args:
        reference: the calibration.
        edges: calibration scores kept.
        probability: a, the probability of a false alarm, ever.
        uniforms: the source of U.
    """

    def __init__(self, reference: Reference, edges: int, probability: float, uniforms: Uniforms) -> None:
        self.probability, self._uniforms = probability, uniforms
        ranks = edge_ranks(reference.n, edges)
        ties = np.random.Generator(np.random.PCG64([uniforms.seed, 1])).random(reference.n)
        order = np.lexsort((ties, reference.scores))[ranks - 1]
        self._edges, self._ties = reference.scores[order], ties[order]
        self._fresh = np.diff(ranks, prepend=0, append=reference.n + 1)
        self._capital = Capital(2 * len(BETS), probability)
        self.reset()

    def reset(self) -> None:
        self._weights = self._fresh.copy()
        self._capital.reset()

    def state(self) -> ExchangeabilityState:
        return ExchangeabilityState(weights=self._weights.tolist(), capital=self._capital.state())

    def restore(self, state: ExchangeabilityState) -> None:
        grown = np.array(state.weights, dtype=np.int64)
        if grown.shape != self._fresh.shape or np.any(grown < self._fresh):
            raise ValueError("the weights are not those of this calibration")
        if grown.sum() - self._fresh.sum() > state.capital.images:
            raise ValueError("the weights count more images than were seen")
        self._weights = grown
        self._capital.restore(state.capital)

    def update(self, scores: Scores) -> None:
        while len(scores):
            scores = scores[self._advance(scores[:CHUNK]) :]

    def _advance(self, scores: Scores) -> int:
        drawn, learning = self._uniforms.images, not self._capital.alarm
        p_values, gaps = self.rank(scores, learning)
        played = self._capital.play(factors(p_values), to_turn=True)
        if played < len(scores):
            self._uniforms.seek(drawn + played)
        if learning:
            self.learn(gaps[:played])
        return played

    def rank(self, scores: Scores, learning: bool = True) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Smoothed p-values float64 [m] of a few further scores, and the gaps int64 [m] that they fall into.

        Args:
            scores: float64 [m]
            learning: each is also ranked among those before it in `scores`.
        """
        chance = self._uniforms.take(len(scores))
        gap = self._gaps(np.where(np.isnan(scores), np.inf, scores), chance[:, 1])
        above = np.cumsum(self._weights[::-1])[::-1] - self._weights
        earlier = np.tri(len(scores), k=-1, dtype=bool) & learning
        total = int(self._weights.sum()) + np.count_nonzero(earlier, axis=1)
        higher = above[gap] + np.count_nonzero(earlier & (gap > gap[:, None]), axis=1)
        own = self._weights[gap] + np.count_nonzero(earlier & (gap == gap[:, None]), axis=1)
        return (higher + chance[:, 0] * own) / total, gap

    def learn(self, gaps: NDArray[np.int64]) -> None:
        """Let ranked scores join what later ones are ranked among."""
        np.add.at(self._weights, gaps, 1)

    def _gaps(self, scores: Scores, ties: NDArray[np.float64]) -> NDArray[np.int64]:
        """int64 [m]: how many edges lie below each score, ties decided by its random number."""
        low, high = (np.searchsorted(self._edges, scores, side=side) for side in ("left", "right"))
        for i in np.flatnonzero(low < high):
            low[i] += np.searchsorted(self._ties[low[i] : high[i]], ties[i])
        return low

    def status(self) -> EvidenceStatus:
        return self._capital.status(self.probability)


def edge_ranks(n: int, edges: int) -> NDArray[np.int64]:
    """Ranks from 1 to n, evenly spaced; a function of n alone, which is what validity needs."""
    kept = min(n, edges)
    return np.arange(1, kept + 1) * (n + 1) // (kept + 1)


def factors(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each bet is multiplied by, float64 [m, bets]; of mean 1 over uniform p-values."""
    chance, stake = BETS.T
    small, large = (won(p[:, None] <= chance, chance, stake) for p in (p_values, 1 - p_values))
    return np.concatenate([small, large], axis=1)
