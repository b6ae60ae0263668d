# SPDX-License-Identifier: Apache-2.0
"""The drift tests together: alarms come and go, state survives, batches do not matter, sources stay few."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from detector.calibration import Scores
from service.drift import OTHER, TESTS, Drift, DriftOptions, Reference, TestName, Thin, TopK
from service.errors import DriftStateMismatch

N, RANK = 2_000, 1_917
SCORES = np.sort(np.random.default_rng(0).normal(size=N))
REFERENCE = Reference(SCORES, RANK, "sha256:model", "grood", 0.95)
OPTIONS = DriftOptions(windows=(500, 2_000))


def feed(drift: Drift, scores: Scores, size: int = 32) -> None:
    for start in range(0, len(scores), size):
        part = scores[start : start + size]
        drift.update(part, part > SCORES[RANK - 1])


def known(images: int, seed: int) -> Scores:
    return np.random.default_rng([seed, 1]).normal(size=images)


def strange(images: int, share: float, seed: int) -> Scores:
    generator = np.random.default_rng([seed, 2])
    return generator.normal(size=images) + 2 * (generator.random(images) < share)


def test_every_test_finds_ood_images_and_every_alarm_clears_when_they_are_gone() -> None:
    drift = Drift(REFERENCE, OPTIONS)
    feed(drift, known(2_000, 0))
    assert not any(drift.snapshot().alarms.values())
    feed(drift, strange(4_000, 0.3, 0))
    assert all(drift.snapshot().alarms.values())
    assert all(window.ood_share_lower and window.ood_share_lower < 0.3 for window in drift.snapshot().windows)
    feed(drift, known(16_000, 1))
    assert not any(drift.snapshot().alarms.values())


def test_the_exchangeability_test_also_finds_scores_that_became_too_ordinary() -> None:
    drift = Drift(REFERENCE, OPTIONS)
    feed(drift, known(4_000, 0) - 0.5)
    assert drift.snapshot().alarms["exchangeability"]


def test_the_exchangeability_alarm_stands_as_long_as_the_stream_differs() -> None:
    drift = Drift(REFERENCE, OPTIONS)
    feed(drift, known(2_000, 0))
    standing = []
    for part in np.split(strange(20_000, 0.2, 0), 20):
        feed(drift, part)
        standing.append(drift.snapshot().alarms["exchangeability"])
    assert all(standing[1:])


@pytest.mark.parametrize("test", TESTS)
def test_a_reset_of_one_test_leaves_the_others(test: TestName) -> None:
    drift = Drift(REFERENCE, OPTIONS)
    feed(drift, strange(4_000, 0.3, 0))
    before = drift.snapshot().alarms
    drift.reset(test)
    after = drift.snapshot().alarms
    belongs = {name: name.startswith("window_") if test == "windows" else name == test for name in before}
    assert after == {name: not belongs[name] for name in before}
    assert drift.snapshot().images == 4_000


def test_a_reset_of_everything_is_as_new_but_for_the_random_numbers() -> None:
    drift = Drift(REFERENCE, OPTIONS)
    feed(drift, strange(1_000, 0.3, 0))
    drift.reset()
    state, fresh = drift.state()["state"], Drift(REFERENCE, OPTIONS).state()["state"]
    assert state.pop("drawn") == 1_000
    assert fresh.pop("drawn") == 0
    assert state == fresh


def test_a_reset_of_no_test_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no drift test 'page'; there are all, windows"):
        Drift(REFERENCE).reset("page")  # type: ignore[arg-type]


def test_a_state_restored_in_mid_stream_goes_on_as_if_nothing_had_happened() -> None:
    scores = np.concatenate([known(1_234, 0), strange(1_777, 0.1, 0)])
    whole = Drift(REFERENCE, OPTIONS, seed=7)
    feed(whole, scores)
    first = Drift(REFERENCE, OPTIONS, seed=7)
    feed(first, scores[:1_500])
    stored = json.loads(json.dumps(first.state()))
    feed(first, known(100, 9))  # what is stored does not move with the original
    second = Drift.from_state(stored, REFERENCE, OPTIONS)
    feed(second, scores[1_500:])
    assert second.state() == whole.state()
    assert second.snapshot() == whole.snapshot()


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 900), max_size=8))
def test_batches_do_not_matter(cuts: list[int]) -> None:
    scores = np.concatenate([np.round(known(200, 3), 1), strange(200, 0.7, 3), known(500, 4)])
    one, many = Drift(REFERENCE, OPTIONS), Drift(REFERENCE, OPTIONS)
    feed(one, scores, len(scores))
    for part in np.split(scores, sorted(cuts)):
        many.update(part, part > SCORES[RANK - 1])
    assert many.state() == one.state()
    now = one.snapshot().exchangeability
    assert now.alarms >= 1  # it came and went on the way
    assert not now.alarm


def test_the_state_does_not_grow_with_the_stream() -> None:
    drift = Drift(REFERENCE)
    feed(drift, known(64, 0))
    small = len(json.dumps(drift.state()))
    feed(drift, known(20_000, 0), 1_000)
    assert len(json.dumps(drift.state())) < small + 2_000 < 20_000


def test_scores_and_decisions_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        Drift(REFERENCE).update(np.zeros(3), np.zeros(2, dtype=bool))


@pytest.mark.parametrize(
    ("reason", "reference", "options"),
    [
        ("model", replace(REFERENCE, model_digest="sha256:other"), OPTIONS),
        ("score", replace(REFERENCE, score_name="knn"), OPTIONS),
        ("group", replace(REFERENCE, group="cat"), OPTIONS),
        ("target", replace(REFERENCE, target_id_acceptance=0.9), OPTIONS),
        ("rank", replace(REFERENCE, rank=RANK - 1), OPTIONS),
        ("calibration", replace(REFERENCE, scores=SCORES + 1), OPTIONS),
        ("options", REFERENCE, replace(OPTIONS, run_length=1e5)),
    ],
)
def test_a_state_of_something_else_is_refused_by_name(reason: str, reference: Reference, options: DriftOptions) -> None:
    stored = Drift(REFERENCE, OPTIONS).state()
    with pytest.raises(DriftStateMismatch, match=f"another {reason}") as refusal:
        Drift.from_state(stored, reference, options)
    assert refusal.value.reason == reason


def test_a_state_of_another_release_is_refused_by_name() -> None:
    with pytest.raises(DriftStateMismatch, match="version 0") as refusal:
        Drift.from_state(Drift(REFERENCE).state() | {"version": 0}, REFERENCE)
    assert refusal.value.reason == "version"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("state",), None),
        (("state", "images"), -1),
        (("state", "images"), "3"),
        (("state", "windows"), []),
        (("state", "windows", 0, "hits"), 10_000),
        (("state", "windows", 0, "last"), 10_000),
        (("state", "cusum", "value"), 10**9),
        (("state", "exchangeability", "weights"), [1, 2, 3]),
        (("state", "exchangeability", "weights", 0), 99),
        (("state", "exchangeability", "capital", "bets", 0), -1.0),
        (("state", "exchangeability", "capital", "bets", 0), float("nan")),
        (("state", "deferral_rate", "bets"), [1.0]),
        (("state", "surplus"), 1),
        (("of",), {}),
        (("of",), None),
    ],
)
def test_a_damaged_state_is_refused(path: tuple[str | int, ...], value: Any) -> None:
    stored: Any = deepcopy(Drift(REFERENCE, OPTIONS).state())
    place = stored
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(DriftStateMismatch) as refusal:
        Drift.from_state(stored, REFERENCE, OPTIONS)
    assert refusal.value.reason == "damaged"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_image_of_a_source_is_kept_in_each_interval() -> None:
    clock = Clock()
    thin = Thin(10, clock)
    assert [thin.keep("a"), thin.keep("a"), thin.keep("b")] == [True, False, True]
    clock.now = 9.9
    assert not thin.keep("a")
    clock.now = 10.0
    assert [thin.keep("a"), thin.keep("a")] == [True, False]


def test_a_full_table_keeps_no_newcomer_until_an_interval_ends() -> None:
    clock = Clock()
    thin = Thin(10, clock, capacity=2)
    assert thin.keep("a")
    clock.now = 5
    assert thin.keep("b")
    assert not thin.keep("c")
    clock.now = 10
    assert [thin.keep("c"), thin.keep("a")] == [True, False]
    clock.now = 15
    assert thin.keep("a")


def test_the_first_k_names_keep_their_own_label() -> None:
    top = TopK(2)
    assert [top.label(name) for name in "abcab"] == [("a", None), ("b", None), (OTHER, None), ("a", None), ("b", None)]


def test_a_name_seen_twice_as_often_takes_the_label_of_the_rarest() -> None:
    top = TopK(2)
    for name in "aaab":
        top.label(name)
    assert [top.label("c") for _ in range(4)] == [(OTHER, None), (OTHER, None), ("c", "b"), ("c", None)]
    assert top.labels == ("a", "c")


def test_names_seen_once_never_take_a_label_from_a_frequent_one() -> None:
    top = TopK(2, tracked=4)
    taken = Counter(top.label("camera" if i % 3 == 0 else f"forged{i}")[0] for i in range(3_000))
    assert taken["camera"] == 1_000
    assert len(top._counts) <= 4


def test_the_most_frequent_names_end_with_labels_in_a_skewed_stream() -> None:
    generator = np.random.default_rng(0)
    names = [f"s{i // 100 if i < 300 else i}" for i in generator.integers(0, 1_000, 20_000)]
    top, again = TopK(3), TopK(3)
    labels = [top.label(name) for name in names]
    assert labels == [again.label(name) for name in names]
    assert set(top.labels) == {"s0", "s1", "s2"}
