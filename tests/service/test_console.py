# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from detector import Detector, Policy, artifact as artifacts
from detector.artifact import MANIFEST, REPORT
from detector.explain import Explanation, explain as real_explain
from detector.images import Pixels, decode
from service import Settings
from service.explainer import MOST
from service.metrics import Metrics
from service.recent import SLOT_S, SLOTS, Recent
from service.routes.console import PAGE, ROOT, assets
from service.served import Answer, Timing
from tests.helpers import GOOD, encoded, toy_images, toy_model
from tests.service.conftest import Running, serving
from tests.service.test_admin import BOSS, STRICT, add_version, load, settings
from tests.service.test_verdict import assert_problem

PNG = {"content-type": "image/png"}


def explain(client: httpx.Client, body: bytes = GOOD) -> httpx.Response:
    return client.post("/v1/explain", content=body, headers=PNG)


def test_an_explanation_carries_the_verdict_of_the_other_route(client: httpx.Client) -> None:
    explained, judged = explain(client), client.post("/v1/verdict", content=GOOD, headers=PNG)
    for member in ("model", "decision", "reason", "prediction"):
        assert explained.json()[member] == judged.json()[member]
    assert explained.json()["ood"]["p_value"] == pytest.approx(judged.json()["ood"]["p_value"])
    assert explained.headers["x-oodgate-decision"] == judged.headers["x-oodgate-decision"]


def test_an_explanation_holds_what_the_network_saw_and_a_heat_map_of_the_same_size(client: httpx.Client) -> None:
    explanation = explain(client).json()["explanation"]
    seen, heat = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(explanation[name])))) for name in ("input_png", "heat_png")
    )
    assert np.array_equal(seen, np.asarray(Image.open(io.BytesIO(GOOD))))
    assert heat.shape == (32, 32, 4)
    assert len(explanation["nearest"]) == 3
    assert 0 <= explanation["ood_prototype"]["pi"] <= 1


def test_every_served_model_explains_by_its_own_name(toy: Path, tmp_path: Path) -> None:
    for name in ("toy", "other"):
        artifact = artifacts.load(toy)
        artifact.manifest = artifact.manifest.model_copy(update={"name": name})
        artifacts.save(artifact, tmp_path / name / "1")
    with serving(Settings(models=tmp_path, default_model="toy")) as running:
        for path in ("/v1/models/other/explain", "/v1/models/other/versions/1/explain"):
            explained = running.client.post(path, content=GOOD, headers=PNG).json()
            assert (explained["model"]["name"], len(explained["explanation"]["nearest"])) == ("other", 3)
        for path in ("/v1/models/none/explain", "/v1/models/other/versions/2/explain"):
            assert_problem(running.client.post(path, content=GOOD, headers=PNG), 404, "model_not_found")


def test_an_explanation_counts_in_no_metric_of_verdicts(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        assert explain(running.client).status_code == 200
        assert sum(sum(part) for part in _counts(running)) == 0


def test_what_only_the_admin_may_see_is_not_explained_to_others(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, expose="decision")) as running:
        paths = ("/v1/models/toy/report", "/v1/monitor")
        for answer in (explain(running.client), *map(running.client.get, paths)):
            assert (answer.status_code, answer.json()["code"]) == (403, "admin_only")


def test_one_image_at_a_time_is_explained(client: httpx.Client) -> None:
    several = client.post("/v1/explain", files=[("file", ("a", GOOD)), ("file", ("b", GOOD))])
    assert (several.status_code, several.json()["code"]) == (413, "too_many_images")
    assert explain(client, b"junk").json()["code"] == "undecodable_image"


