# SPDX-License-Identifier: Apache-2.0
"""The real server, and a small one that answers by a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service import Settings
from tests.service.conftest import Running, serving

VERDICT: dict[str, Any] = {
    "request_id": "r-1",
    "model": {"name": "toy", "version": "1", "digest": "sha256:00"},
    "decision": "accept",
    "reason": "none",
    "prediction": {"index": 2, "label": "blue", "confidence": 0.9},
    "ood": {"score_name": "grood", "score": 0.1, "threshold": 0.2, "p_value": 0.7, "p_cutoff": 0.05},
    "timing_ms": {"total": 1.0},
}
DEFERRED = VERDICT | {"decision": "defer", "reason": "ood"}


def problem(status: int, code: str) -> dict[str, Any]:
    """A problem document as the server writes it."""
    return {"status": status, "code": code, "detail": f"because of {code}", "request_id": "r-2"}


class Scripted:
    """A real HTTP server that gives the answers it was told, in order, and keeps what it was asked.

    An answer is (status, headers, body): JSON, or text as it is. DROP breaks the connection, HANG never answers.
    """

    DROP, HANG = "drop", "hang"

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.released = threading.Event()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                scripted.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                scripted.answer(self, scripted.script.pop(0))

            do_GET = do_POST  # noqa: N815 - the library's name

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, handler: BaseHTTPRequestHandler, step: Any) -> None:
        handler.close_connection = True
        if step == self.HANG:
            self.released.wait(30)
        if step in (self.DROP, self.HANG):
            return
        status, headers, content = step
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body)), "Connection": "close"}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self._thread.join(10)
        self.server.server_close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


@pytest.fixture(scope="session")
def served(toy_models: Path) -> Iterator[Running]:
    """The real server with the toy model."""
    with serving(Settings(models=toy_models)) as running:
        yield running
