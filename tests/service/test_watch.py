# SPDX-License-Identifier: Apache-2.0
"""What the server knows of its stream: drift tests fed by real verdicts, kept over a restart, shown and reset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from service import Settings
from tests.helpers import encoded, toy_images
from tests.service.conftest import Running, serving
from tests.service.test_admin import BOSS, STRICT, settings
from tests.service.test_verdict import NOISE, assert_problem

NAMES = {"model": "toy", "version": "1"}


def known(n: int, seed: int = 60) -> list[bytes]:
    return [encoded(image) for image in toy_images(n, seed)[0]]


def send(client: httpx.Client, images: Sequence[bytes], source: str = "") -> None:
    headers = {"X-OODGate-Source": source} if source else {}
    for start in range(0, len(images), 64):
        files = [("file", (f"{i}.png", image)) for i, image in enumerate(images[start : start + 64])]
        assert client.post("/v1/verdict", files=files, headers=headers).status_code == 200


def drift(running: Running) -> dict[str, Any]:
    answer: dict[str, Any] = running.client.get("/v1/models/toy/drift").json()
    running.context.watch.refresh()
    group: dict[str, Any] = answer["groups"]["all"]
    return group


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
