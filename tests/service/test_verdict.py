# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest

from detector import Detector
from service import Settings
from service.engine import MOST_RESTARTS
from service.schemas import VerdictBody
from tests.helpers import GOOD, HUGE_PNG, encoded, photo, toy_images
from tests.service.conftest import Running, serving

PNG = {"content-type": "image/png"}
FIELD = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
NOISE = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def post(client: httpx.Client, body: bytes, kind: str = "image/png") -> httpx.Response:
    return client.post("/v1/verdict", content=body, headers={"content-type": kind})


def form(client: httpx.Client, *bodies: bytes) -> httpx.Response:
    return client.post("/v1/verdict", files=[("file", (f"{i}.png", body)) for i, body in enumerate(bodies)])


def assert_problem(response: httpx.Response, status: int, code: str) -> str:
    body = response.json()
    assert (response.status_code, body["status"], body["code"]) == (status, status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert body["error"] == body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    return str(body["detail"])


def test_one_image_gets_one_verdict_of_the_documented_shape(client: httpx.Client) -> None:
    response = post(client, GOOD)
    assert response.status_code == 200
    VerdictBody.model_validate(response.json(), extra="forbid")
    assert response.headers["x-oodgate-decision"] == response.json()["decision"] == "accept"


def test_the_verdict_is_the_detectors_own(client: httpx.Client, toy: Path) -> None:
    images, _ = toy_images(20, seed=51)
    expected = Detector.load(toy).verdicts(images)
    for image, verdict in zip(images, expected, strict=True):
        body = post(client, encoded(image)).json()
        assert body["decision"] == verdict.decision
        assert body["prediction"]["label"] == verdict.prediction.label
        assert body["ood"]["score"] == pytest.approx(verdict.ood.score, rel=1e-4)


def test_an_ood_image_is_deferred_with_200(client: httpx.Client) -> None:
    response = post(client, NOISE)
    assert (response.status_code, response.json()["decision"], response.json()["reason"]) == (200, "defer", "ood")
    assert response.headers["x-oodgate-decision"] == "defer"
    assert response.json()["ood"]["p_value"] <= response.json()["ood"]["p_cutoff"]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_every_format_and_size_is_judged(client: httpx.Client, image_format: str) -> None:
    assert post(client, encoded(photo(640, 480), image_format), f"image/{image_format.lower()}").status_code == 200


def test_one_file_of_a_form_gets_a_bare_verdict(client: httpx.Client) -> None:
    VerdictBody.model_validate(form(client, GOOD).json())


def test_several_files_keep_their_order_and_a_bad_one_fails_alone(client: httpx.Client) -> None:
    response = form(client, GOOD, GOOD[:60], NOISE)
    first, bad, last = response.json()["verdicts"]
    assert response.status_code == 200
    assert (first["decision"], last["decision"]) == ("accept", "defer")
    assert (bad["problem"]["status"], bad["problem"]["index"]) == (422, 1)
    assert response.headers["x-oodgate-decision"] == "defer"


def test_a_named_model_and_its_version_answer(client: httpx.Client) -> None:
    for path in ("/v1/models/toy/verdict", "/v1/models/toy/versions/1/verdict"):
        assert client.post(path, content=GOOD, headers=PNG).json()["model"]["name"] == "toy"


@pytest.mark.parametrize("path", ["/v1/models/nope/verdict", "/v1/models/toy/versions/9/verdict"])
def test_an_unknown_model_is_a_404(client: httpx.Client, path: str) -> None:
    assert_problem(client.post(path, content=GOOD, headers=PNG), 404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "image/png", 400, "empty_request"),
        (b"hello", "image/png", 422, "undecodable_image"),
        (encoded(photo(400, 300), "JPEG")[:2000], "image/jpeg", 422, "undecodable_image"),
        (HUGE_PNG, "image/png", 413, "too_many_pixels"),
        (encoded(photo(8, 8), "GIF"), "image/png", 415, "unsupported_image_format"),
        (encoded(photo(8, 8), "GIF"), "image/gif", 415, "unsupported_media_type"),
        (bytes(30_000_000), "image/png", 413, "body_too_large"),
        (GOOD, "application/json", 415, "unsupported_media_type"),
        (GOOD, "multipart/form-data", 400, "malformed_form"),
        (b"nonsense", "multipart/form-data; boundary=x", 400, "malformed_form"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "empty_request"),
        (FIELD, "multipart/form-data; boundary=x; charset=undefined", 400, "malformed_form"),
        (FIELD, "multipart/form-data; boundary=x; charset=punycode", 400, "malformed_form"),
        (FIELD, "multipart/form-data; boundary=x; charset=UTF-8", 400, "empty_request"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gets_its_documented_answer(
    client: httpx.Client, body: bytes, kind: str, status: int, code: str
) -> None:
    assert_problem(post(client, body, kind), status, code)
    assert post(client, GOOD).status_code == 200


def test_a_body_without_announced_length_is_cut_at_the_limit(client: httpx.Client) -> None:
    def endless() -> object:
        for _ in range(400):
            yield bytes(100_000)

    response = client.post("/v1/verdict", content=endless(), headers=PNG)  # type: ignore[arg-type]
    assert_problem(response, 413, "body_too_large")


def test_the_limit_holds_for_forms_too(client: httpx.Client) -> None:
    assert_problem(form(client, GOOD, bytes(25_000_000)), 413, "body_too_large")


def test_too_many_images_are_refused(client: httpx.Client) -> None:
    for count in (65, 80):
        assert "more than 64 images" in assert_problem(form(client, *[GOOD] * count), 413, "too_many_images")


def test_a_wrong_method_is_a_405(client: httpx.Client) -> None:
    assert_problem(client.get("/v1/verdict"), 405, "method_not_allowed")


@pytest.mark.parametrize(("given", "kept"), [("trace-42", True), ("x" * 200, False), ("a b", False)])
def test_a_request_id_is_echoed_if_it_is_sane(client: httpx.Client, given: str, kept: bool) -> None:
    response = client.post("/v1/verdict", content=GOOD, headers=PNG | {"x-request-id": given})
    assert (response.headers["x-request-id"] == given) is kept
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_a_full_queue_answers_429_with_retry_after(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, queue_capacity=2, max_images=2)) as running:
        with running.context.engine.admit(1):  # another request's image, still under way
            response = form(running.client, GOOD, GOOD)
        assert_problem(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert running.metric("oodgate_requests_rejected_total", reason="queue_full") == 1
        assert running.context.engine.depth == 0
        assert form(running.client, GOOD, GOOD).status_code == 200


def test_bodies_beyond_what_the_server_holds_are_refused(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, max_buffered_bytes=5000)) as running:
        response = post(running.client, GOOD + bytes(5000))
        assert_problem(response, 429, "buffers_full")
        assert response.headers["retry-after"] == "1"
        assert post(running.client, GOOD).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(toy_models: Path) -> None:
    with (
        serving(Settings(models=toy_models, request_timeout_s=0.2)) as running,
        socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=20) as connection,
    ):
        connection.sendall(b"POST /v1/verdict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n")
        connection.sendall(b"Content-Length: 100\r\n\r\nabc")
        assert b"408" in connection.recv(65536).splitlines()[0]


