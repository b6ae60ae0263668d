# SPDX-License-Identifier: Apache-2.0
"""Heads that never end, connections that never speak, and signals, against a real socket."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service import Settings, server as serving_module
from service.server import MAX_HEAD_BYTES, Server, configured
from tests.helpers import GOOD
from tests.service.conftest import Running, serving

LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: here\r\n"


@pytest.fixture
def quick(toy_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server that gives up on slow heads at once."""
    monkeypatch.setattr(serving_module, "HEAD_SECONDS", 0.2)
    with serving(Settings(models=toy_models)) as running:
        yield running


def connect(running: Running) -> socket.socket:
    address = urlsplit(running.url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=20)


def answer(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def assert_refused(raw: bytes, status: int, code: str) -> None:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"application/problem+json" in head
    assert (json.loads(body)["status"], json.loads(body)["code"]) == (status, code)


def test_a_head_beyond_the_limit_is_refused_in_one_piece_or_in_many(shared_server: Running) -> None:
    for filler in (b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n", b"x: yyyyyyyyyyyyyyyy\r\n" * 5000):
        with connect(shared_server) as connection:
            connection.sendall(LIVE + filler + b"\r\n")
            assert_refused(answer(connection), 431, "request_header_fields_too_large")


def test_a_head_that_never_ends_is_cut_off_while_it_is_sent(shared_server: Running) -> None:
    with connect(shared_server) as connection:
        connection.sendall(LIVE + b"x: ")
        sent = 0
        try:
            while sent < 100 * MAX_HEAD_BYTES:
                connection.sendall(bytes(4096).replace(b"\x00", b"y"))
                sent += 4096
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert sent < 100 * MAX_HEAD_BYTES
    assert shared_server.client.get("/v2/health/live").status_code == 200


def test_a_head_just_within_the_limit_is_answered(shared_server: Running) -> None:
    room = MAX_HEAD_BYTES - 200
    with connect(shared_server) as connection:
        connection.sendall(LIVE + b"connection: close\r\nx: " + b"y" * room + b"\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200 ")


def test_a_body_longer_than_a_head_may_be_is_no_head(shared_server: Running) -> None:
    body = GOOD + bytes(4 * MAX_HEAD_BYTES)
    head = f"POST /v1/verdict HTTP/1.1\r\nhost: here\r\ncontent-type: image/png\r\ncontent-length: {len(body)}\r\n\r\n"
    with connect(shared_server) as connection:
        connection.sendall(head.encode() + body + LIVE + b"connection: close\r\n\r\n")
        both = answer(connection)
    assert both.count(b"HTTP/1.1 200 ") == 2


def test_a_head_that_comes_too_slowly_is_given_up(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(LIVE)
        assert_refused(answer(connection), 408, "request_timeout")


def test_a_connection_that_never_speaks_is_closed(quick: Running) -> None:
    with connect(quick) as connection:
        assert answer(connection) == b""


def test_a_slow_second_request_is_given_up_too(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(LIVE + b"\r\n")
        first = b""
        while not first.endswith(b'{"live":true}'):  # head and body may come apart
            first += connection.recv(65536)
        assert first.startswith(b"HTTP/1.1 200 ")
        connection.sendall(LIVE)
        assert_refused(answer(connection), 408, "request_timeout")


def test_garbage_and_half_closed_sockets_harm_nobody(shared_server: Running) -> None:
    with connect(shared_server) as garbage, connect(shared_server) as half:
        garbage.sendall(b"\x16\x03\x01 not http at all\r\n\r\n")
        assert answer(garbage).startswith(b"HTTP/1.1 400 ")
        half.sendall(
            b"POST /v1/verdict HTTP/1.1\r\nhost: here\r\ncontent-type: image/png\r\ncontent-length: 99\r\n\r\n"
        )
        half.shutdown(socket.SHUT_WR)
        answer(half)
    assert shared_server.client.get("/v2/health/live").status_code == 200
    assert shared_server.context.engine.depth == 0


def test_the_first_signal_drains_and_the_second_ends_the_drain(toy_models: Path) -> None:
    drained = []
    with serving(Settings(models=toy_models)) as running:
        config = configured(running.app, "127.0.0.1", 0, 1)
        stopping = Server(config, drain_s=3600, on_drain=lambda: drained.append(1))
        stopping.handle_exit(signal.SIGTERM, None)
        assert (drained, asyncio.run(stopping.on_tick(1))) == ([1], False)
        stopping.handle_exit(signal.SIGTERM, None)
        assert (drained, asyncio.run(stopping.on_tick(1))) == ([1], True)


def test_a_draining_server_is_not_ready_and_still_answers(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        running.context.lifecycle.drain()
        assert running.client.get("/v2/health/ready").status_code == 503
        assert running.client.get("/v2/health/live").status_code == 200
        answered = running.client.post("/v1/verdict", content=GOOD, headers={"content-type": "image/png"})
        assert answered.status_code == 200


@pytest.mark.parametrize("line", [b"t: " + b"x" * 4000, b"t:x\r\n" * 800], ids=["one that never ends", "many"])
@pytest.mark.parametrize("path", [b"/v1/verdict", b"/nowhere"])
def test_trailers_beyond_the_limit_end_the_connection(shared_server: Running, line: bytes, path: bytes) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: here\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n" % path
    with connect(shared_server) as connection:
        connection.sendall(head + b"%x\r\n%b\r\n0\r\n" % (len(GOOD), GOOD))
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            connection.sendall(100 * MAX_HEAD_BYTES // len(line) * line)
    with connect(shared_server) as connection:
        connection.sendall(LIVE + b"connection: close\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200")


def test_a_body_in_chunks_of_a_byte_is_taken(shared_server: Running) -> None:
    head = b"POST /v1/verdict HTTP/1.1\r\nhost: here\r\ncontent-type: image/png\r\nconnection: close\r\n"
    chunks = b"".join(b"1;an-extension=of-its-own\r\n%c\r\n" % byte for byte in GOOD)
    with connect(shared_server) as connection:
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200")