def test_more_explanations_than_fit_get_429_and_the_others_their_answer(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def held(detector: Detector, image: Pixels, score_name: str) -> Explanation:
        assert go.wait(30)
        return real_explain(detector, image, score_name)

    monkeypatch.setattr("service.routes.explain.explain", held)
    with serving(Settings(models=toy_models)) as running, ThreadPoolExecutor(MOST + 1) as pool:
        waiting = {pool.submit(explain, running.client) for _ in range(MOST + 1)}
        refused = next(as_completed(waiting, 30))
        assert (refused.result().status_code, refused.result().json()["code"]) == (429, "queue_full")
        assert "retry-after" in refused.result().headers
        assert running.client.post("/v1/verdict", content=GOOD, headers=PNG).status_code == 200  # not held up
        go.set()
        assert {future.result().status_code for future in waiting - {refused}} == {200}
        assert explain(running.client).status_code == 200


def test_an_image_that_finds_no_place_to_be_explained_is_not_decoded(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, decoded = threading.Event(), list[bytes]()

    def held(data: bytes, *rest: Any) -> Pixels:
        decoded.append(data)
        assert go.wait(30)
        return decode(data, *rest)

    monkeypatch.setattr("service.routes.explain.decode", held)
    with serving(Settings(models=toy_models)) as running, ThreadPoolExecutor(MOST + 1) as pool:
        waiting = {pool.submit(explain, running.client) for _ in range(MOST + 1)}
        refused = next(as_completed(waiting, 30))
        go.set()
        assert refused.result().status_code == 429
        assert {future.result().status_code for future in waiting - {refused}} == {200}
        assert len(decoded) == MOST


def _counts(running: Running) -> list[list[int]]:
    model = running.client.get("/v1/monitor").json()["models"]["toy"]
    return [model["accepted"], model["deferred"]]


def test_the_monitor_counts_what_was_judged(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        files = [("file", (str(i), encoded(image))) for i, image in enumerate(toy_images(20, seed=60)[0])]
        verdicts = running.client.post("/v1/verdict", files=files).json()["verdicts"]
        seen = running.client.get("/v1/monitor").json()
    model = seen["models"]["toy"]
    deferred = sum(verdict["decision"] == "defer" for verdict in verdicts)
    assert (sum(model["accepted"]), sum(model["deferred"])) == (20 - deferred, deferred)
    assert sum(model["p_values"]) == 20
    assert sum(part["accept"] + part["defer"] for part in model["classes"].values()) == 20
    assert seen["stages"]["decode"]["count"] == 20
    assert seen["stages"]["decode"]["p50_ms"] > 0
    assert seen["queue"] == {"depth": 0, "capacity": 512}
    assert len(seen["slots"]) == len(model["accepted"]) == SLOTS
    low, high = model["limits"][-1]
    assert 0 <= low < high <= 1
    assert model["limits"][0] is None


def _stricter(client: httpx.Client) -> httpx.Response:
    return client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS)


@pytest.mark.parametrize("change", [_stricter, load])
def test_the_monitor_holds_no_other_policys_or_versions_decisions_against_the_limits_in_force(
    models: Path, tmp_path: Path, change: Callable[[httpx.Client], httpx.Response]
) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        assert running.client.post("/v1/verdict", content=GOOD, headers=PNG).status_code == 200
        add_version(models, 2)
        assert change(running.client).status_code == 200
        model = running.client.get("/v1/monitor").json()["models"]["toy"]
        assert sum(model["accepted"] + model["deferred"] + model["p_values"]) == 0
        assert (model["classes"], model["limits"][-1]) == ({}, None)
        assert running.client.post("/v1/verdict", content=GOOD, headers=PNG).status_code == 200
        assert sum(sum(part) for part in _counts(running)) == 1


def test_what_is_older_than_the_window_is_forgotten(shared_server: Running) -> None:
    now = 1_000_000.0
    recent = Recent(Metrics(), clock=lambda: now)
    model = shared_server.context.registry.get("toy")
    answers = [_answer(shared_server)]
    recent.count(model, answers)
    assert sum(_seen(recent, shared_server)) == 1
    now += SLOT_S * (SLOTS - 1)
    assert _seen(recent, shared_server)[0] == 1
    now += SLOT_S
    assert sum(_seen(recent, shared_server)) == 0


def _seen(recent: Recent, running: Running) -> list[int]:
    model = recent.report([running.context.registry.get("toy")])["models"]["toy"]
    return [a + b for a, b in zip(model["accepted"], model["deferred"], strict=True)]


def _answer(running: Running) -> Answer:
    detector = running.context.registry.get("toy").detector
    return Answer(detector.verdicts([GOOD])[0], Timing(0.0, 0.0, 0.0))


def test_the_gauges_of_drift_are_shown() -> None:
    metrics = Metrics()
    metrics.drift_alarm.labels("toy", "1", "exchangeability").set(1)
    assert Recent(metrics).report([])["drift"] == {"drift_alarm toy 1 exchangeability": 1.0}


def test_the_report_says_what_other_targets_would_defer(client: httpx.Client) -> None:
    report = client.get("/v1/models/toy/report").json()
    targets = report["targets"]
    rates = [target["id_deferral"] for target in targets]
    strict = [target for target in targets if target["guarantee"]["kind"] == "simultaneous"]
    assert rates == sorted(rates, reverse=True) or len(strict) < len(targets)
    for target in strict:
        assert target["id_deferral"] <= 1 - target["target_id_acceptance"]
    current = next(target for target in targets if target["target_id_acceptance"] == 0.95)
    assert current["threshold"] == report["calibration"][0]["threshold"]
    assert sum(report["calibration"][0]["counts"]) == 300


def refitted(directory: Path) -> None:
    shutil.rmtree(directory)
    toy_model(directory, policy=Policy(target_id_acceptance=0.9))


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: (directory / REPORT).write_text((directory / REPORT).read_text()[:100]),
        lambda directory: (directory / REPORT).write_text('{"id": []}'),
        lambda directory: (directory / REPORT).unlink(),
        lambda directory: (directory / MANIFEST).write_text("{half"),
        lambda directory: shutil.rmtree(directory),
        refitted,
    ],
    ids=["cut", "altered", "gone", "manifest", "all gone", "refitted"],
)
def test_an_evaluation_that_is_damaged_or_of_another_model_is_left_out_of_the_report(
    models: Path, damage: Callable[[Path], object]
) -> None:
    with serving(Settings(models=models)) as running:
        whole = running.client.get("/v1/models/toy/report").json()
        assert whole["evaluation"]["id"]["n"] == 200
        damage(models / "toy" / "1")
        answer = running.client.get("/v1/models/toy/report")
        assert answer.status_code == 200
        assert answer.json()["evaluation"] == {
            "id": None, "decisions": {}, "ood": {}, "shifted": {}, "p_values": None,
        }  # fmt: skip
        assert answer.json()["calibration"] == whole["calibration"]


