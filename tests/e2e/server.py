# SPDX-License-Identifier: Apache-2.0
"""The real `oodgate serve`, as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


class Process:
    """A running server: its client, and its log as it comes."""

    def __init__(self, models: Path, module: str = "service", **settings: str) -> None:
        port = free_port()
        self.log: list[dict[str, object]] = []
        self._grown, self._ended = threading.Condition(), threading.Event()
        environment = os.environ | {f"OODGATE_{name.upper()}": value for name, value in settings.items()}
        command = [sys.executable, "-m", module, "serve", "--models", str(models), "--port", str(port)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                record = json.loads(line)  # every line of the log is JSON
                with self._grown:
                    self.log.append(record)
                    self._grown.notify_all()
        with self._grown:
            self._ended.set()
            self._grown.notify_all()

    def wait_ready(self, seconds: float = 300) -> None:
        self.wait_logged(seconds, message="Uvicorn running")

    def wait_logged(self, seconds: float = 60, *, after: int = 0, **fields: str) -> None:
        """Wait for a record, behind the first `after` ones, whose fields start so."""

        def logged() -> bool:
            return any(
                all(str(record.get(name)).startswith(value) for name, value in fields.items())
                for record in self.log[after:]
            )

        with self._grown:
            assert self._grown.wait_for(lambda: logged() or self._ended.is_set(), seconds), fields
        assert logged(), self.log

    def resident_bytes(self) -> int:
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith("process_resident_memory_bytes "):
                return int(float(line.split()[1]))
        raise AssertionError("no resident memory in the metrics")

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._reader.join(10)
        self.client.close()


@contextmanager
def running(models: Path, module: str = "service", **settings: str) -> Iterator[Process]:
    server = Process(models, module, **settings)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()
