# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from detector.calibration import Guarantee, Threshold, acceptance_interval, mixed_acceptance_interval
from detector.errors import CalibrationError, TooFewSamples
from detector.policy import DOUBT, CalibrationScores, Decider, Grouping, Policy, doubt

NAMES = ("cat", "dog", "owl")
N = 1000


def calibration(grouping: Grouping | None = None, seed: int = 0) -> CalibrationScores:
    generator = np.random.default_rng(seed)
    predicted = generator.integers(0, 3, N)
    scores = {name: generator.random(N) for name in ("grood", "grood_norm", DOUBT)}
    return CalibrationScores.build(grouping or Grouping.single(3), scores, predicted)


def logits(n: int, seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["pac", "marginal", "simultaneous"])
def test_decision_threshold_and_p_value_agree(kind: str) -> None:
    policy = Policy(guarantee=Guarantee.model_validate({"kind": kind}))
    decider = Decider(policy, calibration(), NAMES)
    on_the_edge = decider.thresholds[0].value
    scores = np.concatenate([[on_the_edge, np.nextafter(on_the_edge, 2), -5.0, 5.0], np.linspace(0, 1, 300)])
    for verdict in decider.decide(logits(len(scores)), {"grood": scores}):
        ood = verdict.ood
        assert (verdict.decision == "defer") == (ood.p_value <= ood.p_cutoff) == (ood.score > ood.threshold)
        assert verdict.reason == ("ood" if verdict.decision == "defer" else "none")


def test_the_prediction_is_the_networks_own() -> None:
    values = torch.tensor([[0.0, 2.0, 1.0]])
    verdict = Decider(Policy(), calibration(), NAMES).decide(values, {"grood": np.array([0.1])})[0]
    assert (verdict.prediction.index, verdict.prediction.label) == (1, "dog")
    assert verdict.prediction.confidence == pytest.approx(float(torch.softmax(values, 1)[0, 1]))


def test_both_defer_reasons_share_one_budget() -> None:
    policy = Policy(guarantee=Guarantee(kind="marginal"), alpha_conf=0.02)
    decider = Decider(policy, calibration(), NAMES)
    assert decider.doubt_thresholds is not None
    assert decider.thresholds[0].p_cutoff <= Fraction(3, 100)
    assert decider.doubt_thresholds[0].p_cutoff <= Fraction(2, 100)


def test_total_deferral_keeps_the_promise_with_two_reasons() -> None:
    generator = np.random.default_rng(7)
    missed = 0
    policy = Policy(alpha_conf=0.02)
    for _ in range(200):
        values = {name: generator.random(400) for name in ("grood", DOUBT)}
        scores = CalibrationScores.build(Grouping.single(3), values, np.zeros(400, dtype=np.int64))
        decider = Decider(policy, scores, NAMES)
        assert decider.doubt_thresholds is not None
        # Independent uniform scores: the realised acceptance is the product of the two thresholds.
        missed += decider.thresholds[0].value * decider.doubt_thresholds[0].value < 0.95
    assert missed <= 0.05 * 200 + 4 * (0.05 * 0.95 * 200) ** 0.5


def test_an_unsure_image_is_deferred_for_low_confidence() -> None:
    decider = Decider(Policy(alpha_conf=0.02), calibration(), NAMES)
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    verdicts = decider.decide(torch.cat([sure, unsure]), {"grood": np.array([0.1, 0.1])})
    assert [verdict.reason for verdict in verdicts] == ["none", "low_confidence"]
    assert float(doubt(unsure)[0]) == pytest.approx(np.log(3))


def test_a_confidence_budget_that_leaves_nothing_for_ood_is_refused() -> None:
    with pytest.raises(CalibrationError, match="leaves nothing"):
        Decider(Policy(alpha_conf=0.05), calibration(), NAMES)


def test_a_class_is_judged_by_its_own_group() -> None:
    grouping = Grouping.by_class([0, 1, 1], NAMES)
    assert grouping.names == ("cat", "other")
    scores = np.concatenate([np.linspace(0, 1, 500), np.linspace(10, 11, 500)])
    predicted = np.repeat([0, 2], 500)
    both = CalibrationScores.build(grouping, {"grood": scores, DOUBT: scores}, predicted)
    decider = Decider(Policy(), both, NAMES)
    as_cat, as_owl = torch.tensor([[5.0, 0, 0]]), torch.tensor([[0, 0, 5.0]])
    cat, owl = decider.decide(torch.cat([as_cat, as_owl]), {"grood": np.array([5.0, 5.0])})
    assert (cat.decision, cat.ood.group) == ("defer", "cat")
    assert (owl.decision, owl.ood.group) == ("accept", "other")
    assert owl.ood.p_value == 1.0


def test_every_group_takes_its_share_of_delta() -> None:
    single = Decider(Policy(), calibration(), NAMES)
    grouped = Decider(Policy(), calibration(Grouping.by_class([0, 1, 2], NAMES)), NAMES)
    assert all(cut.p_cutoff < single.thresholds[0].p_cutoff for cut in grouped.thresholds)


