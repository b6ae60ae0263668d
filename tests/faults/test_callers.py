# SPDX-License-Identifier: Apache-2.0
"""Callers who leave, dawdle, flood and speak out of turn. Times and ratios are measured by `make soak`."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detector.detector import Scored
from detector.images import Pixels, decode
from detector.policy import Decider, Verdict
from service import Settings, judging
from tests.e2e.server import Process
from tests.faults import scenarios
from tests.faults.wire import connected, open_files, request, resident_bytes
from tests.helpers import GOOD, encoded, photo
from tests.service.conftest import serving
from tests.service.test_gate import gated
from tests.service.test_verdict import PNG


def test_large_images_are_all_judged_while_every_probe_is_answered(server: Process) -> None:
    statuses, probes = asyncio.run(scenarios.decoding(server.url, 64))
    assert statuses == {200: 64}
    assert {status for status, _ in probes} == {200}
    assert len(probes) > 64  # they were not kept waiting for the images
    lag = re.search(r"^oodgate_event_loop_lag_seconds_count (\S+)", server.client.get("/metrics").text, re.M)
    assert lag is not None
    assert float(lag[1]) > 0


def test_callers_who_leave_cost_nobody_an_answer_and_leave_nothing_behind(server: Process) -> None:
    logged = len(server.log)
    seen = asyncio.run(scenarios.vanishing(server.url, 600))
    assert seen.keys() == {"answered", "left"}
    assert seen.total() == 600
    server.client.post(scenarios.VERDICT, content=GOOD, headers=PNG | {"x-request-id": "the-last"})
    server.wait_logged(after=logged, request_id="the-last")
    ids = Counter(str(record.get("request_id")) for record in server.log[logged:] if record.get("status") == 200)
    assert sum(request_id.startswith("v-") for request_id in ids) >= seen["answered"]
    assert set(ids.values()) == {1}
    assert not any(record["level"] in ("ERROR", "CRITICAL") for record in server.log[logged:])


@pytest.mark.parametrize(
    ("path", "handler"), [(scenarios.VERDICT, scenarios.VERDICT), ("/gate/predict", "/gate/{path:path}")]
)
def test_what_was_asked_by_somebody_who_left_is_not_computed(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch, path: str, handler: str
) -> None:
    opened, judged = threading.Event(), []

    async def leave(url: str, depth: Callable[[], int]) -> None:
        async with connected(url) as staying, connected(url) as leaving, connected(url) as other:

            async def until(images: int) -> None:
                while depth() != images:
                    await other.ask(scenarios.LIVE)

            await staying.send(request(path, GOOD))
            await until(1)
            await leaving.send(request(path, GOOD))
            await until(2)
            leaving.vanish()
            await until(1)  # its place is free at once, though the network is still busy with another
            opened.set()
            assert (await staying.reply()).status == 200

    with gated(toy_models, max_batch=1) as (running, _):
        detector = running.context.registry.get().detector
        finish = detector.finish_judging

        def slowly(scored: Scored, decider: Decider) -> list[Verdict]:
            assert opened.wait(60)
            verdicts = finish(scored, decider)
            judged.append(len(verdicts))
            return verdicts

        monkeypatch.setattr(detector, "finish_judging", slowly)
        asyncio.run(leave(running.url, lambda: running.context.engine.depth))
        assert running.client.post(path, content=GOOD, headers=PNG).status_code == 200
        assert judged == [1, 1]
        labels = {"handler": handler, "method": "POST"}
        assert running.metric("oodgate_http_requests_total", status="499", **labels) == 1
        assert running.metric("oodgate_gate_requests_total", outcome="left") == path.startswith("/gate/")


def test_what_somebody_who_left_wanted_explained_is_neither_decoded_nor_explained(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, opened, decoded = threading.Event(), threading.Event(), list[bytes]()
    path = "/v1/explain"

    def held(data: bytes, *rest: Any) -> Pixels:
        decoded.append(data)
        entered.set()
        assert opened.wait(60)
        return decode(data, *rest)

    async def leave(url: str, left: Callable[[], bool]) -> None:
        async with connected(url) as staying, connected(url) as leaving, connected(url) as other:
            await staying.send(request(path, GOOD))
            assert await asyncio.to_thread(entered.wait, 60)
            await leaving.send(request(path, GOOD))
            await other.ask(scenarios.LIVE)  # behind the other's head
            leaving.vanish()
            while not left():
                await other.ask(scenarios.LIVE)
            opened.set()
            assert (await staying.reply()).status == 200
            assert (await other.ask(path, GOOD)).status == 200

    monkeypatch.setattr("service.routes.explain.decode", held)
    with serving(Settings(models=toy_models)) as running:
        labels = {"handler": path, "method": "POST", "status": "499"}
        value = running.context.metrics.registry.get_sample_value
        asyncio.run(leave(running.url, lambda: value("oodgate_http_requests_total", labels) == 1))
    assert len(decoded) == 2


def test_what_waits_beyond_four_batches_waits_encoded(toy_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [("file", encoded(photo(300, 200, seed))) for seed in range(12)]
    decoded: list[int] = []  # images judged before each
    judged, four = list[int](), threading.Event()

    def counted(*args: Any) -> Pixels:
        decoded.append(len(judged))
        if len(decoded) == 4:
            four.set()
        return decode(*args)

    with serving(Settings(models=toy_models, max_batch=1)) as running:
        detector = running.context.registry.get().detector
        finish = detector.finish_judging

        def finished(scored: Scored, decider: Decider) -> list[Verdict]:
            assert four.wait(60)
            judged.append(1)
            return finish(scored, decider)

        monkeypatch.setattr(detector, "finish_judging", finished)
        monkeypatch.setattr(judging, "decode", counted)
        answer = running.client.post(scenarios.VERDICT, files=files)
    assert {verdict["decision"] for verdict in answer.json()["verdicts"]} <= {"accept", "defer"}
    assert len(decoded) == len(judged) == len(files)
    assert all(before - answered < 4 for before, answered in enumerate(decoded))


def test_bodies_that_never_end_are_given_up_and_harm_nobody(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, request_timeout_s=1)) as running:
        slow, others = asyncio.run(scenarios.slow_bodies(running.url, 50))
        assert slow == {408: 50}
        assert others.keys() == {200}
        assert running.context.engine.depth == 0


def test_half_closed_connections_end_and_leave_nothing_behind(server: Process) -> None:
    ends = asyncio.run(scenarios.half_closed(server.url, 100))
    assert ends.total() == 100
    assert ends.keys() <= {"200", "closed"}


def test_pipelined_requests_are_answered_in_their_order(server: Process) -> None:
    answers = asyncio.run(scenarios.pipelined(server.url, 150))
    assert [request_id for _, request_id in answers] == [f"p-{number}" for number in range(150)]
    assert [status for status, _ in answers] == [200, 200, 422] * 50


def test_idle_connections_are_cheap_and_others_are_served_meanwhile(server: Process) -> None:
    pid = server.process.pid
    memory, files = resident_bytes(pid), open_files(pid)
    statuses = asyncio.run(scenarios.idle(server.url, 500, until_closed=False))
    assert statuses.keys() == {200}
    assert resident_bytes(pid) - memory < 500 * 50_000
    asyncio.run(scenarios.pipelined(server.url, 3))  # behind the closing of the others
    assert open_files(pid) <= files + 1


def test_ten_times_as_many_callers_as_places_are_told_to_wait_or_get_their_verdict(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, queue_capacity=8, max_images=8)) as running:
        answers = [answer for answer, _ in asyncio.run(scenarios.crowd(running.url, 80, 800))]
        statuses = Counter(answer.status for answer in answers)
        assert statuses.keys() <= {200, 429}
        assert statuses.total() == 800
        assert min(statuses[200], statuses[429]) > 0
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status == 429)
        assert running.metric("oodgate_requests_rejected_total", reason="queue_full") == statuses[429]
        assert running.context.engine.depth == 0


def test_an_admitted_request_that_is_late_gets_504_and_the_next_its_verdict(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, request_timeout_s=0.001)) as running:
        answers = [answer for answer, _ in asyncio.run(scenarios.crowd(running.url, 40, 200))]
        assert {answer.status for answer in answers} <= {200, 504}
        assert 504 in {answer.status for answer in answers}
        assert {answer.json["code"] for answer in answers if answer.status == 504} == {"deadline_passed"}
        assert running.context.engine.depth == 0


def test_the_deadline_counts_from_the_head_however_slowly_the_body_comes(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, timeout_s = threading.Event(), 2.0

    async def dawdle(url: str) -> tuple[int, float]:
        data = request(scenarios.VERDICT, GOOD)
        async with connected(url) as slow, connected(url) as other:
            began = time.monotonic()
            await slow.send(data[:-1])
            while time.monotonic() - began < 0.75 * timeout_s:
                await other.ask(scenarios.LIVE)
            await slow.send(data[-1:])
            return (await slow.reply()).status, time.monotonic() - began

    with serving(Settings(models=toy_models, request_timeout_s=timeout_s)) as running:
        monkeypatch.setattr(running.context.registry.get().detector, "finish_judging", lambda *_: opened.wait(60))
        status, took = asyncio.run(dawdle(running.url))
        opened.set()
    assert status == 504
    assert took < 1.5 * timeout_s  # 1.75 if it counted from the body's end


def test_an_image_whose_turn_to_be_decoded_never_comes_is_late_at_its_deadline(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    def stuck(*args: Any) -> Any:
        assert opened.wait(60)
        return decode(*args)

    async def ask(url: str) -> list[int]:
        async with connected(url) as first, connected(url) as second:
            asked = (one.ask(scenarios.VERDICT, scenarios.LARGE_JPEG, kind="image/jpeg") for one in (first, second))
            return [answer.status for answer in await asyncio.gather(*asked)]

    monkeypatch.setattr("service.judging.decode", stuck)
    with serving(Settings(models=toy_models, request_timeout_s=0.5, decode_threads=1)) as running:
        assert asyncio.run(ask(running.url)) == [504, 504]  # while the decoder is stuck
        opened.set()
