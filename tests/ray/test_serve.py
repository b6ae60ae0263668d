# SPDX-License-Identifier: Apache-2.0
"""oodgate on a real Ray Serve with two replicas. `make test-ray` runs it; it needs the extra `ray`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
import pytest

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed; `make test-ray` brings it")

from benchmarks.scaling.cluster import machine, replicas, serving  # noqa: E402
from tests.helpers import EMBEDDED, GOOD  # noqa: E402

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
