# SPDX-License-Identifier: Apache-2.0
"""A real server on a real socket, in a thread."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import Settings, create_app
from service.context import Context
from service.server import Server, configured


class Running:
    """A served app: a client bound to it, and its parts."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self._up = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        lifecycle = self.app.state.lifecycle
        self.server = Server(configured(self.app, "127.0.0.1", 0, 20), drain_s=0, on_drain=lifecycle.drain)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        startup = self.server.startup

        async def announced(sockets: list[socket.socket] | None = None) -> None:
            await startup(sockets)
            self._up.set()

        self.server.startup = announced  # type: ignore[method-assign]
        self.server.run([self._socket])
        self._up.set()

    def start(self) -> None:
        self._thread.start()
        assert self._up.wait(60)
        assert self.server.started, "the app refused to start"
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.client.close()

    @property
    def context(self) -> Context:
        context: Context = self.app.state.context
        return context

    def metric(self, name: str, **labels: str) -> float:
        value = self.context.metrics.registry.get_sample_value(name, labels)
        assert value is not None, f"no series {name} {labels}"
        return value


Serve = Callable[..., Any]


@contextmanager
def serving(settings: Settings) -> Iterator[Running]:
    running = Running(settings)
    running.start()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def shared_server(toy_models: Path) -> Iterator[Running]:
    """One server for tests that only ask."""
    with serving(Settings(models=toy_models)) as running:
        yield running


@pytest.fixture
def client(shared_server: Running) -> httpx.Client:
    return shared_server.client


@pytest.fixture
def models(toy: Path, tmp_path: Path) -> Path:
    """A folder of models that a test may change."""
    shutil.copytree(toy, tmp_path / "models" / "toy" / "1")
    return tmp_path / "models"
