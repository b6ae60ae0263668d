# SPDX-License-Identifier: Apache-2.0
"""What the server knows of its stream: drift tests fed by real verdicts, kept over a restart, shown and reset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import Counter

from detector import artifact as artifacts
from service import Settings
from service.drift import OTHER
from tests.helpers import GOOD, encoded, toy_images
from tests.service.conftest import Running, serving
from tests.service.test_admin import BOSS, STRICT, settings
from tests.service.test_verdict import NOISE, assert_problem

NAMES = {"model": "toy", "version": "1"}


def known(n: int, seed: int = 60) -> list[bytes]:
    return [encoded(image) for image in toy_images(n, seed)[0]]


def send(client: httpx.Client, images: Sequence[bytes], source: str = "", model: str = "toy") -> None:
    headers = {"X-OODGate-Source": source} if source else {}
    for start in range(0, len(images), 64):
        files = [("file", (f"{i}.png", image)) for i, image in enumerate(images[start : start + 64])]
        assert client.post(f"/v1/models/{model}/verdict", files=files, headers=headers).status_code == 200


def drift(running: Running, model: str = "toy") -> dict[str, Any]:
    answer: dict[str, Any] = running.client.get(f"/v1/models/{model}/drift").json()
    running.context.watch.refresh()
    group: dict[str, Any] = answer["groups"]["all"]
    return group


def values(counter: Counter, label: str, model: str) -> set[str]:
    """Of a label, that have a series of this model."""
    samples = [sample for family in counter.collect() for sample in family.samples]
    return {sample.labels[label] for sample in samples if sample.labels["model"] == model}


@pytest.fixture
def two_models(models: Path) -> Path:
    other = artifacts.load(models / "toy" / "1")
    other.manifest = other.manifest.model_copy(update={"name": "other"})
    artifacts.save(other, models / "other" / "1")
    return models


def test_every_series_exists_before_the_first_image(toy_models: Path, tmp_path: Path) -> None:
    with serving(settings(toy_models, tmp_path)) as running:
        for test in ("window_1000", "window_10000", "cusum", "exchangeability", "deferral_rate"):
            assert running.metric("oodgate_drift_alarm", test=test, **NAMES) == 0
        assert 0 < running.metric("oodgate_control_limit_ratio", window="1000", bound="upper", **NAMES) < 1
        assert running.metric("oodgate_drift_cusum", **NAMES) == 0


def test_known_images_raise_no_alarm_and_strange_ones_do(toy_models: Path, tmp_path: Path) -> None:
    with serving(settings(toy_models, tmp_path)) as running:
        send(running.client, known(300))
        quiet = drift(running)
        assert (quiet["images"], any(quiet["alarms"].values())) == (300, False)
        send(running.client, [NOISE] * 300)
        loud = drift(running)
        assert loud["images"] == 600
        assert all(loud["alarms"][test] for test in ("cusum", "exchangeability", "deferral_rate"))
        assert running.metric("oodgate_drift_alarm", test="cusum", **NAMES) == 1
        assert running.metric("oodgate_drift_evidence_log10", test="deferral_rate", **NAMES) > 2.3


def test_what_the_tests_know_outlives_a_restart_and_not_another_policy(toy_models: Path, tmp_path: Path) -> None:
    with serving(settings(toy_models, tmp_path)) as running:
        send(running.client, known(200))
        before = drift(running)
    with serving(settings(toy_models, tmp_path)) as running:
        assert drift(running) == before
        assert running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS).status_code == 200
        assert drift(running)["images"] == 0


def test_what_the_tests_know_is_kept_before_anything_that_may_take_long(toy_models: Path, tmp_path: Path) -> None:
    kept: list[bool] = []
    with serving(settings(toy_models, tmp_path)) as running:
        registry, close = running.context.registry, running.context.registry.close

        def slowly() -> None:
            kept.append((tmp_path / "drift" / "toy.json").exists())
            close()

        registry.close = slowly  # type: ignore[method-assign]
        assert not (tmp_path / "drift" / "toy.json").exists()
    assert kept == [True]


def test_only_the_admin_resets_and_the_alarm_is_gone(toy_models: Path, tmp_path: Path) -> None:
    with serving(settings(toy_models, tmp_path)) as running:
        send(running.client, [NOISE] * 200)
        assert drift(running)["alarms"]["cusum"]
        assert_problem(running.client.post("/v1/models/toy/drift/reset"), 403, "admin_only")
        one = running.client.post("/v1/models/toy/drift/reset", json={"test": "cusum"}, headers=BOSS).json()
        alarms = one["groups"]["all"]["alarms"]
        assert (alarms["cusum"], alarms["exchangeability"]) == (False, True)
        running.client.post("/v1/models/toy/drift/reset", headers=BOSS)
        assert (drift(running)["images"], any(drift(running)["alarms"].values())) == (0, False)
        wrong = running.client.post("/v1/models/toy/drift/reset", json={"test": "nonsense"}, headers=BOSS)
        assert_problem(wrong, 400, "malformed_request")


def test_a_reset_that_cannot_be_remembered_changes_nothing(toy_models: Path, tmp_path: Path) -> None:
    (tmp_path / "drift").write_text("a file where a folder should be")
    with serving(settings(toy_models, tmp_path)) as running:
        send(running.client, [NOISE] * 200)
        before = drift(running)
        assert before["alarms"]["cusum"]
        refused = running.client.post("/v1/models/toy/drift/reset", headers=BOSS)
        assert_problem(refused, 500, "state_unwritable")
        assert drift(running) == before
        assert running.metric("oodgate_drift_alarm", test="cusum", **NAMES) == 1
    assert "drift_reset" not in (tmp_path / "audit" / "audit.jsonl").read_text()


def test_decisions_are_counted_by_class_and_by_source_with_few_labels(toy_models: Path, tmp_path: Path) -> None:
    with serving(settings(toy_models, tmp_path, source_labels=2)) as running:
        for source in ("door", "yard", "gate-3", "bad source!"):
            send(running.client, [NOISE] * 3, source)
        counted = {
            source: running.metric("oodgate_source_decisions_total", source=source, decision="defer", **NAMES)
            for source in ("door", "yard", "other")
        }
        assert counted == {"door": 3, "yard": 3, "other": 6}
        label = running.client.post("/v1/verdict", content=NOISE, headers={"content-type": "image/png"}).json()
        name = label["prediction"]["label"]
        assert running.metric("oodgate_class_decisions_total", label=name, decision="defer", **NAMES) == 13


def test_a_burst_counts_once_for_the_drift_tests(toy_models: Path, tmp_path: Path) -> None:
    with serving(settings(toy_models, tmp_path, thin_s=3600)) as running:
        send(running.client, known(50), "camera-1")
        send(running.client, known(50), "camera-2")
        assert drift(running)["images"] == 2


def test_a_camera_that_asks_two_models_in_turn_counts_for_the_drift_tests_of_both(
    two_models: Path, tmp_path: Path
) -> None:
    with serving(settings(two_models, tmp_path / "state", thin_s=3600)) as running:
        for image in known(3):
            for model in ("toy", "other"):
                send(running.client, [image], "camera", model)
        assert [drift(running, model)["images"] for model in ("toy", "other")] == [1, 1]


def test_a_source_that_one_model_knows_takes_no_label_at_another(two_models: Path, tmp_path: Path) -> None:
    with serving(settings(two_models, tmp_path / "state", source_labels=1)) as running:
        for model in ("toy", "other"):
            send(running.client, [GOOD], "door", model)
        send(running.client, [GOOD] * 5, "yard", "toy")  # displaces the door there
        send(running.client, [GOOD], "yard", "other")
        sources = running.context.metrics.source_decisions
        assert values(sources, "source", "toy") == {"yard", OTHER}
        assert values(sources, "source", "other") == {"door", OTHER}


def test_another_policy_adds_no_labels(toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.watch.CLASS_LABELS", 1)
    images, labels = toy_images(40, 60)
    red, green = (encoded(images[labels == label][0]) for label in (0, 1))
    with serving(settings(toy_models, tmp_path, source_labels=1)) as running:
        send(running.client, [red], "door")
        assert running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS).status_code == 200
        send(running.client, [green], "yard")
        assert values(running.context.metrics.class_decisions, "label", "toy") == {"red", OTHER}
        assert values(running.context.metrics.source_decisions, "source", "toy") == {"door", OTHER}


def test_a_damaged_drift_state_costs_its_memory_and_no_more(toy_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drift"
    folder.mkdir()
    for content in ("{half", "[]", '{"all": {"version": 99}}', '{"all": 5}'):
        (folder / "toy.json").write_text(content)
        with serving(settings(toy_models, tmp_path)) as running:
            assert drift(running)["images"] == 0


def test_the_stretch_in_which_images_come_changes_nothing(toy_models: Path, tmp_path: Path) -> None:
    images = known(150)
    found = []
    for part in (1, 64):
        with serving(Settings(models=toy_models, state_dir=tmp_path / str(part), audit=False)) as running:
            for start in range(0, len(images), part):
                send(running.client, images[start : start + part])
            found.append(drift(running))
    assert found[0]["deferred"] == found[1]["deferred"]
    assert np.isclose(found[0]["cusum"]["value"], found[1]["cusum"]["value"])
