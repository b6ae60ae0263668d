# SPDX-License-Identifier: Apache-2.0
"""Requests that there is no room for: answered at their head, and what then comes of their bodies."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from service import Settings, server as serving_module
from service.middleware import Observe
from tests.helpers import GOOD
from tests.service.conftest import Running, serving
from tests.service.test_oip import INFER
from tests.service.test_protocol import LIVE, answer, connect
from tests.service.test_security import bearer, sha256
from tests.service.test_verdict import PNG, assert_problem


@contextmanager
def full(running: Running) -> Iterator[None]:
    """The server with no room left."""
    engine = running.context.engine
    with engine.admit(engine.capacity - engine.depth):
        yield


def head(length: int, *more: str, path: str = "/v1/verdict", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: here", "content-type: image/png", f"content-length: {length}", *more]
    return "\r\n".join((*lines, "", "")).encode()


def reply(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """The next answer: status, headers in lower case, JSON."""
    raw = b""
    while not raw.endswith(b"\r\n\r\n"):
        raw += received(connection, 1)
    first, *lines = raw.decode().rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = b""
    while missing := int(headers["content-length"]) - len(body):
        body += received(connection, missing)
    return int(first.split()[1]), headers, json.loads(body)


def received(connection: socket.socket, most: int) -> bytes:
    part = connection.recv(most)
    assert part, "closed instead of answered"
    return part


def test_a_full_server_answers_the_head_and_the_connection_lives_on(shared_server: Running) -> None:
    with connect(shared_server) as connection:
        with full(shared_server):
            connection.sendall(head(1_000_000, "x-request-id: mine"))
            status, headers, problem = reply(connection)  # before any of the body
            assert (status, problem["code"], problem["instance"]) == (429, "queue_full", "/v1/verdict")
            assert (headers["x-request-id"], problem["request_id"]) == ("mine", "mine")
            assert int(headers["retry-after"]) == problem["retry_after_s"] >= 1
            assert "date" in headers
        connection.sendall(bytes(1_000_000) + head(len(GOOD)) + GOOD)
        assert reply(connection)[0] == 200


def test_who_is_turned_away_reaches_no_route(toy_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    async def observe(self: Observe, scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])

    with serving(Settings(models=toy_models)) as running, full(running):
        monkeypatch.setattr(Observe, "__call__", observe)
        assert running.client.post("/v1/verdict", content=GOOD, headers=PNG).status_code == 429
        assert reached == []


def test_the_door_says_what_the_routes_say_that_stand_behind_it(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Settings(models=toy_models)) as running, full(running):
        asked: dict[str, Any] = {"content": GOOD, "headers": PNG | {"x-request-id": "same"}}
        at_the_door = running.client.post("/v1/verdict", **asked)
        monkeypatch.setattr("service.door.Door.refusal", lambda *_: None)
        behind_it = running.client.post("/v1/verdict", **asked)
        assert_problem(behind_it, 429, "queue_full")
        assert at_the_door.json() == behind_it.json()
        same = ("content-type", "content-length", "retry-after", "x-request-id")
        assert [at_the_door.headers[name] for name in same] == [behind_it.headers[name] for name in same]


def test_who_is_turned_away_is_counted_and_on_record(toy_models: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with serving(Settings(models=toy_models)) as running, full(running), caplog.at_level(logging.INFO):
        sent = PNG | {"x-request-id": "away", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        for path in ("/v1/verdict", "/v1/models/toy/verdict?x=1", "/v1/models/toy/versions/1/verdict", INFER):
            assert_problem(running.client.post(path, content=GOOD, headers=sent), 429, "queue_full")
        for handler in ("/v1/verdict", "/v1/models/{name}/verdict", "/v2/models/{name}/infer"):
            labels = {"handler": handler, "method": "POST"}
            assert running.metric("oodgate_http_requests_total", status="429", **labels) == 1
            assert running.metric("oodgate_http_request_duration_seconds_count", **labels) == 1
        assert running.metric("oodgate_requests_rejected_total", reason="queue_full") == 4
        (record,) = (vars(r) for r in caplog.records if vars(r).get("path") == "/v1/verdict")
        assert (record["request_id"], record["status"], record["trace_id"]) == ("away", 429, trace)


def test_who_has_no_token_is_not_told_how_full_the_server_is(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, tokens={"camera": sha256("one")})) as running, full(running):
        assert_problem(running.client.post("/v1/verdict", content=GOOD, headers=PNG), 401, "unauthorized")
        assert_problem(running.client.post("/v1/verdict", content=GOOD, headers=bearer("one")), 429, "queue_full")


def test_other_requests_are_answered_while_the_server_is_full(shared_server: Running) -> None:
    with full(shared_server), connect(shared_server) as connection:
        connection.sendall(LIVE + b"\r\n" + head(4) + b"body" + LIVE + b"\r\n")
        assert [reply(connection)[0] for _ in range(3)] == [200, 429, 200]


@pytest.mark.parametrize(
    "asked", [head(4, "connection: close") + b"body", head(4, version="1.0") + b"body", head(4, "expect: 100-continue")]
)
def test_a_connection_that_cannot_be_kept_is_closed_behind_the_refusal(shared_server: Running, asked: bytes) -> None:
    with full(shared_server), connect(shared_server) as connection:
        connection.sendall(asked)
        raw = answer(connection)
    assert raw.startswith(b"HTTP/1.1 429 ")
    assert raw.lower().count(b"connection: close") == 1


def refused_at_the_door(running: Running, connection: socket.socket) -> None:
    with full(running):
        connection.sendall(head(10**9))
        assert reply(connection)[0] == 429


def refused_behind_it(running: Running, connection: socket.socket) -> None:
    connection.sendall(head(10**12))
    assert reply(connection)[0] == 413


REFUSED = pytest.mark.parametrize("refused", [refused_at_the_door, refused_behind_it])


@REFUSED
def test_a_body_that_dawdles_on_behind_its_answer_is_given_up(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setattr(serving_module, "SURPLUS_SECONDS", 0.2)
    with serving(Settings(models=toy_models)) as running:
        running.server.config.timeout_keep_alive = 3600
        with connect(running) as connection:
            refused(running, connection)
            connection.sendall(b"some of it")
            assert answer(connection) == b""


@REFUSED
def test_a_body_that_runs_on_behind_its_answer_is_cut_off(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setattr(serving_module, "SURPLUS_BYTES", 100_000)
    with serving(Settings(models=toy_models)) as running, connect(running) as connection:
        refused(running, connection)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(bytes(10**8))


def test_a_connection_whose_body_ended_behind_its_answer_is_not_idle_for_ever(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        running.server.config.timeout_keep_alive = 0.5  # type: ignore[assignment]
        with connect(running) as connection:
            with full(running):
                connection.sendall(head(10))
                assert reply(connection)[0] == 429
            connection.sendall(b"0123456789")
            assert answer(connection) == b""