def test_a_group_too_small_for_the_guarantee_is_named() -> None:
    grouping = Grouping.by_class([0, 1, 1], NAMES)
    values = {name: np.linspace(0, 1, 520) for name in ("grood", DOUBT)}
    few = CalibrationScores.build(grouping, values, np.repeat([1, 0], [500, 20]))
    with pytest.raises(TooFewSamples, match="group 'cat'"):
        Decider(Policy(), few, NAMES)


def test_shadows_are_reported_and_decide_nothing() -> None:
    decider = Decider(Policy(), calibration(), NAMES, shadows=["grood", "grood_norm"])
    verdict = decider.decide(logits(1), {"grood": np.array([0.1]), "grood_norm": np.array([99.0])})[0]
    assert verdict.decision == "accept"
    assert verdict.ood.shadow.keys() == {"grood_norm"}
    assert verdict.ood.shadow["grood_norm"].p_value == pytest.approx(1 / (N + 1))


def test_a_score_near_the_threshold_is_marked_borderline() -> None:
    decider = Decider(Policy(), calibration(), NAMES, tolerances={"grood": 0.01})
    edge = decider.thresholds[0].value
    near, far = decider.decide(logits(2), {"grood": np.array([edge + 0.005, edge + 0.5])})
    assert (near.ood.borderline, far.ood.borderline) == (True, False)


def test_a_confidence_near_its_threshold_is_borderline_too() -> None:
    decider = Decider(Policy(alpha_conf=0.02), calibration(), NAMES, tolerances={DOUBT: 1e-6})
    assert decider.doubt_thresholds is not None
    rest = np.expm1(decider.doubt_thresholds[0].value) / 2  # of two classes, whose doubt is log(1 + 2 rest)
    values = torch.tensor([[0.0, np.log(rest * change), np.log(rest * change)] for change in (1 - 1e-7, 1 + 1e-7, 0.9)])
    below, above, sure = decider.decide(values.double(), {"grood": np.full(3, 0.1)})
    assert (below.decision, above.decision, sure.decision) == ("accept", "defer", "accept")
    assert (below.ood.borderline, above.ood.borderline, sure.ood.borderline) == (True, True, False)


def test_an_image_between_two_classes_of_other_groups_is_borderline() -> None:
    decider = Decider(Policy(), calibration(Grouping.by_class([0, 1, 1], NAMES)), NAMES, tolerances={DOUBT: 1e-6})
    values = torch.tensor([[5.0, 5.0 + 1e-6, 0], [0, 5.0, 5.0 + 1e-6], [5.0, 4.9, 0]], dtype=torch.float64)
    verdicts = decider.decide(values, {"grood": np.full(3, 0.1)})
    assert [verdict.ood.borderline for verdict in verdicts] == [True, False, False]


def test_a_score_that_is_no_finite_number_defers_its_own_image_alone() -> None:
    decider = Decider(Policy(), calibration(), NAMES)
    *odd, sound = decider.decide(logits(4), {"grood": np.array([np.nan, np.inf, -np.inf, 0.1])})
    for verdict in odd:
        assert (verdict.decision, verdict.reason, verdict.ood.sound) == ("defer", "ood", False)
        assert verdict.ood.p_value == pytest.approx(1 / (N + 1))
    assert (sound.decision, sound.ood.sound) == ("accept", True)


def test_an_unknown_score_is_refused_with_those_there_are() -> None:
    with pytest.raises(CalibrationError, match="grood, grood_norm"):
        Decider(Policy(score_name="magic"), calibration(), NAMES)


def test_the_expected_acceptance_counts_both_reasons_and_all_groups() -> None:
    one = Decider(Policy(), calibration(), NAMES).expected_acceptance()
    cut = Decider(Policy(), calibration(), NAMES).thresholds[0]
    assert one == acceptance_interval(cut.rank, cut.n)
    both = Decider(Policy(alpha_conf=0.025), calibration(), NAMES)
    low, high = both.expected_acceptance()
    assert low < acceptance_interval(both.thresholds[0].rank, both.thresholds[0].n)[0]
    assert high <= acceptance_interval(both.thresholds[0].rank, both.thresholds[0].n, 0.975)[1]


def test_the_mean_of_groups_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = (Threshold(0.25, 477, 500), Threshold(0.5, 951, 1000))
    first = mixed_acceptance_interval(cuts)
    monkeypatch.delattr(np.random, "default_rng")
    assert mixed_acceptance_interval(tuple(Threshold(cut.value, cut.rank, cut.n) for cut in cuts)) == first


def test_the_mean_of_groups_varies_less_than_one_of_them() -> None:
    cut = Threshold(0.0, 477, 500)
    alone, together = mixed_acceptance_interval((cut,)), mixed_acceptance_interval((cut,) * 10)
    assert alone[0] < together[0] < together[1] < alone[1]
    assert sum(together) / 2 == pytest.approx(477 / 501, abs=1e-3)
