# SPDX-License-Identifier: Apache-2.0
"""The shipped dashboard against a real Prometheus that scrapes the real service."""

import io
import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
MODELS = ROOT / "models"
IMAGES = 12
SUBSTITUTES = {"$__rate_interval": "1m", "$__range": "5m", "$model": ".*", "$version": ".*"}

Query = Callable[[str], list[dict[str, Any]]]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="the promtool binary is not installed")


def substituted(expr: str) -> str:
    for variable, value in SUBSTITUTES.items():
        expr = expr.replace(variable, value)
    return expr


def panel_queries() -> list[Any]:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "oodgate.json").read_text())
    return [
        pytest.param(substituted(target["expr"]), id=f"{panel['title']}-{target['refId']}")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Running:
    """A command that runs for the length of the block."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log = command, log

    def __enter__(self) -> "Running":
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                log = self.log.read_text(errors="replace")[-4000:]
                pytest.fail(f"{self.command[0]}, exit status {self.process.poll()}, within {seconds:.0f} s:\n{log}")
            pause.wait(0.2)


def answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((48, 48), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def prometheus_command(folder: Path, target: str, address: str) -> list[str]:
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    derived = folder / "prometheus.yml"
    derived.write_text(yaml.safe_dump(config))
    return [
        "prometheus",
        f"--config.file={derived}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30, trust_env=False) as shared:
        yield shared


@pytest.fixture(scope="module")
def service(client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not MODELS.is_dir():
        pytest.skip("the repository's models/ is not there")
    port = free_port()
    command = [str(Path(sys.executable).with_name("oodgate")), "serve", "--models", str(MODELS)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with Running(command, tmp_path_factory.mktemp("service") / "log") as server:
        server.wait_until(lambda: answers(client, f"http://127.0.0.1:{port}/v2/health/ready"), 180)
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def query(client: httpx.Client, service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Answers queries as of one moment soon after some traffic, so that no later test looks at an emptier window."""
    if shutil.which("prometheus") is None:
        pytest.skip("the prometheus binary is not installed")
    address = f"127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("prometheus")
    moment: float | None = None

    def ask(expr: str) -> list[dict[str, Any]]:
        at = {} if moment is None else {"time": f"{moment:.3f}"}
        body = client.get(f"http://{address}/api/v1/query", params={"query": expr, **at}).json()
        assert body["status"] == "success", body
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

    with Running(prometheus_command(folder, service, address), folder / "log") as server:
        server.wait_until(lambda: answers(client, f"http://{address}/-/ready"), 60)
        # The first scrape comes before the first image: a counter's rise is seen only from a value seen before it.
        server.wait_until(lambda: bool(ask('up{job="oodgate"} == 1')), 30)
        for seed in range(IMAGES):
            headers = {"content-type": "image/png"}
            answer = client.post(f"http://{service}/v1/verdict", content=png(seed), headers=headers)
            assert answer.status_code == 200, answer.text
        server.wait_until(lambda: bool(ask(f"sum(oodgate_decisions_total) == {IMAGES}")), 30)
        moment = time.time()
        yield ask


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    check = subprocess.run(["promtool", "check", "config", str(CONFIG)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_image_is_counted_once(query: Query) -> None:
    [row] = query("sum(oodgate_decisions_total)")
    assert float(row["value"][1]) == IMAGES


@pytest.mark.parametrize("variable", ["model", "version"])
def test_dashboard_variables_have_values(query: Query, variable: str) -> None:
    values = {row["metric"].get(variable, "") for row in query("oodgate_model_ready")}
    assert values
    assert "" not in values


@pytest.mark.parametrize("expr", panel_queries())
def test_panel_shows_a_number_after_some_traffic(query: Query, expr: str) -> None:
    values = [float(row["value"][1]) for row in query(expr)]
    assert any(math.isfinite(value) for value in values), values


def test_scrape_passes_promtools_lint(client: httpx.Client, service: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("the promtool binary is not installed")
    text = client.get(f"http://{service}/metrics").text
    check = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
