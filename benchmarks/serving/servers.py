# SPDX-License-Identifier: Apache-2.0
"""Start a server on a workload, wait until it is ready, and stop it with everything it started."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving import environments
from benchmarks.serving.workloads import BUILD, ROOT, Workload, encoded

THREADS = 2  # of one forward pass, for every server and for the limit
HOST, POLL_S, START_S, STOP_S, PROBE_S = "127.0.0.1", 0.02, 300.0, 30.0, 5.0
SETTLE_S = 1800.0  # a forward that compiles in the background, at the lowest priority
TRIES = 3
BOUNDARY = "oodgate-benchmark"
# Of oodgate itself: what each asked precision is run with. `auto` is the server as it sets itself up.
SETTINGS = {
    "auto": {},
    "fp32": {"OODGATE_PRECISION": "fp32", "OODGATE_COMPILE": "off"},
    "bf16": {"OODGATE_PRECISION": "bf16", "OODGATE_COMPILE": "off"},
}


@dataclass(frozen=True)
class Server:
    """How one server is started and spoken to.

    Args:
        name: on the command line and in the results.
        command: from a workload and a port to the process's arguments.
        path: where images are posted.
        ready: a GET there answers 200 once the server is ready.
        form: the field of a multipart form that takes the image; the bare bytes where empty.
        peer: folder of its pins; empty for oodgate.
    """

    name: str
    command: Callable[[Workload, int], Sequence[str | Path]]
    path: str = "/predict"
    ready: str = "/health"
    form: str = ""
    peer: str = ""


def _oodgate(module: str) -> Callable[[Workload, int], Sequence[str | Path]]:
    return lambda workload, port: [
        sys.executable, "-m", module, "serve", "--models", workload.models, "--port", str(port),
    ]  # fmt: skip


def _peer(peer: str, *arguments: str) -> Callable[[Workload, int], Sequence[str | Path]]:
    return lambda workload, port: [
        environments.interpreter(peer), "-m", *(argument.format(port=port) for argument in arguments),
    ]  # fmt: skip


_PEERS = "benchmarks.serving.peers"
_UVICORN = ("uvicorn", f"{_PEERS}.fastapi.server:app", "--port", "{port}", "--log-level", "warning", "--no-access-log")
_BENTOML = ("bentoml", "serve", f"{_PEERS}.bentoml.server:Classify", "--host", HOST, "--port", "{port}", "--quiet")
_MOSEC = (f"{_PEERS}.mosec.server", "--address", HOST, "--port", "{port}", "--timeout", "120000")

SERVERS = {
    server.name: server
    for server in (
        Server("oodgate", _oodgate("service"), "/v1/verdict", "/v2/health/ready"),
        Server("litserve", _peer("litserve", f"{_PEERS}.litserve.server"), peer="litserve"),
        Server("bentoml", _peer("bentoml", *_BENTOML), ready="/readyz", form="images", peer="bentoml"),
        Server("mosec", _peer("mosec", *_MOSEC), "/inference", "/", peer="mosec"),
        Server("ray", _peer("ray", f"{_PEERS}.ray.server"), "/", "/", peer="ray"),
        Server("fastapi", _peer("fastapi", *_UVICORN), peer="fastapi"),
        Server("fastapi-2", _peer("fastapi", *_UVICORN, "--workers", "2"), peer="fastapi"),
        Server(
            "oodgate-prediction-only",
            _oodgate("benchmarks.serving.prediction_only"),
            "/v1/verdict",
            "/v2/health/ready",
        ),
    )
}
# oodgate watched from within; it stands in no table.
COSTED = Server("oodgate-cost", _oodgate("benchmarks.serving.cost"), "/v1/verdict", "/v2/health/ready")
PEERS = tuple(server.name for server in SERVERS.values() if server.peer)


@dataclass(frozen=True)
class Running:
    """A server that is ready.

    Args:
        port: of HOST.
        process: the root of its processes.
        ready_s: seconds from its start to its first ready answer.
        forward: precision and mode of its forward pass, as it says itself where it can.
        content_type, bodies: what is posted, and the files that hold it.
        network: the model's name.
    """

    server: Server
    port: int
    process: psutil.Process
    ready_s: float
    forward: dict[str, str]
    content_type: str
    bodies: tuple[Path, ...]
    network: str

    def card(self) -> dict[str, Any]:
        """What the server says of its forward now: mode, and whether it has settled."""
        return _card(self.server, self.port, self.network)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}{self.server.path}"

    def labels(self) -> list[int]:
        """The class it predicts for each of the workload's images; RuntimeError where it refuses one."""
        found = []
        for body in self.bodies:
            status, answer = self._ask_again(body)
            if status != 200:
                raise RuntimeError(f"{self.server.name} answered {status} to {body.name}")
            content = json.loads(answer)
            content = content[0] if isinstance(content, list) else content
            found.append(int(content.get("prediction", content)["index"]))
        return found

    def _ask_again(self, body: Path) -> tuple[int, bytes]:
        # A server may drop a connection that it thinks idle; that is for the load to count, not for this check.
        for _ in range(TRIES - 1):
            with suppress(ConnectionError):
                return ask(self.port, "POST", self.server.path, body.read_bytes(), self.content_type)
        return ask(self.port, "POST", self.server.path, body.read_bytes(), self.content_type)


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    content_type: str = "application/octet-stream",
    timeout: float = 120,
) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": content_type} if body is not None else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def stop_cleanly() -> None:
    """Let a benchmark that is terminated stop the server that it runs."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


@contextmanager
def running(
    server: Server, workload: Workload, precision: str, settings: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """The server, ready and settled; stopped with all its processes at the end.

    With settings, of oodgate beside those of the precision, it is only ready: it may still have to settle.
    """
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
    log = BUILD / "logs" / f"{workload.letter}-{server.name}-{precision}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = server.command(workload, port)  # a peer's environment is made here, before the clock starts
    content_type, bodies = posted(server, workload)
    started = time.monotonic()
    environment = _environment(server, workload, precision, port) | dict(settings or {})
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    root = psutil.Process(process.pid)
    try:
        _wait(lambda: _is_ready(port, server.ready), process, log)
        ready_s = time.monotonic() - started
        if settings is None and not server.peer:
            _wait(lambda: bool(_card(server, port, workload.network)["settled"]), process, log, SETTLE_S)
        forward = _checked(_card(server, port, workload.network, precision), precision)
        yield Running(server, port, root, ready_s, forward, content_type, bodies, workload.network)
    finally:
        _stop(process, root)


def posted(server: Server, workload: Workload) -> tuple[str, tuple[Path, ...]]:
    """The content type and the files of the request bodies that carry the workload's images to a server."""
    images = encoded(workload.images)
    if not server.form:
        return workload.mime, tuple(images)
    folder = BUILD / "forms" / workload.images
    folder.mkdir(parents=True, exist_ok=True)
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{server.form}"; filename="image"\r\n'
        f"Content-Type: {workload.mime}\r\n\r\n"
    ).encode()
    for image in images:
        (folder / image.name).write_bytes(head + image.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode())
    return f"multipart/form-data; boundary={BOUNDARY}", tuple(folder / image.name for image in images)