def test_the_report_shows_an_evaluation_that_was_stored_while_serving(models: Path) -> None:
    with serving(Settings(models=models)) as running:
        artifacts.replace_report(models / "toy" / "1", {"id": {"n": 7}}, {})
        assert running.client.get("/v1/models/toy/report").json()["evaluation"]["id"] == {"n": 7}


def test_the_card_says_its_promise_in_one_sentence_with_its_interval_and_what_it_was_calibrated_on(
    client: httpx.Client, toy_models: Path
) -> None:
    calibration = client.get("/v1/models/toy").json()["calibration"]
    low, high = calibration["expected_acceptance_interval"]
    assert f"(95 % of such calibrations accept {low:.4f} to {high:.4f}); nothing is promised" in calibration["promise"]
    (manifest,) = toy_models.rglob("manifest.json")
    for name, file in (("splits", "splits"), ("scores", "calibration")):
        stored = hashlib.sha256((manifest.parent / f"{file}.safetensors").read_bytes()).hexdigest()
        assert calibration[f"{name}_digest"] == f"sha256:{stored}"


def test_every_sample_is_listed_and_served(client: httpx.Client) -> None:
    samples = {path.name for path in (ROOT / "samples").iterdir()} - {"samples.json"}
    listed = client.get("/console/samples/samples.json").json()
    assert {sample["file"] for sample in listed} == samples
    for name in samples:
        assert client.get(f"/console/samples/{name}").headers["content-type"] == "image/png"


def test_the_page_and_all_it_names_are_served_without_a_token_and_nothing_else_is(toy_models: Path) -> None:
    token = hashlib.sha256(b"secret").hexdigest()
    with serving(Settings(models=toy_models, tokens={"someone": token})) as running:
        page = running.client.get("/")
        assert page.status_code == 200
        for name in re.findall(r'(?:href|src)="(console/[^"]+)"', page.text):
            assert running.client.get(f"/{name}").status_code == 200, name
        assert running.client.get("/console/%2e%2e/settings.py").status_code == 404
        assert running.client.get("/v1/monitor").status_code == 401


def test_the_policy_lets_the_page_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    page = (ROOT / PAGE).read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\son\w+=|https?://", page)


def test_the_first_load_is_under_300_kb_compressed() -> None:
    first = [asset for name, asset in assets().items() if not name.endswith((".json",))]
    assert sum(len(asset.compressed) for asset in first) < 300_000


def test_an_asset_is_compressed_where_wanted_and_not_sent_twice(client: httpx.Client) -> None:
    answer = client.get("/console/app.js", headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(assets()["app.js"].compressed) == (ROOT / "app.js").read_bytes() == answer.content
    again = client.get("/console/app.js", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_wheel_holds_the_whole_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT.parents[1], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"service/console/{name}" for name in assets()} <= held
    assert "service/console/vendor/uplot-1.6.32/LICENSE" in held


def test_the_vendored_library_is_unmodified_and_carries_its_licence_and_version() -> None:
    (folder,) = (ROOT / "vendor").iterdir()
    published = {  # dist/ of the package on npm
        "uPlot.esm.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    for name, digest in published.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert folder.name == "uplot-1.6.32"
    assert '"version": "1.6.32"' in (folder / "package.json").read_text()
    assert "MIT" in (folder / "LICENSE").read_text()
