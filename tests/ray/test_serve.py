# SPDX-License-Identifier: Apache-2.0
"""oodgate on a real Ray Serve with two replicas. `make test-ray` runs it; it needs the extra `ray`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

import httpx
import pytest

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed; `make test-ray` brings it")

from benchmarks.scaling.cluster import machine, release, replicas, serving  # noqa: E402
from tests.helpers import EMBEDDED, GOOD, toy_model  # noqa: E402

PNG = {"content-type": "image/png"}
RETRIES = 3
REQUESTS = 400


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {
        "OODGATE_MODELS": str(EMBEDDED.parents[1]),
        "OODGATE_STATE_DIR": str(tmp_path_factory.mktemp("ray-state")),
        "OODGATE_ALLOW_OPEN": "true",
        "OODGATE_COMPILE": "off",
        "OODGATE_DECODE_THREADS": "1",
        "OODGATE_TORCH_THREADS": "1",
    }
    with machine(**settings), serving(2) as address:
        yield address


def test_a_verdict_comes_from_a_replica(url: str) -> None:
    answer = httpx.post(f"{url}/v1/verdict", content=GOOD, headers=PNG, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["x-oodgate-decision"] == answer.json()["decision"]


def test_a_refusal_arrives_as_it_was_written(url: str) -> None:
    answer = httpx.post(f"{url}/v1/verdict", content=b"junk", headers=PNG, timeout=60)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_both_replicas_give_the_same_verdict(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        verdicts = [client.post("/v1/verdict", content=GOOD, headers=PNG).json() for _ in range(20)]
    assert len({(each["decision"], each["ood"]["score"]) for each in verdicts}) == 1


def test_a_replica_killed_under_load_loses_no_request_that_is_sent_again(url: str) -> None:
    def ask(client: httpx.Client) -> list[int]:
        """The statuses that one request got until it was answered."""
        statuses: list[int] = []
        while len(statuses) <= RETRIES:
            statuses.append(client.post("/v1/verdict", content=GOOD, headers=PNG).status_code)
            if statuses[-1] == 200:
                break
        return statuses

    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(16) as callers:
        futures = [callers.submit(ask, client) for _ in range(REQUESTS)]
        for done, _ in enumerate(as_completed(futures), start=1):
            if done == REQUESTS // 4:
                killed = replicas()[:1]
                ray.kill(killed[0], no_restart=False)
        outcomes = [future.result() for future in futures]
    assert len(killed) == 1
    assert len(outcomes) == REQUESTS
    assert [statuses for statuses in outcomes if statuses[-1] != 200] == []
    assert {status for statuses in outcomes for status in statuses} <= {200, 500, 503}


def test_a_new_version_takes_over_replica_by_replica_without_a_lost_request(url: str, tmp_path: Path) -> None:
    toy_model(tmp_path / "toy" / "2")
    released = Event()

    def ask(client: httpx.Client) -> list[tuple[int, str]]:
        """Status and model of each answer, until some time after the release."""
        answers: list[tuple[int, str]] = []
        after = 0
        while after < 20:
            after += released.is_set()
            answer = client.post("/v1/verdict", content=GOOD, headers=PNG)
            model = answer.json().get("model", {})
            answers.append((answer.status_code, f"{model.get('name')}/{model.get('version')}"))
        return answers

    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as callers:
        asked = [callers.submit(ask, client) for _ in range(8)]
        try:
            release(2, OODGATE_MODELS=str(tmp_path))
        finally:
            released.set()
        answers = [answer for future in asked for answer in future.result()]
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {"cifar10/1", "toy/2"}
    assert {future.result()[-1] for future in asked} == {(200, "toy/2")}
