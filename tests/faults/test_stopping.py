# SPDX-License-Identifier: Apache-2.0
"""The end of a server process, asked for or not: what was admitted is answered, what was whole is served again."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.e2e.server import Process, running
from tests.faults import scenarios
from tests.faults.wire import connected
from tests.helpers import GOOD
from tests.service.test_verdict import PNG

# Writes version after version of the model in the folder that it is given, until it is killed.
WRITER = """
import sys
from itertools import count
from pathlib import Path
from detector import artifact as artifacts

folder = Path(sys.argv[1])
artifact = artifacts.load(folder / "1")
for number in count(2):
    artifact.manifest = artifact.manifest.model_copy(update={"version": str(number)})
    artifacts.save(artifact, folder / str(number))
    print(number, flush=True)
"""


def test_a_stop_under_load_drains_then_closes_and_answers_all_it_admitted(toy_models: Path) -> None:
    answered: set[str] = set()
    while_draining: list[int] = []

    async def ask_until_refused(url: str, worker: int, draining: asyncio.Event) -> None:
        number = 0
        while True:
            request_id = f"{worker}-{number}"
            number += 1
            try:
                async with connected(url) as connection:
                    was_draining = draining.is_set()
                    status = (await connection.ask(scenarios.VERDICT, GOOD, request_id)).status
            except (OSError, asyncio.IncompleteReadError):
                return  # the listener is closed, or was before it took this connection
            answered.add(request_id)
            if was_draining:
                while_draining.append(status)

    async def stop(server: Process) -> None:
        draining = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for worker in range(16):
                group.create_task(ask_until_refused(server.url, worker, draining))
            async with connected(server.url) as probing:
                while len(answered) < 100:
                    assert (await probing.ask("/v2/health/ready")).status == 200
                server.process.send_signal(signal.SIGTERM)
                while (await probing.ask("/v2/health/ready")).status == 200:
                    pass
            draining.set()

    with running(toy_models, drain_seconds="2") as server:
        asyncio.run(stop(server))
        assert server.process.wait(60) == 0
        server.wait_logged(message="Finished server process")
        admitted = {str(record["request_id"]) for record in server.log if record.get("path") == scenarios.VERDICT}
        assert all(record["status"] == 200 for record in server.log if record.get("path") == scenarios.VERDICT)
    assert admitted <= answered
    assert while_draining
    assert set(while_draining) == {200}


def test_a_request_that_is_never_whole_is_told_of_the_stop(toy_models: Path) -> None:
    head = b"POST /v1/verdict HTTP/1.1\r\nhost: here\r\ncontent-type: image/png\r\ncontent-length: 999\r\n"
    with running(toy_models, shutdown_grace_s="1") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as connection:
            connection.sendall(head + b"expect: 100-continue\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")  # it waits for the body
            server.process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert server.process.wait(60) == 0
        server.wait_logged(path="/v1/verdict", status="503")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"not_ready"' in answer
    assert not [record for record in server.log if "exc_info" in record]


def test_a_kill_while_versions_are_written_and_swapped_leaves_the_last_whole_one(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "toy"
    shutil.copytree(toy, folder / "1")
    with running(folder.parent, poll_seconds="0.01") as server:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        with writer.stdout:
            server.wait_logged(message="model loaded", version="2")
            while not list(folder.glob("*.partial")):
                assert writer.stdout.readline()
            writer.kill()
            server.process.kill()
        writer.wait()
        server.process.wait()
    whole = max(int(path.parent.name) for path in folder.glob("*/manifest.json") if path.parent.name.isdigit())
    with running(folder.parent) as server:
        answer = server.client.post(scenarios.VERDICT, content=GOOD, headers=PNG)
        assert answer.status_code == httpx.codes.OK
        assert answer.json()["model"]["version"] == str(whole)
