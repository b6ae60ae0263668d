# SPDX-License-Identifier: Apache-2.0
"""The default model behind the real server process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.datasets import load
from detector.calibration import acceptance_interval, clopper_pearson
from tests.e2e.server import Process, free_port, running
from tests.helpers import EMBEDDED, GOOD, HUGE_PNG, encoded, photo, toy_images

MODELS = EMBEDDED.parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with running(MODELS) as process:
        yield process


def post(server: Process, body: bytes, kind: str = "image/png") -> dict[str, object]:
    answer = server.client.post("/v1/verdict", content=body, headers={"content-type": kind})
    body_json: dict[str, object] = answer.json()
    return body_json


def test_a_photo_gets_a_verdict(server: Process) -> None:
    verdict = post(server, encoded(photo(1024, 768), "JPEG"), "image/jpeg")
    assert verdict["decision"] in ("accept", "defer")


def test_bad_input_in_numbers_kills_nothing_and_keeps_memory_flat(server: Process) -> None:
    bad = [
        (b"", "image/png"),
        (b"plain text", "image/png"),
        (encoded(photo(600, 400), "JPEG")[:5000], "image/jpeg"),
        (HUGE_PNG, "image/png"),
        (encoded(photo(60, 40), "GIF"), "image/gif"),
        (bytes(30_000_000), "image/png"),
        (GOOD, "text/plain"),
    ]

    def round_of_all() -> None:
        for body, kind in bad:
            assert 400 <= int(str(post(server, body, kind)["status"])) < 500
        files = [("file", ("a", GOOD)), ("file", ("b", b"junk")), ("file", ("c", GOOD))]
        verdicts = server.client.post("/v1/verdict", files=files).json()["verdicts"]
        assert ["decision" in verdict for verdict in verdicts] == [True, False, True]

    for _ in range(5):
        round_of_all()
    before = server.resident_bytes()
    for _ in range(25):
        round_of_all()
    assert server.resident_bytes() - before < 40_000_000  # less than two of the 775 MB of bodies sent since


def test_a_stop_answers_everything_already_admitted() -> None:
    with running(MODELS, max_batch="2") as server:
        images = [encoded(image) for image in toy_images(48, seed=90)[0]]
        first = encoded(toy_images(1, seed=91)[0][0])
        with ThreadPoolExecutor(48) as pool:
            waiting = [pool.submit(post, server, image) for image in images]
            post(server, first)  # the others are on their way by now
            admitted = _in_progress(server)
            code = server.terminate()
            answers = [future.exception() is None and "decision" in future.result() for future in waiting]
        assert sum(answers) >= admitted
        assert code == 0
        assert any(record["message"] == "stopping" for record in server.log)


def test_the_log_is_json_with_request_ids(server: Process) -> None:
    answer = server.client.post(
        "/v1/verdict", content=GOOD, headers={"content-type": "image/png", "x-request-id": "abc-1"}
    )
    assert answer.status_code == 200
    server.client.get("/v2/health/live")  # one round trip later the record has been written
    records = [record for record in server.log if record.get("request_id") == "abc-1"]
    assert len(records) == 1
    assert (records[0]["status"], records[0]["path"]) == (200, "/v1/verdict")


@pytest.mark.data
def test_over_http_real_test_images_are_accepted_as_promised(server: Process) -> None:
    images, _ = load("cifar10-test")
    chosen = images[:1024]
    accepted = 0
    for start in range(0, len(chosen), 64):
        files = [("file", (f"{i}.png", encoded(image))) for i, image in enumerate(chosen[start : start + 64])]
        verdicts = server.client.post("/v1/verdict", files=files).json()["verdicts"]
        accepted += sum(verdict["decision"] == "accept" for verdict in verdicts)
    low, high = clopper_pearson(accepted, len(chosen), level=0.999)
    calibration = server.client.get("/v1/models/cifar10").json()["calibration"]
    promised_low, promised_high = calibration["expected_acceptance_interval"]
    assert low <= promised_high
    assert high >= promised_low
    rank_interval = acceptance_interval(4776, 5000)
    assert np.allclose(rank_interval, (promised_low, promised_high))


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("DEVICE", "cuda:99", "there is no cuda:99 here"),
        ("SHADOW_SCORES", '["nonsense"]', "nonsense"),
        ("MODELS", "nowhere", "nowhere holds no model"),
        ("DEFAULT_MODEL", "nobody", "OODGATE_DEFAULT_MODEL 'nobody'"),
    ],
)
def test_a_setting_that_fails_at_start_is_one_clear_line(setting: str, value: str, said: str) -> None:
    environment = os.environ | {"OODGATE_MODELS": str(MODELS), f"OODGATE_{setting}": value, "OODGATE_MAX_BACH": "7"}
    command = [sys.executable, "-m", "service", "serve", "--port", str(free_port())]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    records = [json.loads(line) for line in ended.stdout.splitlines()]
    errors = [record["message"] for record in records if record["level"] == "ERROR"]
    warnings = [record["message"] for record in records if record["level"] == "WARNING"]
    assert ended.returncode == 3
    assert ended.stderr == ""
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in ended.stdout
    assert len(warnings) == 1
    assert "OODGATE_MAX_BACH (did you mean OODGATE_MAX_BATCH?)" in warnings[0]


def _in_progress(server: Process) -> int:
    text = server.client.get("/metrics").text
    found = re.search(r"^oodgate_queue_depth (\S+)$", text, re.MULTILINE)
    assert found
    return int(float(found[1]))
