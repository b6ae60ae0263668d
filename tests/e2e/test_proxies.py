# SPDX-License-Identifier: Apache-2.0
"""The proxies of deploy/ before real servers: what oodgate says arrives, and what the caller says reaches it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.server import Process, free_port, running
from tests.helpers import EMBEDDED, GOOD

DEPLOY = Path(__file__).parents[2] / "deploy"
MODELS = EMBEDDED.parents[1]
PNG = {"content-type": "image/png"}
LIMIT = 100_000  # of a request's body at the server
HELD = 50_000  # of all bodies at once: a body between the two is one too many for now

Proxy = Callable[[list[int], Path], AbstractContextManager[str]]


def nginx_config(ports: list[int], port: int, folder: Path) -> str:
    example = (DEPLOY / "nginx" / "oodgate.conf").read_text()
    servers = "".join(f"    server 127.0.0.1:{each};\n" for each in ports)
    example = example.replace("    server 127.0.0.1:8000;\n", servers).replace(
        "listen 80;", f"listen 127.0.0.1:{port};"
    )
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    return (
        f"worker_processes 2;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{example}}}\n"
    )


@contextmanager
def nginx(ports: list[int], folder: Path) -> Iterator[str]:
    binary = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if binary is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(nginx_config(ports, port, folder))
    command = [binary, "-e", str(folder / "error.log"), "-c", str(config)]
    subprocess.run(command, check=True)  # it returns once the port is open
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([*command, "-s", "stop"], check=True)


def envoy_config(ports: list[int], port: int) -> str:
    config = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())
    [listener] = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    [cluster] = config["static_resources"]["clusters"]
    [endpoints] = cluster["load_assignment"]["endpoints"]
    endpoints["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": each}}}} for each in ports
    ]
    return yaml.safe_dump(config)


@contextmanager
def envoy(ports: list[int], folder: Path) -> Iterator[str]:
    binary = Path(sys.executable).with_name("envoy")
    if not binary.exists():
        pytest.skip("Envoy is not installed")
    port = free_port()
    config = folder / "envoy.yaml"
    config.write_text(envoy_config(ports, port))
    # Shared memory of one base id belongs to one Envoy of the machine.
    command = [str(binary), "-c", str(config), "--concurrency", "2", "--use-dynamic-base-id"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = process.stderr
        try:
            assert any("starting workers" in line for line in log), "Envoy ended before it listened"
            threading.Thread(target=log.read, daemon=True).start()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


class Recorder(ThreadingHTTPServer):
    """Keeps the headers of what it was sent, and answers 200, or hangs up."""

    daemon_threads = True

    def __init__(self, hangs_up: bool) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.seen: list[dict[str, str]] = []
        self.hangs_up = hangs_up


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Recorder

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.command in ("POST", "PUT"):
            self.server.seen.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.hangs_up:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names that the library looks for

    def log_message(self, *_: object) -> None: ...


@contextmanager
def recording(*, hangs_up: bool = False) -> Iterator[Recorder]:
    with Recorder(hangs_up) as recorder:
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        yield recorder
        recorder.shutdown()


@pytest.fixture(params=[nginx, envoy], ids=["nginx", "envoy"], scope="module")
def proxy(request: pytest.FixtureRequest) -> Proxy:
    chosen: Proxy = request.param
    return chosen


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Process]]:
    settings = {"max_body_bytes": str(LIMIT), "max_buffered_bytes": str(HELD)}
    with running(MODELS, **settings) as first, running(MODELS, **settings) as second:
        yield [first, second]


def ports_of(servers: list[Process]) -> list[int]:
    return [httpx.URL(server.url).port or 0 for server in servers]


@pytest.fixture(scope="module")
def client(proxy: Proxy, servers: list[Process], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        proxy(ports_of(servers), tmp_path_factory.mktemp("proxy")) as url,
        httpx.Client(base_url=url, timeout=60) as it,
    ):
        yield it


def judged(server: Process) -> int:
    lines = server.client.get("/metrics").text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("oodgate_decisions_total")))


def test_a_verdict_arrives_with_its_decision(client: httpx.Client) -> None:
    answer = client.post("/v1/verdict", content=GOOD, headers=PNG)
    assert answer.status_code == 200
    assert answer.headers["x-oodgate-decision"] == answer.json()["decision"]


def example(name: str) -> bytes:
    return (DEPLOY.parent / "examples" / name).read_bytes()


def test_the_gate_forwards_what_is_accepted_and_says_what_is_deferred(proxy: Proxy, tmp_path: Path) -> None:
    with (
        recording() as app,
        running(MODELS, gate_upstream=f"http://127.0.0.1:{app.server_port}") as server,
        proxy(ports_of([server]), tmp_path) as url,
        httpx.Client(base_url=url, headers=PNG, timeout=60) as client,
    ):
        accepted = client.post("/gate/classify", content=example("cat.png"))
        deferred = client.post("/gate/classify", content=example("static.png"))
    assert (accepted.status_code, accepted.headers["x-oodgate-decision"]) == (200, "accept")
    assert (deferred.status_code, deferred.headers["x-oodgate-decision"]) == (422, "defer")
    assert len(app.seen) == 1


def sent_to_the_gate(method: str, proxy: Proxy, folder: Path) -> int:
    """How many processes get a request, where each hangs up when it has read it."""
    with (
        recording(hangs_up=True) as first,
        recording(hangs_up=True) as second,
        proxy([first.server_port, second.server_port], folder) as url,
    ):
        answer = httpx.request(method, f"{url}/gate/orders", content=GOOD, headers=PNG, timeout=60)
    assert answer.json()["code"] == "not_ready"
    return len(first.seen) + len(second.seen)


def test_what_reached_a_process_through_the_gate_is_not_sent_again(proxy: Proxy, tmp_path: Path) -> None:
    assert sent_to_the_gate("POST", proxy, tmp_path) == 1


def test_nginx_alone_sends_a_put_again_because_http_calls_it_repeatable(proxy: Proxy, tmp_path: Path) -> None:
    assert sent_to_the_gate("PUT", proxy, tmp_path) == (2 if proxy is nginx else 1)


def test_a_refusal_of_the_server_arrives_as_it_was_written(client: httpx.Client) -> None:
    answer = client.post("/v1/verdict", content=bytes(LIMIT + 1), headers=PNG)
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert f"{LIMIT:,}" in answer.json()["detail"]


def test_a_full_server_says_when_to_come_back(client: httpx.Client) -> None:
    answer = client.post("/v1/verdict", content=bytes(HELD + 1), headers=PNG)
    assert answer.status_code == 429
    assert answer.json()["code"] == "buffers_full"
    assert int(answer.headers["retry-after"]) >= 1


def test_the_proxy_refuses_a_body_beyond_its_own_limit_in_the_same_form(client: httpx.Client) -> None:
    answer = client.post("/v1/verdict", content=bytes(33 * 2**20), headers=PNG)
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "body_too_large"


def test_the_callers_request_id_comes_back(client: httpx.Client) -> None:
    answer = client.post("/v1/verdict", content=GOOD, headers=PNG | {"x-request-id": "order-4711"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "order-4711"


def test_a_request_without_an_id_gets_one(client: httpx.Client) -> None:
    answer = client.post("/v1/verdict", content=GOOD, headers=PNG)
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


def test_metrics_are_not_shown_through_the_proxy(client: httpx.Client) -> None:
    assert client.get("/metrics").status_code == 404


def test_every_process_gets_its_share_and_counts_it_alone(client: httpx.Client, servers: list[Process]) -> None:
    before = [judged(server) for server in servers]
    for _ in range(20):
        client.post("/v1/verdict", content=GOOD, headers=PNG).raise_for_status()
    shares = [judged(server) - earlier for server, earlier in zip(servers, before, strict=True)]
    assert sum(shares) == 20
    assert min(shares) > 0


def test_what_the_caller_sends_reaches_the_server(proxy: Proxy, tmp_path: Path) -> None:
    sent = {
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "authorization": "Bearer secret",
        "x-request-id": "order-4711",
    }
    with recording() as upstream, proxy([upstream.server_port], tmp_path) as url:
        httpx.post(f"{url}/v1/verdict", content=GOOD, headers=PNG | sent, timeout=60).raise_for_status()
    [seen] = upstream.seen
    assert {name: seen[name] for name in sent} == sent


def test_a_process_that_is_gone_costs_no_request(proxy: Proxy, tmp_path: Path) -> None:
    with (
        running(MODELS) as staying,
        running(MODELS) as leaving,
        proxy(ports_of([staying, leaving]), tmp_path) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        client.post("/v1/verdict", content=GOOD, headers=PNG).raise_for_status()
        leaving.process.kill()
        leaving.process.wait()
        answers = [client.post("/v1/verdict", content=GOOD, headers=PNG).status_code for _ in range(20)]
    assert answers == [200] * 20


def test_with_no_process_left_the_proxy_says_so_in_the_same_form(proxy: Proxy, tmp_path: Path) -> None:
    with proxy([free_port()], tmp_path) as url:
        answer = httpx.post(f"{url}/v1/verdict", content=GOOD, headers=PNG, timeout=60)
    assert answer.status_code == 503
    assert answer.json()["code"] == "not_ready"
    assert answer.headers["retry-after"] == "1"
