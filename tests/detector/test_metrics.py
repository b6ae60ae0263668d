# SPDX-License-Identifier: Apache-2.0
"""Every measure against a slow version that follows its definition to the letter."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from detector import metrics
from detector.errors import DataError
from detector.metrics import (
    Scores,
    augrc,
    aupr_id,
    aupr_ood,
    aurc,
    auroc,
    auroc_replicates,
    bootstrap_auroc,
    histogram,
    histogram_edges,
    measures,
    paired_bootstrap,
    percentiles,
    risk_coverage,
    roc,
)

tied = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda values: np.array(values, dtype=np.float64))
judged = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)


def average_precision(positives: Scores, negatives: Scores) -> float:
    area, recall = 0.0, 0.0
    for cut in sorted({*positives, *negatives}, reverse=True):
        found, wrong = (positives >= cut).sum(), (negatives >= cut).sum()
        area += (found / len(positives) - recall) * found / (found + wrong)
        recall = found / len(positives)
    return area


def mean_area(scores: Scores, failures: NDArray[np.bool_], *, generalised: bool) -> float:
    """The area under the curve of one order, averaged over all orders that the scores allow."""
    areas = []
    for order in permutations(range(len(scores))):
        if any(scores[a] > scores[b] for a, b in pairwise(order)):
            continue
        failed = np.concatenate([[0], failures[list(order)].cumsum()])
        if generalised:
            areas.append(np.trapezoid(failed / len(scores), np.arange(len(scores) + 1) / len(scores)))
        else:
            areas.append(np.mean([failed[k] / k for k in range(1, len(scores) + 1)]))
    return float(np.mean(areas))


@given(known=tied, ood=tied)
def test_aupr_sums_precision_over_the_steps_of_recall(known: Scores, ood: Scores) -> None:
    assert aupr_ood(known, ood) == pytest.approx(average_precision(ood, known))
    assert aupr_id(known, ood) == pytest.approx(average_precision(-known, -ood))


def test_aupr_of_a_known_example() -> None:
    known, ood = np.array([0.1, 0.4]), np.array([0.35, 0.8])  # the example of scikit-learn's documentation
    assert aupr_ood(known, ood) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@given(known=tied, ood=tied)
def test_the_area_under_the_roc_is_the_auroc(known: Scores, ood: Scores) -> None:
    flagged, caught = (np.append(0, part) for part in roc(known, ood))
    assert np.trapezoid(caught, flagged) == pytest.approx(auroc(known, ood))
    assert (flagged[-1], caught[-1]) == (1, 1)


@settings(deadline=None)
@given(images=judged)
def test_aurc_and_augrc_are_means_over_the_orders_of_tied_images(images: list[tuple[int, bool]]) -> None:
    scores, failures = np.array([float(s) for s, _ in images]), np.array([wrong for _, wrong in images])
    assert aurc(scores, failures) == pytest.approx(mean_area(scores, failures, generalised=False))
    assert augrc(scores, failures) == pytest.approx(mean_area(scores, failures, generalised=True))


def test_augrc_is_the_closed_form_of_its_paper() -> None:
    generator = np.random.default_rng(0)
    failures = generator.random(500) < 0.2
    scores = generator.integers(0, 40, 500) + 10.0 * failures
    accuracy = 1 - failures.mean()
    expected = (1 - auroc(scores[~failures], scores[failures])) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(scores, failures) == pytest.approx(expected)


def test_the_risk_at_full_coverage_is_the_share_of_failures() -> None:
    coverage, joint = risk_coverage(np.zeros(4), np.array([True, False, False, False]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert (joint / coverage).tolist() == [0.25] * 4  # all tied: no order is better than another


def drawn(size: int, stream: np.random.Generator, n: int) -> NDArray[np.int64]:
    return stream.integers(size, size=(n, size))


def slow_replicates(known: Scores, sets: list[Scores], n: int, seed: int) -> NDArray[np.float64]:
    """Draws images by number and sorts each replicate anew; float64 [sets, n]."""
    streams = np.random.default_rng(seed).spawn(1 + len(sets))
    which, *others = (drawn(len(part), stream, n) for part, stream in zip([known, *sets], streams, strict=True))
    return np.array(
        [[auroc(known[which[i]], part[other[i]]) for i in range(n)] for part, other in zip(sets, others, strict=True)]
    )


def two_scores() -> tuple[Scores, dict[str, Scores], Scores, dict[str, Scores]]:
    generator = np.random.default_rng(1)
    known, ood = generator.normal(size=80), {"a": generator.normal(0.7, 1, 60), "b": generator.normal(1.5, 1, 30)}
    noisy = {name: (values + generator.normal(0, 1, len(values))).round(1) for name, values in ood.items()}
    return known, ood, (known + generator.normal(0, 1, 80)).round(1), noisy


@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_replicates_are_those_of_the_slow_bootstrap(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    known, ood, noisy, noisy_ood = two_scores()
    views = [(known, list(ood.values())), (noisy, list(noisy_ood.values()))]
    fast = auroc_replicates(views, 60, seed=3)
    assert fast.shape == (2, 2, 60)
    for view, replicates in zip(views, fast, strict=True):
        np.testing.assert_allclose(replicates, slow_replicates(*view, 60, 3), atol=1e-12)


def test_the_interval_of_a_mean_and_of_one_set() -> None:
    known, ood, *_ = two_scores()
    slow = slow_replicates(known, list(ood.values()), 300, 0)
    assert bootstrap_auroc(known, ood, n=300) == pytest.approx(percentiles(slow.mean(axis=0)))
    assert bootstrap_auroc(known, ood["a"], n=300) == pytest.approx(percentiles(slow[0]))
    assert bootstrap_auroc(known, ood["a"], n=300) == bootstrap_auroc(known, {"a": ood["a"]}, n=300)
    assert bootstrap_auroc(known, ood["a"], n=300) != bootstrap_auroc(known, ood["a"], n=300, seed=1)


def test_the_paired_difference_is_that_of_the_slow_bootstrap() -> None:
    known, ood, noisy, noisy_ood = two_scores()
    difference, low, high = paired_bootstrap(known, ood, noisy, dict(reversed(noisy_ood.items())), n=300)
    slow = [slow_replicates(*view, 300, 0) for view in ((known, [*ood.values()]), (noisy, [*noisy_ood.values()]))]
    assert (low, high) == pytest.approx(percentiles((slow[0] - slow[1]).mean(axis=0)))
    assert low < difference < high
    means = [np.mean([auroc(i, o[name]) for name in ood]) for i, o in ((known, ood), (noisy, noisy_ood))]
    assert difference == pytest.approx(means[0] - means[1])


def test_pairing_narrows_the_difference_of_two_scores_that_agree() -> None:
    known, ood, *_ = two_scores()
    nudged = {name: values + 0.01 for name, values in ood.items()}
    _, low, high = paired_bootstrap(known, nudged, known, ood)
    alone = bootstrap_auroc(known, ood)
    assert high - low < 0.2 * (alone[1] - alone[0])
    assert paired_bootstrap(known, ood, known, ood, n=20) == (0, 0, 0)


def test_scores_of_other_images_cannot_be_paired() -> None:
    known, ood, *_ = two_scores()
    for other in ({"a": ood["a"]}, ood | {"b": ood["b"][1:]}, {}):
        with pytest.raises(DataError, match="for the same images"):
            paired_bootstrap(known, ood, known, other)
    with pytest.raises(DataError, match="at least one OOD set"):
        paired_bootstrap(known, {}, known, {})


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    truth = 0.5  # the AUROC of two equal distributions
    intervals = [
        bootstrap_auroc(generator.normal(size=60), generator.normal(size=60), n=200, seed=i) for i in range(200)
    ]
    assert 0.88 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99


@pytest.mark.parametrize(("known", "ood"), [([1.0], [1.0]), ([1.0] * 5, [1.0] * 3), ([0.0], [2.0, 3.0])])
def test_one_image_or_a_constant_score_is_no_special_case(known: list[float], ood: list[float]) -> None:
    id_scores, ood_scores = np.array(known), np.array(ood)
    assert all(0 <= value <= 1 for value in measures(id_scores, ood_scores).values())
    low, high = bootstrap_auroc(id_scores, ood_scores, n=10)
    assert low == high == auroc(id_scores, ood_scores)
    assert aurc(id_scores, np.zeros(len(known), dtype=bool)) == 0
    edges = histogram_edges([id_scores, ood_scores], 4)
    assert (np.diff(edges) > 0).all()
    assert histogram(id_scores, edges).sum() == len(known)


def test_a_histogram_counts_every_image_whatever_the_extremes() -> None:
    values = np.concatenate([np.linspace(0, 1, 1_001), [1e30, np.inf, -np.inf]])
    edges = histogram_edges([values], 10)
    assert edges[0] > -0.1
    assert edges[-1] < 1.1
    counts = histogram(values, edges)
    assert counts.sum() == len(values)
    assert histogram(np.array([0.0, 0.1, 1.0]), np.linspace(0, 1, 11)).tolist() == [1, 1, *[0] * 7, 1]
    assert histogram_edges([np.array([np.inf])], 2).tolist() == [-0.5, 0, 0.5]
