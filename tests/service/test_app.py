# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import json
import pkgutil
import re
import shutil
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from fastapi.routing import APIRoute, APIRouter
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from detector.backbone import Backbone
from detector.cli import main
from detector.errors import ArtifactCorrupt, ArtifactNotFound, BackboneError
from detector.images import Pixels, decode
from detector.nvjpeg import NvJpeg
from detector.outputs import Outputs
from service import Settings, create_app, routes
from service.metrics import HANDLERS, Metrics
from service.settings import unknown_variables
from service.versions import newest_versions
from tests.helpers import EMBEDDED, GOOD, encoded, photo
from tests.service.conftest import serving


def start(settings: Settings) -> None:
    """Run the app's lifespan once."""
    import asyncio

    app = create_app(settings)

    async def lifespan() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(lifespan())


def test_the_card_tells_the_promise_and_where_it_comes_from(client: httpx.Client) -> None:
    card = client.get("/v1/models/toy").json()
    assert card["classes"] == ["red", "green", "blue", "grey"]
    assert card["calibration"]["n"] == 300
    assert "at least 0.95" in card["calibration"]["promise"]
    assert card["forward"] == {"device": "cpu", "precision": "fp32", "mode": "eager", "settled": True}
    assert client.get("/v1/models").json() == {"models": [card]}


def test_an_unknown_card_is_a_404(client: httpx.Client) -> None:
    assert client.get("/v1/models/nope").json()["code"] == "model_not_found"


def test_health_and_metrics_answer(client: httpx.Client) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True, "live": True}
    assert "oodgate_queue_capacity 512.0" in client.get("/metrics").text
    openmetrics = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.text.endswith("# EOF\n")


