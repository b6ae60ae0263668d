# SPDX-License-Identifier: Apache-2.0
"""What befalls the inference thread of a real server, ordered from outside: who is told what, and what recovers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.engine import MOST_FAILURES, MOST_RESTARTS
from tests.e2e.server import Process, running
from tests.faults import scenarios
from tests.faults.wire import Connection
from tests.helpers import GOOD, encoded
from tests.service.test_verdict import PNG, assert_problem

LARGEST_BATCH = 4
WHITE = encoded(np.full((32, 32, 3), 255, np.uint8))


@pytest.fixture(scope="module")
def faulty(toy_models: Path) -> Iterator[Process]:
    with running(toy_models, module="tests.faults.launcher", max_batch=str(LARGEST_BATCH)) as process:
        yield process


def order(server: Process, word: str) -> None:
    """Give the launcher a word and wait until it has been obeyed."""
    logged = len(server.log)
    assert server.process.stdin is not None
    server.process.stdin.write(word + "\n")
    server.process.stdin.flush()
    server.wait_logged(after=logged, fault=word)


def probe(server: Process, name: str) -> int:
    return server.client.get(f"/v2/health/{name}").status_code


def post(server: Process) -> int:
    return server.client.post(scenarios.VERDICT, content=GOOD, headers=PNG).status_code


@pytest.mark.parametrize(
    ("fault", "told"),
    [("exception", "injected"), ("memory", "out of memory on the device"), ("nan", "NaN or infinity")],
)
def test_failing_batches_answer_problems_and_turn_readiness_until_they_succeed(
    faulty: Process, fault: str, told: str
) -> None:
    order(faulty, fault)
    for _ in range(MOST_FAILURES):
        answer = faulty.client.post(scenarios.VERDICT, content=GOOD, headers=PNG)
        assert told in assert_problem(answer, 500, "scoring_failed")
    assert (probe(faulty, "live"), probe(faulty, "ready")) == (200, 503)
    assert "oodgate_ready 0.0" in faulty.client.get("/metrics").text
    logged = len(faulty.log)
    order(faulty, "none")
    faulty.wait_logged(after=logged, message="the engine works again")  # without a request
    assert (probe(faulty, "live"), probe(faulty, "ready"), post(faulty)) == (200, 200, 200)
    assert "oodgate_ready 1.0" in faulty.client.get("/metrics").text


def test_under_load_a_fault_costs_its_own_batches_alone(faulty: Process) -> None:
    async def load() -> Counter[int]:
        crowd = asyncio.create_task(scenarios.crowd(faulty.url, 16, 400))
        for word in ("exception", "none"):
            await asyncio.to_thread(order, faulty, word)
        return Counter(answer.status for answer, _ in await crowd)

    statuses = asyncio.run(load())
    assert statuses.keys() <= {200, 500}
    assert statuses.total() == 400
    assert post(faulty) == 200


def test_an_image_without_a_score_fails_alone_however_often_it_comes(faulty: Process) -> None:
    async def load() -> Counter[tuple[bool, int]]:
        seen: Counter[tuple[bool, int]] = Counter()

        async def work(connection: Connection, number: int) -> None:
            white = number % 3 == 0
            seen[white, (await connection.ask(scenarios.VERDICT, WHITE if white else GOOD)).status] += 1

        await scenarios.by_many(faulty.url, 16, 300, work)
        return seen

    order(faulty, "white")
    assert asyncio.run(load()) == {(True, 500): 100, (False, 200): 200}
    for _ in range(MOST_FAILURES):  # batches of it alone
        answer = faulty.client.post(scenarios.VERDICT, content=WHITE, headers=PNG)
        assert_problem(answer, 500, "scoring_failed")
    assert (probe(faulty, "live"), probe(faulty, "ready")) == (200, 200)
    files = [("file", ("f", image)) for image in (GOOD, WHITE, GOOD)]
    items = faulty.client.post(scenarios.VERDICT, files=files).json()["verdicts"]
    assert [item.get("problem", {}).get("code") for item in items] == [None, "scoring_failed", None]
    order(faulty, "none")
    assert post(faulty) == 200


def test_a_killed_inference_loop_begins_again_until_its_budget_is_spent(faulty: Process) -> None:
    async def load() -> Counter[int]:
        crowd = asyncio.create_task(scenarios.crowd(faulty.url, 16, 600))
        for _ in range(MOST_RESTARTS):
            await asyncio.to_thread(kill)
            while await asyncio.to_thread(post, faulty) != 200:  # until it has begun again
                pass
        return Counter(answer.status for answer, _ in await crowd)

    def kill() -> None:
        logged = len(faulty.log)
        order(faulty, "kill")
        faulty.wait_logged(after=logged, message="the inference loop was lost")

    statuses = asyncio.run(load())
    assert statuses.total() == 600
    assert statuses.keys() <= {200, 503}
    assert statuses[503] <= LARGEST_BATCH * MOST_RESTARTS  # what was in hand, and nobody else
    assert (probe(faulty, "live"), probe(faulty, "ready"), post(faulty)) == (200, 200, 200)
    assert f"oodgate_engine_restarts_total {MOST_RESTARTS}.0" in faulty.client.get("/metrics").text
    kill()
    faulty.wait_logged(message="too many restarts")
    assert (probe(faulty, "live"), probe(faulty, "ready")) == (503, 503)
    assert_problem(faulty.client.post(scenarios.VERDICT, content=GOOD, headers=PNG), 503, "engine_lost")
    assert faulty.terminate() == 0
