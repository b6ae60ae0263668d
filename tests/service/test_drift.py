# SPDX-License-Identifier: Apache-2.0
"""Each drift statistic against a slow exact oracle, and its promise against small simulations with fixed seeds."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from math import comb, factorial, log

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from detector.calibration import Guarantee, Scores, calibration_rank
from detector.errors import CalibrationError
from service.drift import Drift, DriftOptions, Reference, control_limits, ood_share_lower
from service.drift.betting import ROUND, Capital, won
from service.drift.cusum import Cusum, average_run_length, limit_for, whole_step
from service.drift.deferrals import STAKES, DeferralRate
from service.drift.exchangeability import Exchangeability, Uniforms, edge_ranks, factors
from service.drift.windows import Window


def reference(scores: Scores, target: str = "0.95") -> Reference:
    """A PAC threshold on these scores."""
    rank = calibration_rank(len(scores), 1 - Fraction(target), Guarantee())
    return Reference(np.sort(scores), rank, "sha256:model", "grood", float(target))


def drawn(n: int, seed: int) -> Reference:
    return reference(np.random.default_rng(seed).normal(size=n))


def never_too_often(count: int, trials: int, probability: float) -> bool:
    """Whether so many events agree with a probability of at most this, at level 0.001."""
    return bool(stats.binom.sf(count - 1, trials, probability) > 0.001)


class Given(Uniforms):
    """One number for every rank."""

    def __init__(self, chance: float) -> None:
        super().__init__(0)
        self.chance = chance

    def take(self, images: int) -> NDArray[np.float64]:
        return np.full((images, 2), self.chance)


def p_values(test: Exchangeability, scores: Scores) -> NDArray[np.float64]:
    """Of scores that join the ranking."""
    found, gaps = test.rank(scores)
    test.learn(gaps)
    return found


# The deferral ratio


def beta_binomial(m: int, alpha: int, beta: int) -> list[Fraction]:
    def function(x: int, y: int) -> Fraction:
        return Fraction(factorial(x - 1) * factorial(y - 1), factorial(x + y - 1))

    return [comb(m, r) * function(r + alpha, m - r + beta) / function(alpha, beta) for r in range(m + 1)]


@pytest.mark.parametrize("level", ["0.001", "0.0137", "0.2"])
def test_control_limits_are_those_of_the_exact_rational_law(level: str) -> None:
    cut, size = Reference(np.arange(60.0), 57, "", "", 0.95), 120
    mass = beta_binomial(size, 60 + 1 - 57, 57)
    low = max(r for r in range(size + 1) if sum(mass[:r]) <= Fraction(level))
    high = min(r for r in range(size + 1) if sum(mass[r + 1 :]) <= Fraction(level))
    assert control_limits(cut, size, float(level)) == (low, high)


def test_control_limits_of_a_large_window_agree_with_scipy() -> None:
    cut = Reference(np.arange(5000.0), 4776, "", "", 0.95)
    law = stats.betabinom(10_000, 225, 4776)
    low, high = control_limits(cut, 10_000, 0.0025)
    assert law.sf(high) <= 0.0025 < law.sf(high - 1)
    assert law.cdf(low - 1) <= 0.0025 < law.cdf(low)


def test_windows_keep_their_budget_of_false_alarms_and_binomial_limits_do_not() -> None:
    size, level = 1_000, 0.01
    alarms = naive = 0
    for seed in range(1_500):
        cut = drawn(300, seed)
        window = Window(cut, size, 2 * level * 1e6 / size, 0.95)
        deferrals = np.random.default_rng([seed, 1]).normal(size=size) > cut.scores[cut.rank - 1]
        window.update(deferrals)
        alarms += window.status().alarms
        rate = (cut.n + 1 - cut.rank) / (cut.n + 1)
        naive += not stats.binom.ppf(level, size, rate) <= deferrals.sum() <= stats.binom.isf(level, size, rate)
    assert never_too_often(alarms, 1_500, 2 * level)
    assert not never_too_often(naive, 1_500, 2 * level)


def test_a_window_alarms_when_it_is_full_and_until_the_next_one_is_ordinary() -> None:
    window = Window(drawn(1000, 0), 100, 1_000, 0.95)
    window.update(np.ones(99, dtype=bool))
    assert (window.status().alarm, window.status().ratio, window.status().filled) == (False, None, 99)
    window.update(np.ones(1, dtype=bool))
    assert window.status().alarm
    assert window.status().ratio == 1
    window.update(np.arange(99) < 4)
    assert window.status().alarm
    window.update(np.zeros(1, dtype=bool))
    assert (window.status().alarm, window.status().alarms, window.status().windows) == (False, 1, 2)


def test_a_scorer_that_defers_nothing_falls_below_the_lower_limit() -> None:
    window = Window(drawn(5000, 0), 1_000, 0.5, 0.95)
    window.update(np.zeros(1_000, dtype=bool))
    assert window.status().lower > 0
    assert window.status().alarm


@pytest.mark.parametrize(("share", "caught"), [(0.0, 0.5), (0.05, 1.0), (0.3, 0.6)])
def test_the_ood_share_is_below_its_lower_bound_in_few_runs(share: float, caught: float) -> None:
    wrong, runs, size = 0, 400, 1_000
    for seed in range(runs):
        generator = np.random.default_rng([seed, 2])
        acceptance = generator.beta(951, 50)
        strange = generator.random(size) < share
        deferred = generator.random(size) < np.where(strange, caught, 1 - acceptance)
        bound = ood_share_lower(Reference(np.arange(1000.0), 951, "", "", 0.95), int(deferred.sum()), size, 0.95)
        wrong += bound > share
    assert never_too_often(wrong, runs, 0.05)


def test_the_ood_share_is_bounded_well_when_all_of_it_is_deferred() -> None:
    cut = Reference(np.arange(5000.0), 4751, "", "", 0.95)
    assert ood_share_lower(cut, 500, 10_000, 0.95) == 0
    assert 0.18 < ood_share_lower(cut, 2_400, 10_000, 0.95) < 0.2  # 20 % OOD, 5 % of the others
    assert ood_share_lower(cut, 10_000, 10_000, 0.95) > 0.999


# CUSUM


@pytest.mark.parametrize("p0", [0.002, 0.05, 0.3])
def test_one_deferral_weighs_a_whole_number_of_accepted_images(p0: float) -> None:
    step, p1 = whole_step(p0, 1.5)
    assert log(p1 / p0) / log((1 - p0) / (1 - p1)) == pytest.approx(step, rel=1e-9)
    assert p1 / p0 == pytest.approx(1.5, rel=0.35)


@pytest.mark.parametrize(("rate", "step", "limit"), [(0.1, 6, 25), (0.05, 12, 9), (0.3, 1, 4)])
def test_the_run_length_is_the_mean_hitting_time(rate: float, step: int, limit: int) -> None:
    alive, expected = np.zeros(limit), 0.0
    alive[0] = 1.0
    while alive.sum() > 1e-14:
        expected += alive.sum()
        following = np.zeros(limit)
        for value, chance in enumerate(alive):
            following[max(0, value - 1)] += (1 - rate) * chance
            if value + step < limit:
                following[value + step] += rate * chance
        alive = following
    assert average_run_length(rate, step, limit) == pytest.approx(expected, rel=1e-9)


def test_the_limit_is_the_smallest_that_keeps_the_run_length() -> None:
    limit = limit_for(0.05, 13, 100_000)
    assert average_run_length(0.05, 13, limit - 1) < 100_000 <= average_run_length(0.05, 13, limit)


def test_the_cusum_follows_page_image_by_image() -> None:
    cusum = Cusum(drawn(1000, 0), 0.025, 1.5, 2_000)
    deferred = np.random.default_rng(0).random(3_000) < 0.08
    value = alarms = 0
    for image in deferred:
        before, value = value, min(2 * cusum.limit, value + cusum.step) if image else max(0, value - 1)
        alarms += before < cusum.limit <= value
        cusum.update(np.array([image]))
        assert cusum.status().value == value
    assert cusum.status().alarms == alarms > 1


def test_simulated_runs_to_a_false_alarm_are_as_long_as_promised() -> None:
    cut = drawn(2000, 0)
    runs = []
    for seed in range(300):
        cusum, images = Cusum(cut, 0.025, 1.5, 400), 0
        generator = np.random.default_rng([seed, 3])
        while not cusum.status().alarms:
            cusum.update(generator.random(1) < cusum.p0)
            images += 1
        runs.append(images)
    promised = cusum.run_length
    assert promised >= 400
    assert abs(np.mean(runs) - promised) < 4 * np.std(runs) / np.sqrt(len(runs))


def test_the_cusums_rate_is_exceeded_by_few_calibrations() -> None:
    p0 = Cusum(drawn(2000, 0), 0.025, 1.5, 400).p0
    rank = drawn(2000, 0).rank
    assert stats.beta.sf(p0, 2001 - rank, rank) == pytest.approx(0.025)


# Exchangeability


def slow_p_value(calibration: list[float], earlier: list[float], score: float, edges: int, chance: float) -> float:
    """The same rank from a list of everything seen."""
    ordered = sorted(calibration)
    ranks = [(i + 1) * (len(ordered) + 1) // (min(edges, len(ordered)) + 1) for i in range(min(edges, len(ordered)))]
    kept = [ordered[rank - 1] for rank in ranks]

    def gap(value: float) -> int:
        return sum(edge < value for edge in kept)

    weight = [1] * (len(kept) + 1)
    for value in [value for i, value in enumerate(ordered, 1) if i not in ranks] + earlier:
        weight[gap(value)] += 1
    above = sum(weight[gap(score) + 1 :])
    return (above + chance * weight[gap(score)]) / sum(weight)


@pytest.mark.parametrize("edges", [1, 7, 40, 1000])
def test_online_p_values_are_those_of_the_whole_history(edges: int) -> None:
    generator = np.random.default_rng(0)
    calibration, stream = generator.normal(size=40), generator.normal(size=100)
    test = Exchangeability(reference(calibration, "0.9"), edges, 0.01, Given(0.25))
    found = np.concatenate([p_values(test, part) for part in np.split(stream, [1, 3, 40, 90])])
    expected = [
        slow_p_value(calibration.tolist(), stream[:i].tolist(), score, edges, 0.25) for i, score in enumerate(stream)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("edges", [1, 2, 3])
def test_p_values_of_exchangeable_scores_are_uniform_and_independent_over_all_orders(edges: int) -> None:
    """Exact: with U uniform, a p-value is uniform on an interval; averaged over all orders the square is even."""
    squares: list[tuple[tuple[Fraction, Fraction], ...]] = []
    for order in permutations([0.0, 1.0, 2.0, 3.0, 4.0]):
        cut = Reference(np.sort(order[:3]), 3, "", "", 0.5)
        ends = [p_values(Exchangeability(cut, edges, 0.5, Given(u)), np.array(order[3:])).tolist() for u in (0.0, 1.0)]
        low, high = [[Fraction(p).limit_denominator(100) for p in end] for end in ends]
        squares.append(tuple(zip(low, high, strict=True)))
    for x in (Fraction(1, 7), Fraction(1, 3), Fraction(4, 5)):
        for y in (Fraction(1, 9), Fraction(1, 2), Fraction(7, 8)):
            share = sum(below(x, *first) * below(y, *second) for first, second in squares)
            assert share / len(squares) == x * y


def below(x: Fraction, low: Fraction, high: Fraction) -> Fraction:
    """P(p <= x) for p uniform on [low, high]."""
    return min(max((x - low) / (high - low), Fraction(0)), Fraction(1))


def test_p_values_of_heavily_tied_scores_are_uniform() -> None:
    found = []
    for seed in range(60):
        generator = np.random.default_rng([seed, 4])
        cut = Reference(np.sort(generator.integers(0, 4, 50).astype(float)), 48, "", "", 0.95)
        test = Exchangeability(cut, 20, 0.01, Uniforms(seed))
        found.append(p_values(test, generator.integers(0, 4, 50).astype(float)))
    assert stats.kstest(np.concatenate(found), "uniform").pvalue > 0.001


def test_a_score_that_is_no_number_ranks_among_the_largest() -> None:
    test = Exchangeability(drawn(100, 0), 1000, 0.01, Given(0.5))
    p = p_values(test, np.array([np.nan, np.inf]))
    assert p[0] == pytest.approx(0.5 / 101)
    assert p[1] == pytest.approx(1 / 102)


@pytest.mark.parametrize(("n", "edges"), [(5, 1000), (1000, 1000), (1001, 1000), (50_000, 1000)])
def test_edges_are_distinct_ranks(n: int, edges: int) -> None:
    ranks = edge_ranks(n, edges)
    assert len(ranks) == min(n, edges)
    assert 1 <= ranks[0] <= ranks[-1] <= n
    assert np.all(np.diff(ranks) >= 1)


def test_every_bet_on_uniform_p_values_is_fair() -> None:
    grid = (np.arange(1000) + 0.5) / 1000
    assert np.all(factors(grid) > 0)
    np.testing.assert_allclose(factors(grid).mean(axis=0), 1, rtol=1e-12)


# Capital


def test_capital_is_the_mixture_over_bets_and_starting_moments() -> None:
    played = np.random.default_rng(0).uniform(0.8, 1.2, (3 * ROUND + 50, 3))
    capital = Capital(3, 1e-9)
    capital.play(played)
    starts = range(0, len(played), ROUND)
    shares = [1 / np.log2(2 + j) - 1 / np.log2(3 + j) for j in range(len(starts))]
    placed = sum(
        share / 3 * played[start:, bet].prod() for share, start in zip(shares, starts, strict=True) for bet in range(3)
    )
    expected = placed + 1 / np.log2(2 + len(starts))
    assert capital.status(0).evidence_log10 == pytest.approx(np.log10(expected), abs=1e-12)


def test_evidence_is_held_at_twice_its_limit_so_that_the_alarm_clears() -> None:
    capital = Capital(2, 0.01)
    capital.play(np.full((5_000, 2), 1.5))
    status = capital.status(0.01)
    assert (status.alarm, status.alarms) == (True, 1)
    assert status.evidence_log10 == pytest.approx(4)
    capital.play(np.full((300, 2), 0.95))
    assert not capital.status(0.01).alarm
    capital.play(np.full((300, 2), 1.5))
    assert capital.status(0.01).alarms == 2


def test_the_deferral_bets_are_those_of_the_formula() -> None:
    p0 = DeferralRate(drawn(1000, 0), 0.005, 0.005).p0
    rates = STAKES / p0
    assert np.all((rates > 0) & (rates < 1 / p0))
    np.testing.assert_allclose(won(np.array([[True]]), p0, STAKES)[0], 1 + rates * (1 - p0))
    np.testing.assert_allclose(won(np.array([[False]]), p0, STAKES)[0], 1 + rates * (0 - p0))


def test_anytime_tests_raise_false_alarms_as_rarely_as_promised_and_a_fixed_ranking_does_not() -> None:
    options = replace(DriftOptions(), exchangeability_probability=0.05, deferral_probability=0.04, deferral_delta=0.01)
    alarms = {"exchangeability": 0, "deferral_rate": 0, "fixed": 0}
    for seed in range(150):
        generator = np.random.default_rng([seed, 5])
        cut = reference(generator.normal(size=200))
        stream = generator.normal(size=4_000)
        drift = Drift(cut, options, seed)
        drift.update(stream, stream > cut.scores[cut.rank - 1])
        now = drift.snapshot()
        alarms["exchangeability"] += now.exchangeability.alarms > 0
        alarms["deferral_rate"] += now.deferral_rate.alarms > 0
        fixed = Capital(24, 0.05)
        above = cut.n - np.searchsorted(cut.scores, stream)
        fixed.play(factors((above + generator.random(len(stream))) / (cut.n + 1)))
        alarms["fixed"] += fixed.status(0.05).alarms > 0
    assert never_too_often(alarms["exchangeability"], 150, 0.05)
    assert never_too_often(alarms["deferral_rate"], 150, 0.05)
    assert not never_too_often(alarms["fixed"], 150, 0.05)


@pytest.mark.parametrize(
    ("scores", "rank"), [(np.zeros(0), 1), (np.arange(3.0), 4), (np.array([1.0, 0.0]), 1), (np.array([np.nan]), 1)]
)
def test_a_calibration_that_cannot_be_is_refused(scores: Scores, rank: int) -> None:
    with pytest.raises(CalibrationError):
        Reference(scores, rank, "", "", 0.95)
