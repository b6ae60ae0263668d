# SPDX-License-Identifier: Apache-2.0
"""Policies changed while serving: who may, what is refused, what outlives a restart, what is recorded."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from detector import Detector, Policy, artifact as artifacts
from detector.calibration import Guarantee
from detector.errors import ScoreError
from detector.fitting import fit
from service import Settings, create_app
from service.errors import StateUnwritable
from tests.helpers import GOOD, toy_dataset, toy_model, toy_network
from tests.service.conftest import serving
from tests.service.test_security import bearer, sha256
from tests.service.test_verdict import NOISE, assert_problem, post

BOSS = {"authorization": "Bearer boss"}
STRICT = {"target_id_acceptance": 0.9, "guarantee": {"kind": "simultaneous", "delta": 0.05}, "score_name": "grood_norm"}


def settings(models: Path, state: Path, **more: Any) -> Settings:
    return Settings(models=models, state_dir=state, admin_token_sha256=sha256("boss"), **more)


def add_version(models: Path, number: int) -> Path:
    """Another version of the toy model: the same network and scores under another number."""
    directory = models / "toy" / str(number)
    artifact = artifacts.load(models / "toy" / "1")
    artifact.manifest = artifact.manifest.model_copy(update={"version": str(number)})
    artifacts.save(artifact, directory)
    return directory


def load(client: httpx.Client, version: str | None = None) -> httpx.Response:
    body = {} if version is None else {"parameters": {"version": version}}
    return client.post("/v2/repository/models/toy/load", json=body, headers=BOSS)


def test_a_policy_is_recomputed_from_the_stored_scores_and_decides_at_once(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        before = post(running.client, GOOD).json()["ood"]
        assert running.client.get("/v1/models/toy/policy").json()["score_name"] == before["score_name"] == "grood"
        changed = running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS)
        assert changed.status_code == 200
        assert "for every target at once" in changed.json()["calibration"]["promise"]
        after = post(running.client, GOOD).json()["ood"]
        assert (after["score_name"], after["target_id_acceptance"]) == ("grood_norm", 0.9)
        assert after["shadow"]["grood"]["score"] == pytest.approx(before["score"], rel=1e-4)
        served = running.context.registry.get("toy")
        assert after["threshold"] == served.decider.thresholds[0].value


def test_what_a_policy_leaves_out_stays_as_it_is_in_force(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        assert running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS).status_code == 200
        changed = running.client.put("/v1/models/toy/policy", json={"target_id_acceptance": 0.85}, headers=BOSS)
        assert changed.status_code == 200
        policy = running.client.get("/v1/models/toy/policy").json()
        assert policy == STRICT | {"target_id_acceptance": 0.85, "alpha_conf": 0.0}


@pytest.mark.parametrize("part", [{"kind": "pac"}, {"delta": 0.02}, {}])
def test_what_a_guarantee_leaves_out_stays_as_it_is_in_force(tmp_path: Path, part: dict[str, Any]) -> None:
    own = Guarantee(kind="marginal", delta=0.01)
    toy_model(tmp_path / "models" / "toy" / "1", policy=Policy(guarantee=own))
    with serving(settings(tmp_path / "models", tmp_path / "state")) as running:
        change = {"score_name": "grood_norm", "guarantee": part}
        assert running.client.put("/v1/models/toy/policy", json=change, headers=BOSS).status_code == 200
        assert running.client.get("/v1/models/toy/policy").json()["guarantee"] == own.model_dump() | part


def test_policies_that_wait_for_a_version_change_what_is_then_in_force(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, loading, asked = Detector.load, threading.Event(), threading.Semaphore(0)

    def slowly(directory: Path, **options: Any) -> Detector:
        loading.set()
        for _ in range(2):
            assert asked.acquire(timeout=20)
        return read(directory, **options)

    with serving(settings(models, tmp_path / "state")) as running, ThreadPoolExecutor(3) as pool:
        assert running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS).status_code == 200
        registry = running.context.registry
        set_policy = registry.set_policy

        async def announced(*args: Any) -> Any:
            registry._loop.call_soon(asked.release)  # when it waits for its turn
            return await set_policy(*args)

        monkeypatch.setattr(Detector, "load", slowly)
        monkeypatch.setattr(registry, "set_policy", announced)
        add_version(models, 2)
        loaded = pool.submit(load, running.client)
        assert loading.wait(20)
        parts = {"score_name": "knn"}, {"guarantee": {"kind": "marginal", "delta": 0.1}}
        put = partial(running.client.put, "/v1/models/toy/policy", headers=BOSS)
        changes = [loaded, *(pool.submit(put, json=part) for part in parts)]
        assert [change.result().status_code for change in changes] == [200, 200, 200]
        own = artifacts.read_manifest(models / "toy" / "2").policy.model_dump()
        assert running.client.get("/v1/models/toy/policy").json() == own | parts[0] | parts[1]


def test_alpha_conf_is_a_share_of_the_images_taken_from_the_budget(models: Path, tmp_path: Path) -> None:
    budget = STRICT | {"target_id_acceptance": 0.7}
    with serving(settings(models, tmp_path / "state")) as running:

        def put(alpha_conf: float) -> httpx.Response:
            return running.client.put("/v1/models/toy/policy", json=budget | {"alpha_conf": alpha_conf}, headers=BOSS)

        assert put(0.1).status_code == 200
        decider = running.context.registry.get("toy").decider
        assert decider.doubt_thresholds is not None
        cut_offs = float(decider.thresholds[0].p_cutoff), float(decider.doubt_thresholds[0].p_cutoff)
        assert 0 < cut_offs[1] <= 0.1 < cut_offs[0] <= 0.2
        refused = put(0.3)  # the whole budget; as a part of the budget it would be little
        assert_problem(refused, 422, "calibration_error")
        assert "less than the budget" in refused.json()["detail"]


def test_a_policy_outlives_a_restart_and_not_another_model(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        assert running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS).status_code == 200
    with serving(settings(models, tmp_path / "state")) as running:
        assert running.client.get("/v1/models/toy/policy").json()["score_name"] == "grood_norm"
        add_version(models, 2)
        assert load(running.client).json()["version"] == "2"
        assert running.client.get("/v1/models/toy/policy").json()["score_name"] == "grood"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"target_id_acceptance": 0.99, "guarantee": {"kind": "pac", "delta": 0.05}}, 422, "calibration_error"),
        ({"target_id_acceptance": 0.9999}, 422, "too_few_samples"),
        ({"score_name": "no_such_score"}, 422, "calibration_error"),
        ({"alpha_conf": 0.5}, 422, "calibration_error"),
        ({"target_id_acceptance": 1.5}, 400, "malformed_request"),
        ({"unknown": 1}, 400, "malformed_request"),
    ],
)
def test_a_policy_that_cannot_be_kept_changes_nothing(
    models: Path, tmp_path: Path, change: dict[str, Any], status: int, code: str
) -> None:
    with serving(settings(models, tmp_path / "state")) as running:
        before = running.client.get("/v1/models/toy/policy").json()
        assert_problem(running.client.put("/v1/models/toy/policy", json=STRICT | change, headers=BOSS), status, code)
        assert running.client.get("/v1/models/toy/policy").json() == before
        assert not (tmp_path / "state" / "policy").exists()


def test_a_score_with_a_backward_pass_neither_decides_nor_is_a_shadow(tmp_path: Path) -> None:
    models = tmp_path / "models"
    known = toy_dataset(300, 1), toy_dataset(300, 2)
    fit(toy_network(), *known, models / "toy" / "1", scores=["grood", "grood_norm", "gaia_z"])
    with serving(settings(models, tmp_path / "state")) as running:
        policy = STRICT | {"score_name": "gaia_z"}
        refused = running.client.put("/v1/models/toy/policy", json=policy, headers=BOSS)
        assert_problem(refused, 422, "score_error")
        assert "gaia_z" in refused.json()["detail"]
    shadowed = settings(models, tmp_path / "state", shadow_scores=("gaia_z",))
    with pytest.raises(ScoreError, match="gaia_z runs a backward pass"), TestClient(create_app(shadowed)):
        pass


def test_a_policy_that_cannot_be_remembered_is_not_applied(models: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "policy").write_text("a file where a folder should be")
    with serving(settings(models, state)) as running:
        answer = running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS)
        assert_problem(answer, 500, "state_unwritable")
        assert running.client.get("/v1/models/toy/policy").json()["score_name"] == "grood"


def test_a_damaged_stored_policy_is_left_for_the_models_own(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "state" / "policy"
    folder.mkdir(parents=True)
    (folder / "toy.json").write_text("{half a")
    with serving(settings(models, tmp_path / "state")) as running:
        assert running.client.get("/v1/models/toy/policy").json()["score_name"] == "grood"


CHANGES = [
    ("PUT", "/v1/models/toy/policy"),
    ("POST", "/v2/repository/models/toy/load"),
    ("POST", "/v2/repository/models/toy/unload"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_only_the_admin_changes_anything(models: Path, tmp_path: Path, method: str, path: str) -> None:
    with serving(settings(models, tmp_path / "state", tokens={"camera": sha256("one")})) as running:
        for headers, status, code in ((bearer("one"), 403, "admin_only"), ({}, 401, "unauthorized")):
            headers.pop("content-type", None)
            assert_problem(running.client.request(method, path, json=STRICT, headers=headers), status, code)


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_without_an_admin_token_nothing_can_be_changed(client: httpx.Client, method: str, path: str) -> None:
    assert_problem(client.request(method, path, json=STRICT), 403, "admin_disabled")


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_a_change_is_read_within_the_limits_of_every_body(models: Path, tmp_path: Path, method: str, path: str) -> None:
    with serving(settings(models, tmp_path / "state", max_body_bytes=1000, request_timeout_s=1)) as running:
        long = running.client.request(method, path, content=b"{" + b" " * 1000 + b"}", headers=BOSS)
        assert_problem(long, 413, "body_too_large")
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as never_ends:
            never_ends.sendall(f"{head}authorization: Bearer boss\r\n\r\n{{".encode())
            assert b" 408 " in never_ends.recv(100)
        with socket.create_connection(("127.0.0.1", running.port)) as unknown:
            unknown.sendall(f"{head}\r\n".encode())  # and no body: the answer is there before it
            assert b" 403 " in unknown.recv(100)


def test_every_decision_and_change_is_one_audit_line_without_the_image(models: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(settings(models, state, tokens={"camera-1": sha256("one")})) as running:
        headers = bearer("one") | {"x-request-id": "r-1"}
        verdict = running.client.post("/v1/verdict", content=NOISE, headers=headers).json()
        running.client.post("/v1/verdict", content=b"no image", headers=headers)
        running.client.put("/v1/models/toy/policy", json=STRICT, headers=BOSS)
    lines = [json.loads(line) for line in (state / "audit" / "audit.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["decision", "policy"]
    decision, policy = lines
    assert (decision["request_id"], decision["caller"], decision["decision"]) == ("r-1", "camera-1", "defer")
    assert decision["sha256"] == hashlib.sha256(NOISE).hexdigest()
    assert decision["ood"] == verdict["ood"]
    assert decision["digest"] == verdict["model"]["digest"]
    assert (policy["caller"], policy["policy"]["score_name"]) == ("admin", "grood_norm")


def test_scores_can_be_kept_for_the_admin(models: Path, tmp_path: Path) -> None:
    with serving(settings(models, tmp_path / "state", expose="decision")) as running:
        hidden = post(running.client, GOOD).json()
        assert "ood" not in hidden
        assert (hidden["decision"], hidden["prediction"]["label"] in ("red", "green", "blue", "grey")) == (
            "accept",
            True,
        )
        assert "ood" in running.client.post("/v1/verdict", content=GOOD, headers=bearer("boss")).json()
        encoded = {"name": "image_bytes", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(GOOD).decode()]}
        infer = running.client.post("/v2/models/toy/infer", json={"inputs": [encoded]}).json()
        assert {"ood_score", "p_value"}.isdisjoint(output["name"] for output in infer["outputs"])
        assert "threshold" not in infer["parameters"]
        assert_problem(running.client.get("/v1/models/toy/drift"), 403, "admin_only")
        assert running.client.get("/v1/models/toy/drift", headers=BOSS).status_code == 200


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text"])
def test_metrics_that_tell_scores_can_be_kept_for_the_admin(models: Path, tmp_path: Path, accept: str) -> None:
    with serving(settings(models, tmp_path / "state", expose="decision")) as running:

        def families(**headers: str) -> set[str]:
            text = running.client.get("/metrics", headers={"accept": accept} | headers).text
            return {line.split()[2].removesuffix("_total") for line in text.splitlines() if line.startswith("# TYPE")}

        hidden = families(**BOSS) - families()
        assert families() == families(authorization="Bearer unknown")
    assert hidden == {
        "oodgate_p_value", "oodgate_threshold", "oodgate_borderline", "oodgate_shadow_disagreements",
        "oodgate_drift_evidence_log10",
    }  # fmt: skip


def test_a_state_folder_that_cannot_be_written_stops_the_start(models: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StateUnwritable, match="OODGATE_STATE_DIR"), TestClient(create_app(settings(models, blocked))):
        pass
    with serving(settings(models, blocked, audit=False)) as running:
        assert post(running.client, GOOD).status_code == 200