def _environment(server: Server, workload: Workload, precision: str, port: int) -> dict[str, str]:
    own = (
        {
            "PYTHONPATH": str(ROOT),
            "BENCH_ARTIFACT": str(workload.artifact),
            "BENCH_PRECISION": precision,
            "BENCH_THREADS": str(THREADS),
            "BENCH_PORT": str(port),
            "BENTOML_DO_NOT_TRACK": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # five seconds are not enough on a few cores
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
        }
        if server.peer
        else SETTINGS[precision] | {"OODGATE_TORCH_THREADS": str(THREADS)}
    )
    return passive() | own


def passive() -> dict[str, str]:
    """The environment that every measured process gets: OpenMP threads that wait without spinning."""
    return os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}


def _card(server: Server, port: int, network: str, precision: str = "") -> dict[str, Any]:
    """What the server says of its forward; of a peer, what it was asked for."""
    if server.peer:
        return {"precision": precision, "mode": "eager", "settled": True}
    found: dict[str, Any] = json.loads(ask(port, "GET", f"/v1/models/{network}")[1])["forward"]
    return found


def _checked(card: Mapping[str, Any], precision: str) -> dict[str, str]:
    forward = {name: str(card[name]) for name in ("precision", "mode")}
    if precision != "auto" and forward != {"precision": precision, "mode": "eager"}:
        raise RuntimeError(f"asked for {precision} eager, oodgate runs {forward}; see SETTINGS in {__name__}")
    return forward


def _is_ready(port: int, path: str) -> bool:
    try:
        return ask(port, "GET", path, timeout=PROBE_S)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _wait(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, patience_s: float = START_S
) -> None:
    pause, given_up = threading.Event(), time.monotonic() + patience_s
    while not condition():
        if process.poll() is not None or time.monotonic() > given_up:
            raise RuntimeError(f"the server did not become ready; {log.relative_to(ROOT)} holds what it said")
        pause.wait(POLL_S)


def _stop(process: subprocess.Popen[bytes], root: psutil.Process) -> None:
    try:
        below = root.children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(below, timeout=5)
    for child in left:
        child.kill()
    psutil.wait_procs(left, timeout=5)