def test_an_error_nobody_foresaw_has_an_id_and_a_problem(toy_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Settings(models=toy_models)) as running:
        monkeypatch.setattr(running.context.registry, "get", lambda *args: 1 / 0)
        for answer in (post(running.client, GOOD), running.client.get("/v1/models/toy")):
            assert_problem(answer, 500, "internal_error")


def test_an_engine_that_is_lost_answers_503_and_turns_health_red(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        assert running.client.get("/v2/health/live").status_code == 200

        def die(*args: object) -> None:
            raise SystemExit

        running.context.engine._launch = die  # type: ignore[method-assign,assignment]
        for _ in range(1 + MOST_RESTARTS):
            assert_problem(post(running.client, GOOD), 503, "engine_lost")
        running.context.engine._thread.join(10)
        for probe in ("live", "ready"):
            assert running.client.get(f"/v2/health/{probe}").status_code == 503
        assert_problem(post(running.client, GOOD), 503, "engine_lost")


def test_a_score_that_fails_answers_500_and_the_next_batch_lives(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Settings(models=toy_models)) as running:
        detector = running.context.registry.get().detector

        def fail(*args: object) -> None:
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(detector, "finish_judging", fail)
        assert_problem(post(running.client, GOOD), 500, "scoring_failed")
        monkeypatch.undo()
        assert post(running.client, GOOD).status_code == 200


def test_metrics_count_what_happened(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        form(running.client, GOOD, NOISE, GOOD[:50])
        post(running.client, b"")
        model = {"model": "toy", "version": "1", "score": "grood"}
        assert running.metric("oodgate_decisions_total", decision="accept", reason="none", **model) == 1
        assert running.metric("oodgate_decisions_total", decision="defer", reason="ood", **model) == 1
        assert running.metric("oodgate_decisions_total", decision="defer", reason="low_confidence", **model) == 0
        assert running.metric("oodgate_p_value_count", **model) == 2
        assert running.metric("oodgate_requests_rejected_total", reason="bad_image") == 1
        labels = {"handler": "/v1/verdict", "method": "POST"}
        assert running.metric("oodgate_http_requests_total", status="200", **labels) == 1
        assert running.metric("oodgate_http_requests_total", status="400", **labels) == 1
        for stage in ("read", "decode", "queue", "forward", "score", "respond"):
            assert running.metric("oodgate_stage_duration_seconds_count", stage=stage) >= 1, stage


def test_a_form_of_which_every_image_is_late_counts_each_of_them(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    with serving(Settings(models=toy_models, request_timeout_s=2.0)) as running:
        detector = running.context.registry.get().detector
        finish = detector.finish_judging
        monkeypatch.setattr(detector, "finish_judging", lambda *given: opened.wait(60) and finish(*given))
        answer = form(running.client, GOOD, NOISE)
        opened.set()
        assert_problem(answer, 504, "deadline_passed")
        assert running.metric("oodgate_requests_rejected_total", reason="deadline") == 2


def test_an_image_within_rounding_of_its_threshold_is_said_and_counted(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        assert not post(running.client, GOOD).json()["ood"]["borderline"]
        decider = running.context.registry.get().decider
        evidence = decider.thresholds[0], post(running.client, GOOD).json()["ood"]["score"]
        decider.tolerances = {decider.policy.score_name: abs(evidence[0].value - evidence[1])}
        assert post(running.client, GOOD).json()["ood"]["borderline"]
        assert running.metric("oodgate_borderline_total", model="toy", version="1", score="grood") == 1


def test_shadows_are_answered_in_the_share_that_is_set(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, shadow_ratio=0.25)) as running:
        answers = [post(running.client, GOOD).json()["ood"]["shadow"] for _ in range(8)]
    assert sum("grood_norm" in shadow for shadow in answers) == 2


def test_concurrent_callers_get_their_own_answers(shared_server: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    images, _ = toy_images(60, seed=60)
    alone = [post(shared_server.client, encoded(image)).json()["prediction"] for image in images]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda image: post(shared_server.client, encoded(image)).json()["prediction"], images))
    assert [answer["index"] for answer in together] == [answer["index"] for answer in alone]
    assert [a["confidence"] for a in together] == pytest.approx([a["confidence"] for a in alone], abs=1e-4)