def test_a_server_that_drains_is_not_ready_and_its_metric_says_the_same(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        assert "oodgate_ready 1.0" in running.client.get("/metrics").text
        running.app.state.lifecycle.drain()
        assert running.client.get("/v2/health/ready").json() == {"ready": False, "live": True}
        assert "oodgate_ready 0.0" in running.client.get("/metrics").text


def test_what_counts_stands_at_0_before_the_first_request(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        families = list(text_string_to_metric_families(running.client.get("/metrics").text))
    counts: dict[str, list[float]] = {
        family.name: [sample.value for sample in family.samples if not sample.name.endswith("_sum")]
        for family in families
        if family.name.startswith("oodgate_") and family.type in ("counter", "histogram")
    }
    # The server's own life: it has loaded a model and watches its loop.
    del counts["oodgate_event_loop_lag_seconds"]
    assert sorted(counts.pop("oodgate_model_loads")) == [0, 1]
    assert {name for name, values in counts.items() if not values or any(values)} == set()


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("status", ["200", "500", "502", "503", "504"])
def test_the_first_failure_of_the_gate_is_seen_as_a_rise(method: str, status: str) -> None:
    labels = {"handler": "/gate/{path:path}", "method": method, "status": status}
    assert Metrics().registry.get_sample_value("oodgate_http_requests_total", labels) == 0


def test_every_handler_that_judges_has_its_series_from_the_start() -> None:
    paths = create_app(Settings(models=EMBEDDED.parents[1])).openapi()["paths"]
    judging = re.compile(r"/v1/.*(verdict|explain)|/v2/.*/infer|/gate/.*")
    served = {path: sorted(method.upper() for method in paths[path]) for path in paths if judging.fullmatch(path)}
    # OpenAPI knows no path that spans several segments.
    assert {handler.replace(":path", ""): list(methods) for handler, methods in HANDLERS.items()} == served


def test_a_folder_without_models_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="holds no model"):
        start(Settings(models=tmp_path))


def test_a_damaged_model_stops_the_start(toy: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy, tmp_path / "toy" / "1")
    (copy / "scores.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactCorrupt, match="scores"):
        start(Settings(models=tmp_path))


def test_a_default_model_that_is_not_there_stops_the_start(toy_models: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="DEFAULT_MODEL"):
        start(Settings(models=toy_models, default_model="other"))


def test_decoding_on_a_device_that_is_not_there_stops_the_start(toy_models: Path) -> None:
    with pytest.raises(BackboneError, match="OODGATE_JPEG=pillow"):
        start(Settings(models=toy_models, device="cpu", jpeg="nvjpeg"))


def test_jpegs_go_to_the_device_where_that_is_set(toy_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def decode(data: torch.Tensor) -> torch.Tensor:
        asked.append(len(data))
        return torch.zeros(3, 300, 400, dtype=torch.uint8)

    monkeypatch.setattr("service.lifespan.NvJpeg", lambda device: NvJpeg(device, decode))
    large, small = encoded(photo(400, 300), "JPEG"), encoded(photo(32, 32), "JPEG")
    with serving(Settings(models=toy_models, jpeg="nvjpeg")) as running:
        for body in (large, small):
            answer = running.client.post("/v1/verdict", content=body, headers={"content-type": "image/jpeg"})
            assert answer.status_code == 200
    assert asked == [len(large)]


def test_images_are_decoded_by_the_threads_for_it(toy_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def decoded(*args: Any) -> Pixels:
        threads.append(threading.current_thread().name)
        return decode(*args)

    monkeypatch.setattr("service.judging.decode", decoded)
    with serving(Settings(models=toy_models)) as running:
        large = encoded(photo(400, 300))
        running.client.post("/v1/verdict", content=large, headers={"content-type": "image/png"})
    assert [name.partition("_")[0] for name in threads] == ["decode"]


def test_one_small_image_is_decoded_where_it_came_in_and_many_never_hold_up_the_event_loop(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def decoded(*args: Any) -> Pixels:
        threads.append(threading.current_thread().name.partition("_")[0])
        return decode(*args)

    monkeypatch.setattr("service.judging.decode", decoded)
    with serving(Settings(models=toy_models)) as running:
        assert running.client.post("/v1/verdict", files=[("file", GOOD)]).status_code == 200
        (alone,) = threads
        assert running.client.post("/v1/verdict", files=[("file", GOOD)] * 5).status_code == 200
    assert alone != "decode"
    assert threads[1:] == ["decode"] * 5


def test_a_model_loaded_while_others_are_judged_has_all_its_threads(models: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with serving(Settings(models=models, state_dir=tmp_path, torch_threads=3)) as running:
        loader = running.context.registry._loader
        loader.submit(int).result(20)
        torch.set_num_threads(1)  # as scoring does now and then
        try:
            assert loader.submit(torch.get_num_threads).result(20) == 3
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("policy", ["", "active", "passive"])
def test_threads_that_spin_while_they_wait_are_warned_of(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    with serving(Settings(models=toy_models, device="cpu")):
        pass
    assert ("OMP_WAIT_POLICY is not PASSIVE" in caplog.text) == (policy != "passive")


def test_a_chore_that_fails_is_told_and_done_again(
    toy_models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rounds, again = list[int](), threading.Event()

    async def fails() -> None:
        rounds.append(len(rounds))
        if len(rounds) > 1:
            again.set()
        raise OSError("the folder is away")

    with serving(Settings(models=toy_models, state_dir=tmp_path, poll_seconds=0.01)) as running:
        running.context.registry.load_newer = fails  # type: ignore[method-assign]
        assert again.wait(20)
    assert "the folder is away" in caplog.text


def test_what_the_drift_tests_know_is_saved_even_where_they_cannot_be_shown(
    toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, saved = threading.Event(), threading.Event()

    def fails() -> None:
        failed.set()
        raise ValueError

    monkeypatch.setattr("service.lifespan.REFRESH_EVERY_S", 0.01)
    monkeypatch.setattr("service.lifespan.SAVE_EVERY_S", 0.02)
    with serving(Settings(models=toy_models, state_dir=tmp_path)) as running:
        watch = running.context.watch
        monkeypatch.setattr(watch, "refresh", fails)
        assert failed.wait(20)
        monkeypatch.setattr(watch, "writes", lambda: [saved.set])
        assert saved.wait(20)


def test_no_endpoint_and_no_dependency_is_sent_through_a_thread_pool() -> None:
    modules = [import_module(f"service.routes.{found.name}") for found in pkgutil.iter_modules(routes.__path__)]
    routers = [each for module in modules for each in vars(module).values() if isinstance(each, APIRouter)]
    found = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    called = [each.call for route in found for each in (route.dependant, *route.dependant.dependencies)]
    assert [call for call in called if not inspect.iscoroutinefunction(call)] == []
    assert len(found) > 20


def test_every_size_of_batch_has_been_run_before_the_server_is_ready(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    black: list[int] = []
    outputs = Backbone.outputs

    def counted(backbone: Backbone, images: torch.Tensor, **options: Any) -> Outputs:
        if not images.any():
            black.append(len(images))
        return outputs(backbone, images, **options)

    monkeypatch.setattr(Backbone, "outputs", counted)
    with serving(Settings(models=toy_models, max_batch=12)) as running:
        run = list(black)
        assert running.client.get("/v2/health/ready").status_code == 200
        assert run == list(running.context.engine.buckets) == [1, 2, 4, 8, 12]


def test_the_newest_version_is_served_by_number(tmp_path: Path) -> None:
    for version in ("2", "10", "9", "11.partial", "12.bak"):
        (tmp_path / "m" / version).mkdir(parents=True)
        (tmp_path / "m" / version / "manifest.json").write_text("{}")
    assert newest_versions(tmp_path) == [tmp_path / "m" / "10"]


def test_a_renamed_model_is_refused(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "other" / "1")
    with pytest.raises(ArtifactCorrupt, match="keeps its name"):
        start(Settings(models=tmp_path))


def test_with_several_models_the_path_must_name_one(toy: Path, tmp_path: Path) -> None:
    from detector import artifact as artifacts

    artifact = artifacts.load(toy)
    for name in ("one", "two"):
        artifact.manifest = artifact.manifest.model_copy(update={"name": name})
        artifacts.save(artifact, tmp_path / name / "1")
    with TestClient(create_app(Settings(models=tmp_path))) as client:
        headers = {"content-type": "image/png"}
        assert "one, two" in client.post("/v1/verdict", content=b"x", headers=headers).json()["detail"]
        assert client.get("/v1/models/two").json()["name"] == "two"


def test_shadows_are_chosen_by_setting(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, shadow_scores=())) as running:
        assert running.client.get("/v1/models/toy").json()["shadow_scores"] == []


def test_settings_come_from_the_environment_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODGATE_MAX_BATCH", "7")
    monkeypatch.setenv("OODGATE_SHADOW_SCORES", '["grood_norm"]')
    assert (Settings().max_batch, Settings().shadow_scores) == (7, ("grood_norm",))
    monkeypatch.setenv("OODGATE_MAX_BATCH", "0")
    with pytest.raises(ValidationError):
        Settings()


def test_a_queue_that_no_full_request_fits_is_refused() -> None:
    with pytest.raises(ValidationError, match="OODGATE_QUEUE_CAPACITY is 8"):
        Settings(queue_capacity=8, max_images=9)


def test_a_wrong_setting_is_one_clear_line_at_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODGATE_PORT", "many")
    monkeypatch.setenv("OODGATE_SHADOW_SCORES", "knn")
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("Error: OODGATE_PORT: ")
    assert line.endswith('; OODGATE_SHADOW_SCORES: give a JSON list, as ["msp","knn"]')


def test_a_setting_that_is_no_json_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODGATE_TOKENS", "me:1234")
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert '"tokens"' in line
    assert line.endswith("a setting of several values is JSON")


def test_variables_that_are_no_settings_are_named_with_what_they_may_mean() -> None:
    environment = {"OODGATE_MAX_BACH": "7", "OODGATE_QQQ_42": "", "OODGATE_PORT": "1", "oodgate_host": "", "PATH": ""}
    assert unknown_variables(environment) == ["OODGATE_MAX_BACH (did you mean OODGATE_MAX_BATCH?)", "OODGATE_QQQ_42"]


def test_the_openapi_document_names_every_operation_once(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == len(set(operations)) >= 8
    verdict = document["paths"]["/v1/verdict"]["post"]
    assert {"400", "413", "415", "422", "429", "503", "504"} <= set(verdict["responses"])
    assert json.dumps(verdict["requestBody"]).count("binary") >= 4
