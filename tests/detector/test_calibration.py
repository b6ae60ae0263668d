# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from detector.calibration import (
    Guarantee,
    acceptance_interval,
    at_least,
    calibration_rank,
    class_groups,
    clopper_pearson,
    exact,
    one_per_group,
    p_values,
    smallest_sample,
    sorted_scores,
    threshold,
)
from detector.errors import CalibrationError, TooFewSamples

FIVE_PERCENT = Fraction(1, 20)
PAC, MARGINAL, SIMULTANEOUS = Guarantee(), Guarantee(kind="marginal"), Guarantee(kind="simultaneous")


@pytest.mark.parametrize(
    ("n", "marginal", "pac"),
    [(100, 96, 99), (500, 476, 484), (1000, 951, 962), (2000, 1901, 1917), (5000, 4751, 4776), (10000, 9501, 9537)],
)
def test_ranks_are_those_of_the_tables(n: int, marginal: int, pac: int) -> None:
    assert calibration_rank(n, FIVE_PERCENT, MARGINAL) == marginal
    assert calibration_rank(n, FIVE_PERCENT, PAC) == pac


@pytest.mark.parametrize(("delta", "n"), [(0.05, 59), (0.10, 45), (0.01, 90)])
def test_the_smallest_pac_sample_is_that_of_wilks(delta: float, n: int) -> None:
    assert smallest_sample(FIVE_PERCENT, Guarantee(delta=delta)) == n
    assert calibration_rank(n, FIVE_PERCENT, Guarantee(delta=delta)) == n
    with pytest.raises(TooFewSamples, match=f"at least {n} are needed"):
        calibration_rank(n - 1, FIVE_PERCENT, Guarantee(delta=delta))


def test_the_smallest_marginal_sample_is_nineteen() -> None:
    assert smallest_sample(FIVE_PERCENT, MARGINAL) == 19
    with pytest.raises(TooFewSamples, match="at least 19"):
        calibration_rank(18, FIVE_PERCENT, MARGINAL)


def test_a_target_is_the_fraction_a_person_means() -> None:
    assert exact(0.95) == Fraction(19, 20)
    assert calibration_rank(99, 1 - exact(0.7), MARGINAL) == 70  # binary 0.7 would give 71


@pytest.mark.parametrize("guarantee", [PAC, MARGINAL, SIMULTANEOUS])
@given(scores=st.lists(st.integers(0, 40), min_size=120, max_size=200), probe=st.integers(-1, 41))
@settings(max_examples=60, deadline=None)
def test_deferral_by_p_value_and_by_threshold_agree(guarantee: Guarantee, scores: list[int], probe: int) -> None:
    calibration = sorted_scores(np.array(scores, dtype=np.float64))
    cut = threshold(calibration, Fraction(1, 4), guarantee)
    score = np.array([float(probe)])
    p_exact = Fraction(1 + int(at_least(calibration, score)[0]), len(calibration) + 1)
    assert (p_exact <= cut.p_cutoff) == (float(probe) > cut.value)
    assert (float(p_values(calibration, score)[0]) <= float(cut.p_cutoff)) == (float(probe) > cut.value)


def test_pac_keeps_its_promise_in_simulation_and_marginal_its_average() -> None:
    generator = np.random.default_rng(0)
    calibrations = np.sort(generator.random((4000, 500)), axis=1)
    pac = calibrations[:, calibration_rank(500, FIVE_PERCENT, PAC) - 1]
    marginal = calibrations[:, calibration_rank(500, FIVE_PERCENT, MARGINAL) - 1]
    # Uniform scores: the threshold is the acceptance it realises. 4,000 runs put 4 standard errors at 1.4 points.
    assert np.mean(pac < 0.95) <= 0.05 + 0.014
    assert marginal.mean() + 4 * marginal.std() / 4000**0.5 >= 0.95
    assert np.mean(marginal < 0.95) > 0.4  # why PAC is the default


def test_the_simultaneous_guarantee_holds_at_every_target_at_once() -> None:
    generator = np.random.default_rng(1)
    targets = [Fraction(t, 100) for t in (60, 70, 80, 90, 95)]
    ranks = [calibration_rank(2000, 1 - t, SIMULTANEOUS) for t in targets]
    calibrations = np.sort(generator.random((1000, 2000)), axis=1)
    broken = np.any([calibrations[:, k - 1] < float(t) for k, t in zip(ranks, targets, strict=True)], axis=0)
    assert broken.mean() <= 0.05 + 4 * (0.05 * 0.95 / 1000) ** 0.5


def test_the_acceptance_interval_is_the_beta_interval() -> None:
    low, high = acceptance_interval(951, 1000)
    assert (low, high) == pytest.approx(stats.beta(951, 50).ppf([0.025, 0.975]))


@pytest.mark.parametrize(
    ("accepted", "total", "interval"),
    [(950, 1000, (0.9346, 0.9627)), (285, 300, (0.919, 0.972)), (0, 10, (0.0, 0.3085)), (10, 10, (0.6915, 1.0))],
)
def test_clopper_pearson(accepted: int, total: int, interval: tuple[float, float]) -> None:
    assert clopper_pearson(accepted, total) == pytest.approx(interval, abs=5e-4)


def test_p_values_of_in_distribution_scores_are_valid() -> None:
    generator = np.random.default_rng(2)
    hits = [p_values(np.sort(generator.random(199)), generator.random(50)) <= 0.05 for _ in range(400)]
    assert np.mean(hits) <= 0.05 + 4 * (0.05 / 400) ** 0.5


def test_scores_that_are_not_numbers_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(CalibrationError):
            sorted_scores(np.array([0.0, bad]))


def test_small_classes_share_a_group_that_is_large_enough() -> None:
    predicted = np.repeat([0, 1, 2, 3], [100, 5, 90, 7])
    groups = class_groups(predicted, 4, minimum=60)
    assert groups == [0, 1, 1, 1]  # 5 + 7 are too few: the smaller of the large classes joins them
    assert class_groups(predicted, 4, minimum=10) == [0, 1, 2, 1]


def test_too_few_tune_images_form_no_group() -> None:
    with pytest.raises(TooFewSamples):
        class_groups(np.zeros(10, dtype=np.int64), 4, minimum=60)


def test_one_image_of_each_group_is_drawn_by_its_id() -> None:
    kept = one_per_group(np.array([5, 3, 9, 1]), ["a", "a", "b", "b"])
    assert kept.tolist() == [1, 3]
