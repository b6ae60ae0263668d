# SPDX-License-Identifier: Apache-2.0
"""The drift benchmark on something small, and its committed results against the promises and the page."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.drift import replay, simulate, table
from benchmarks.drift.watch import OURS, RIVALS, alarms_on, delays_on, reference, summary
from tests.helpers import EMBEDDED, ROOT

SIMULATED = json.loads((ROOT / simulate.RESULT).read_text())
REAL = json.loads((ROOT / replay.RESULT).read_text())
CALIBRATION = reference(np.random.default_rng(0).normal(size=1_000))


def test_an_obvious_change_is_found_by_every_test_but_not_before_it_happens() -> None:
    generator = np.random.default_rng(1)
    delays = delays_on(generator.normal(size=1_000), generator.normal(3, 1, 10_000), CALIBRATION, 0)
    found = [delays[name] for name in OURS if not name.endswith("10000")]
    assert all(delay is not None and delay <= 1_000 for delay in found)


def test_a_test_that_alarmed_before_the_change_is_left_out() -> None:
    generator = np.random.default_rng(1)
    delays = delays_on(generator.normal(3, 1, 1_000), generator.normal(size=50), CALIBRATION, 0)
    assert "cusum" not in delays
    assert delays["window_10000"] is None


def test_alarms_are_counted_for_ours_and_the_rivals() -> None:
    counts = alarms_on(np.random.default_rng(1).normal(3, 1, 10_000), CALIBRATION, 0)
    assert set(counts) == {*OURS, *RIVALS}
    assert min(counts.values()) >= 1


def test_quantiles_of_delays_count_what_was_never_found() -> None:
    runs: list[dict[str, int | None]] = [{"cusum": delay} for delay in (100, 200, 300, None)]
    assert summary(runs)["cusum"] == {"runs": 4, "found": 0.75, "median": 200, "within": None}
    assert summary(runs)["exchangeability"]["runs"] == 0


def test_replayed_images_come_once_each_in_the_share_asked_for() -> None:
    known, strange = np.arange(80.0), np.arange(1000.0, 1100.0)
    stream = replay.mixed(np.random.default_rng(0), known, strange, 0.2)
    assert len(set(stream.tolist())) == len(stream) == 100
    assert set(known.tolist()) <= set(stream.tolist())


@pytest.mark.parametrize("part", SIMULATED["false_alarms"], ids=lambda part: f"n={part['n']}")
@pytest.mark.parametrize("name", OURS)
def test_measured_false_alarms_agree_with_the_promise(name: str, part: dict[str, int]) -> None:
    measured, promise = part["tests"][name], SIMULATED["promise"][name]  # type: ignore[index]
    if not name.startswith("window"):
        allowed = table.share_allowed(name, part["images"], promise)
        assert stats.binom.sf(measured["streams_with_alarm"] - 1, part["runs"], allowed) > 0.001
    else:
        assert stats.poisson.sf(measured["alarms"] - 1, promise * part["runs"] * part["images"] / 1e6) > 0.001


def test_at_least_a_million_images_were_simulated() -> None:
    assert sum(part["runs"] * part["images"] for part in SIMULATED["false_alarms"]) >= 1_000_000


def test_the_replay_speaks_of_the_model_that_is_here() -> None:
    assert REAL["model"] == json.loads((EMBEDDED / "manifest.json").read_text())["model_digest"]


@pytest.mark.parametrize("marker", table.parts(SIMULATED, REAL))
def test_the_page_shows_what_was_measured(marker: str) -> None:
    assert table.parts(SIMULATED, REAL)[marker] in (ROOT / "docs" / "drift.md").read_text()
