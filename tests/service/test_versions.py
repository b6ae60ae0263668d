# SPDX-License-Identifier: Apache-2.0
"""Versions changed while serving: swaps, refusals and their reasons, what outlives a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from detector import Detector, artifact as artifacts
from detector.artifact import MANIFEST, SCORES
from service.versions import newest_versions
from tests.helpers import GOOD
from tests.service.conftest import Running, serving
from tests.service.test_admin import BOSS, add_version, load, settings
from tests.service.test_verdict import NOISE, assert_problem, post


def add_broken(models: Path, number: int) -> Path:
    """A version whose scores are cut short."""
    directory = add_version(models, number)
    (directory / SCORES).write_bytes((directory / SCORES).read_bytes()[:-1])
    return directory


def unload(client: httpx.Client) -> httpx.Response:
    return client.post("/v2/repository/models/toy/unload", headers=BOSS)


def served(running: Running) -> str:
    version: str = post(running.client, GOOD).json()["model"]["version"]
    return version


def reasons(running: Running) -> dict[str, str]:
    """Why each version on disk could not be loaded, as the index says."""
    return {entry["version"]: entry["reason"] for entry in running.client.post("/v2/repository/index").json()}


def test_a_new_version_takes_over_without_losing_or_mixing_an_answer(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state", audit=False)) as running, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, running.client, GOOD if i % 2 else NOISE) for i in range(120)]
        add_version(models, 2)
        assert load(running.client).json()["version"] == "2"
        asked += [pool.submit(post, running.client, GOOD if i % 2 else NOISE) for i in range(120)]
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 240
    assert [answer.json()["decision"] for answer in answers] == ["defer", "accept"] * 120
    assert {answer.json()["model"]["version"] for answer in answers[:8] + answers[-8:]} == {"1", "2"}
    assert {answer.json()["model"]["version"] for answer in answers[120:]} == {"2"}


def test_a_version_that_cannot_be_served_leaves_the_old_one_and_says_why(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        add_broken(models, 2)
        assert_problem(load(running.client), 422, "artifact_corrupt")
        card = running.client.get("/v1/models/toy").json()
        assert (card["version"], card["failed_update"]["version"]) == ("1", "2")
        assert SCORES in card["failed_update"]["detail"]
        index = running.client.post("/v2/repository/index").json()
        assert [(entry["version"], entry["state"]) for entry in index] == [("1", "READY"), ("2", "UNAVAILABLE")]
        assert SCORES in index[1]["reason"]
        assert post(running.client, GOOD).status_code == 200
        assert running.metric("oodgate_model_loads_total", result="failure") == 1
        assert running.metric("oodgate_model_ready", model="toy", version="1") == 1


def test_a_start_serves_the_newest_version_that_is_whole(models: Path, tmp_path: Path) -> None:
    add_version(models, 2)
    for number in (3, 4):
        add_broken(models, number)
    with serving(settings(models, tmp_path / "state")) as running:
        card = running.client.get("/v1/models/toy").json()
        assert (card["version"], card["failed_update"]["version"]) == ("2", "4")
        assert SCORES in card["failed_update"]["detail"]
        assert SCORES in reasons(running)["3"]
        assert post(running.client, GOOD).status_code == 200


def test_an_older_version_can_be_named_and_an_unknown_one_is_a_404(models: Path, tmp_path: Path) -> None:
    add_version(models, 2)
    with serving(settings(models, tmp_path / "state")) as running:
        assert post(running.client, GOOD).json()["model"]["version"] == "2"
        assert load(running.client, "1").json()["version"] == "1"
        assert post(running.client, GOOD).json()["model"]["version"] == "1"
        assert running.context.metrics.registry.get_sample_value(
            "oodgate_model_ready", {"model": "toy", "version": "2"}
        ) is None  # fmt: skip
        assert_problem(load(running.client, "9"), 404, "model_not_found")
        assert_problem(load(running.client, "../../etc"), 404, "model_not_found")


def test_unloading_the_last_model_makes_the_server_not_ready_until_one_is_loaded(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        gone = unload(running.client)
        assert gone.json() == {"name": "toy", "state": "UNAVAILABLE"}
        assert running.client.get("/v2/health/ready").status_code == 503
        assert running.client.get("/v2/health/live").status_code == 200
        nothing = post(running.client, GOOD)
        assert_problem(nothing, 404, "model_not_found")
        assert nothing.json()["detail"].startswith("no model is loaded")
        assert load(running.client).status_code == 200
        assert post(running.client, GOOD).status_code == 200


def test_an_older_version_that_was_chosen_stays_after_a_restart_until_the_newest_is_loaded(
    models: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    add_version(models, 2)
    with serving(settings(models, state)) as running:
        assert load(running.client, "1").status_code == 200
    with serving(settings(models, state)) as running:
        assert served(running) == "1"
        assert running.client.get("/v1/models/toy").json()["failed_update"] is None
        assert load(running.client, "2").status_code == 200
    with serving(settings(models, state)) as running:
        assert served(running) == "2"
    audited = [json.loads(line) for line in (state / "audit" / "audit.jsonl").read_text().splitlines()]
    loads = [(line["caller"], line["version"], line["pinned"]) for line in audited if line["event"] == "load"]
    assert loads == [("admin", "1", True), ("admin", "2", False)]


def test_an_unload_releases_the_version_that_was_chosen(models: Path, tmp_path: Path) -> None:
    add_version(models, 2)
    with serving(settings(models, tmp_path / "state")) as running:
        assert load(running.client, "1").status_code == 200
        assert unload(running.client).status_code == 200
    with serving(settings(models, tmp_path / "state")) as running:
        assert served(running) == "2"


@pytest.mark.parametrize("damage", ["gone", "broken"])
def test_a_start_without_the_version_that_was_chosen_serves_the_newest_whole_one_and_says_so(
    models: Path, tmp_path: Path, damage: str
) -> None:
    for number in (2, 3):
        add_version(models, number)
    with serving(settings(models, tmp_path / "state")) as running:
        assert load(running.client, "2").status_code == 200
    if damage == "gone":
        shutil.rmtree(models / "toy" / "2")
    else:
        (models / "toy" / "2" / SCORES).write_bytes(b"")
    with serving(settings(models, tmp_path / "state")) as running:
        assert served(running) == "3"
        failed = running.client.get("/v1/models/toy").json()["failed_update"]
        assert (failed["version"], failed["code"]) == (
            "2", "artifact_not_found" if damage == "gone" else "artifact_corrupt",
        )  # fmt: skip
        assert load(running.client).status_code == 200
    with serving(settings(models, tmp_path / "state")) as running:
        assert served(running) == "3"


def test_a_choice_that_cannot_be_remembered_is_not_applied(models: Path, tmp_path: Path) -> None:
    add_version(models, 2)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "policy").write_text("a file where a folder should be")
    with serving(settings(models, tmp_path / "state")) as running:
        assert_problem(load(running.client, "1"), 500, "state_unwritable")
        assert served(running) == "2"


def test_what_the_drift_tests_know_may_be_lost_but_no_load_is_left_half_done(models: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "drift").write_text("a file where a folder should be")
    with serving(settings(models, tmp_path / "state")) as running:
        add_version(models, 2)
        assert load(running.client).status_code == 200
        assert served(running) == "2"
        assert running.client.get("/v1/models/toy").json()["forward"]["settled"]
        assert running.client.get("/v1/models/toy/drift").json()["version"] == "2"


def test_a_damaged_choice_is_left_for_the_newest_version(models: Path, tmp_path: Path) -> None:
    add_version(models, 2)
    (tmp_path / "state" / "policy").mkdir(parents=True)
    (tmp_path / "state" / "policy" / "toy.version").write_text('{"version": "../1", "changed": 0, "changed_by": "x"}')
    with serving(settings(models, tmp_path / "state")) as running:
        assert served(running) == "2"


@pytest.mark.parametrize("parameter", ["config", "file:1/model.onnx", "unload_dependents"])
def test_a_load_that_asks_for_more_than_a_version_is_refused(models: Path, tmp_path: Path, parameter: str) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        body = {"parameters": {"version": "1", parameter: "{}"}}
        answer = running.client.post("/v2/repository/models/toy/load", json=body, headers=BOSS)
        assert_problem(answer, 400, "malformed_request")
        assert parameter in answer.json()["detail"]
        assert "folder of models" in answer.json()["detail"]


def test_a_load_is_not_misled_by_a_version_in_the_wrong_place(models: Path, tmp_path: Path) -> None:
    add_version(models, 2)
    with serving(settings(models, tmp_path / "state")) as running:
        answer = running.client.post("/v2/repository/models/toy/load", json={"version": "1"}, headers=BOSS)
        assert_problem(answer, 400, "malformed_request")
        assert served(running) == "2"


def test_polling_leaves_what_the_admin_chose_or_unloaded(models: Path, tmp_path: Path) -> None:
    other = artifacts.load(models / "toy" / "1")
    other.manifest = other.manifest.model_copy(update={"name": "other"})
    artifacts.save(other, models / "other" / "1")
    add_version(models, 2)
    with serving(settings(models, tmp_path / "state", default_model="toy", poll_seconds=0.01)) as running:
        registry = running.context.registry
        assert load(running.client, "1").status_code == 200
        assert running.client.post("/v2/repository/models/other/unload", headers=BOSS).status_code == 200
        add_version(models, 3)
        polled, load_newer = threading.Event(), registry.load_newer

        async def counted() -> None:
            await load_newer()
            polled.set()

        registry.load_newer = counted  # type: ignore[method-assign]
        assert polled.wait(20)
        assert served(running) == "1"
        assert registry.names == ["toy"]


def poll(running: Running) -> None:
    """Look for newer versions once, as the chore does again and again."""
    registry = running.context.registry
    asyncio.run_coroutine_threadsafe(registry.load_newer(), registry._loop).result(60)


@pytest.mark.parametrize(("change", "left"), [("load", [("toy", "1")]), ("unload", [])])
def test_polling_undoes_nothing_that_the_admin_changed_while_it_looked(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, left: list[tuple[str, str]]
) -> None:
    looked, changing = threading.Event(), threading.Event()

    def slowly(folder: Path) -> list[Path]:
        found = newest_versions(folder)
        looked.set()
        assert changing.wait(20)
        return found

    add_version(models, 2)
    with serving(settings(models, tmp_path / "state")) as running, ThreadPoolExecutor(1) as pool:
        registry = running.context.registry
        begin = getattr(registry, change)

        async def begun(*args: Any) -> Any:
            registry._loop.call_soon(changing.set)  # when the change has begun, and waits for the loader
            return await begin(*args)

        monkeypatch.setattr(registry, change, begun)
        monkeypatch.setattr("service.registry.newest_versions", slowly)
        add_version(models, 3)
        polled = pool.submit(poll, running)
        assert looked.wait(20)
        changed = load(running.client, "1") if change == "load" else unload(running.client)
        assert changed.status_code == 200
        polled.result(60)
        assert [(name, registry.get(name).detector.manifest.version) for name in registry.names] == left


def test_an_evaluation_brings_no_unloaded_model_back(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        assert unload(running.client).status_code == 200
        artifacts.replace_report(models / "toy" / "1", {"id": {"n": 5}}, {})
        poll(running)
        assert running.context.registry.names == []


def test_polling_tries_a_damaged_version_again_when_the_damaged_file_is_mended(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        broken = add_broken(models, 2)
        for _ in range(2):
            poll(running)
        assert running.metric("oodgate_model_loads_total", result="failure") == 1
        shutil.copy(models / "toy" / "1" / SCORES, broken / SCORES)
        poll(running)
        assert served(running) == "2"


@pytest.mark.parametrize(("pause", "version"), [(0, "2"), (3600, "1")])
@pytest.mark.parametrize("place", ["load", "self_test"])
def test_polling_tries_a_version_that_found_no_memory_again_after_a_pause(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, pause: float, version: str
) -> None:
    whole = getattr(Detector, place)

    def out_of_memory(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(Detector, place, whole)
        raise torch.cuda.OutOfMemoryError("injected")

    with serving(settings(models, tmp_path / "state")) as running:
        add_version(models, 2)
        monkeypatch.setattr("service.registry.RETRY_S", pause)
        monkeypatch.setattr(Detector, place, out_of_memory)
        for _ in range(2):
            poll(running)
        assert running.metric("oodgate_model_loads_total", result="failure") == 1
        assert served(running) == version


def test_the_reason_why_the_newest_failed_outlives_other_loads_and_goes_with_it(models: Path, tmp_path: Path) -> None:
    add_version(models, 2)
    with serving(settings(models, tmp_path / "state")) as running:
        broken = add_broken(models, 3)
        assert load(running.client).status_code == 422
        assert load(running.client, "1").status_code == 200
        assert SCORES in reasons(running)["3"]
        assert running.client.get("/v1/models/toy").json()["failed_update"]["version"] == "3"
        shutil.rmtree(broken)
        assert load(running.client).json()["failed_update"] is None


def test_polling_takes_newer_versions_and_gives_up_on_broken_ones_until_they_change(
    models: Path, tmp_path: Path
) -> None:
    with serving(settings(models, tmp_path / "state", poll_seconds=0.01)) as running:

        def failures() -> float:
            return running.metric("oodgate_model_loads_total", result="failure")

        directory = add_version(models, 3)
        wait_until(lambda: post(running.client, GOOD).json()["model"]["version"] == "3")
        broken = models / "toy" / "4"
        shutil.copytree(directory, models / "toy" / "four")
        manifest = json.loads((models / "toy" / "four" / MANIFEST).read_text())
        (models / "toy" / "four" / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 99}))
        (models / "toy" / "four").rename(broken)
        wait_until(lambda: failures() == 1)
        for _ in range(20):
            assert post(running.client, GOOD).json()["model"]["version"] == "3"
        assert failures() == 1


def test_polling_goes_on_after_an_error_that_nobody_foresaw(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, failed = Detector.load, threading.Event()

    def out_of_memory(directory: Path, **options: Any) -> Detector:
        if directory.name == "2":
            failed.set()
            raise torch.cuda.OutOfMemoryError("injected")
        return loaded(directory, **options)

    with serving(settings(models, tmp_path / "state", poll_seconds=0.01)) as running:
        monkeypatch.setattr(Detector, "load", out_of_memory)
        add_version(models, 2)
        assert failed.wait(20)
        add_version(models, 3)
        wait_until(lambda: post(running.client, GOOD).json()["model"]["version"] == "3")


def wait_until(condition: Any) -> None:
    """Ask a running server again until it says so; a request a turn is the wait."""
    for _ in range(5000):
        if condition():
            return
    raise AssertionError("it never came true")


def takes_over(running: Running) -> Detector:
    """Hand over a compiled forward, as the thread that compiles does; it moves scores more than the eager one."""
    registry = running.context.registry
    eager = registry.get("toy").detector
    settled = eager.with_forward(eager.backbone.forward, dict.fromkeys(eager.manifest.scores, 1e9))
    registry._hand_over(eager, settled)
    return settled


def test_a_compiled_forward_that_takes_over_makes_more_verdicts_borderline(toy_models: Path, tmp_path: Path) -> None:
    with serving(settings(toy_models, tmp_path)) as running:
        assert not post(running.client, GOOD).json()["ood"]["borderline"]
        settled = takes_over(running)
        assert post(running.client, GOOD).json()["ood"]["borderline"]
        assert running.context.registry.get("toy").detector is settled
        assert running.client.get("/v1/models/toy/drift").json()["groups"]["all"]["images"] == 2  # they go on


def test_a_compiled_forward_that_takes_over_while_a_policy_is_written_stays(
    toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings(toy_models, tmp_path)) as running:
        registry, write, handed = running.context.registry, running.context.registry._policies.write, list[Detector]()

        def meanwhile(*args: Any) -> None:
            handed.append(takes_over(running))
            taken = threading.Event()
            registry._loop.call_soon_threadsafe(taken.set)
            assert taken.wait(20)
            write(*args)

        monkeypatch.setattr(registry._policies, "write", meanwhile)
        policy = {"target_id_acceptance": 0.9, "guarantee": {"kind": "simultaneous", "delta": 0.05}}
        assert running.client.put("/v1/models/toy/policy", json=policy, headers=BOSS).status_code == 200
        judged = post(running.client, GOOD).json()["ood"]
        assert [registry.get("toy").detector] == handed
        assert (judged["target_id_acceptance"], judged["borderline"]) == (0.9, True)


@pytest.mark.parametrize("change", [load, unload])
def test_a_model_of_the_start_leaves_the_memory_when_it_is_served_no_more(
    models: Path,
    tmp_path: Path,
    change: Callable[[httpx.Client], httpx.Response],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "service.watch")  # its warnings hold frames, and pytest keeps them
    freed = threading.Event()
    with serving(settings(models, tmp_path / "state")) as running:
        assert served(running) == "1"
        backbone: Any = running.context.registry.get("toy").detector.backbone
        weakref.finalize(backbone.forward.network, freed.set)
        del backbone
        add_version(models, 2)
        assert change(running.client).status_code == 200
        assert freed.wait(60)
