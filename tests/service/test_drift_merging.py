# SPDX-License-Identifier: Apache-2.0
"""Replicas together: what is merged says what one replica would that had seen it all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from detector import Detector
from detector.artifact import read_manifest
from detector.calibration import Scores
from service.cli.drift import drift as command
from service.drift import Drift, DriftOptions, Reference, control_limits, merged
from service.watch import references

RANK, N = 951, 1_000
SCORES = np.sort(np.random.default_rng(0).normal(size=N))
REFERENCE = Reference(SCORES, RANK, "sha256:model", "grood", 0.95)
OPTIONS = DriftOptions(windows=(500, 2_000))


def watched(scores: Scores, reference: Reference = REFERENCE) -> Drift:
    drift = Drift(reference, OPTIONS)
    drift.update(scores, scores > SCORES[RANK - 1])
    return drift


def stream(images: int, seed: int, ood: float = 0.0) -> Scores:
    generator = np.random.default_rng([seed, 1])
    return generator.normal(size=images) + 3 * (generator.random(images) < ood)


def test_windows_of_replicas_add_up_to_one_of_their_common_size() -> None:
    parts = [stream(500, seed) for seed in range(4)]
    together = merged([watched(part) for part in parts])
    (window,) = together.windows  # none has 2,000 images
    assert window.deferred == watched(np.concatenate(parts)).snapshot().windows[1].deferred == together.deferred
    assert (window.size, window.images, together.images, together.replicas) == (500, 2_000, 2_000, 4)
    low, high = control_limits(REFERENCE, 2_000, 0.5e-6 / 2 * 2_000)
    assert (window.lower, window.upper) == (low / 2_000, high / 2_000)
    assert not window.alarm


def test_one_replica_merged_is_itself() -> None:
    drift = watched(stream(2_000, 5, ood=0.1))
    alone, together = drift.snapshot(), merged([drift])
    assert [(w.deferred, w.lower, w.upper, w.alarm, w.ood_share_lower) for w in together.windows] == [
        (w.deferred, w.lower, w.upper, w.alarm, w.ood_share_lower) for w in alone.windows
    ]
    assert together.evidence_log10 == pytest.approx(alone.deferral_rate.evidence_log10)


def test_the_mean_of_capitals_alarms_when_all_replicas_see_ood_images_and_not_before() -> None:
    quiet = merged([watched(stream(2_000, seed)) for seed in range(4)])
    loud = merged([watched(stream(2_000, seed, ood=0.3)) for seed in range(4)])
    assert not quiet.alarm
    assert loud.alarm
    assert loud.windows[1].ood_share_lower > 0.1


def test_a_mean_of_capitals_alarms_falsely_no_more_often_than_promised() -> None:
    alarms = sum(merged([watched(stream(500, 10 * run + seed)) for seed in range(3)]).alarm for run in range(100))
    assert alarms <= 3  # of 100; 0.01 each is promised


def test_replicas_of_different_policies_are_not_merged() -> None:
    other = replace(REFERENCE, rank=RANK - 1)
    with pytest.raises(ValueError, match="only replicas of one model"):
        merged([watched(stream(10, 1)), watched(stream(10, 2), other)])
    with pytest.raises(ValueError, match="only replicas of one model"):
        merged([])


@pytest.fixture
def states(toy: Path, tmp_path: Path) -> list[str]:
    """State folders of two replicas of the toy model, each with 1,000 images."""
    detector = Detector.load(toy, device="cpu", precision="fp32")
    folders = []
    for number in range(2):
        stored = {}
        for reference in references(detector.manifest, detector.decider):
            drift = Drift(reference)
            drift.update(scores := np.full(1_000, reference.scores[0]), scores > reference.scores[-1])
            stored[reference.group] = drift.state()
        folders.append(tmp_path / f"replica-{number}")
        (folders[-1] / "drift").mkdir(parents=True)
        (folders[-1] / "drift" / f"{detector.manifest.name}.json").write_text(json.dumps(stored))
    return [str(folder) for folder in folders]


def test_the_command_merges_the_folders_of_replicas(toy: Path, states: list[str]) -> None:
    result = CliRunner().invoke(command, [str(toy), *states, "--json"])
    assert result.exit_code == 0, result.output
    (status,) = json.loads(result.output).values()
    assert (status["replicas"], status["images"], status["windows"][0]["images"]) == (2, 2_000, 2_000)
    told = CliRunner().invoke(command, [str(toy), *states]).output
    assert "0 of 2,000 images deferred, 2 replicas" in told


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_folder_without_a_drift_state_is_named(content: str, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "drift").mkdir()
    (tmp_path / "drift" / f"{read_manifest(toy).name}.json").write_text(content)
    result = CliRunner().invoke(command, [str(toy), str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no drift state" in result.output
