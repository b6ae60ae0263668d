# SPDX-License-Identifier: Apache-2.0
"""Prometheus and Alertmanager on the shipped configuration, every duration a thirtieth: minutes pass in two seconds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
FACTOR = 30
PROMETHEUS, ALERTMANAGER = "prometheus", "prometheus-alertmanager"
BINARIES = (PROMETHEUS, ALERTMANAGER)

_DURATION = re.compile(r"(?<![\w.])(\d+)(ms|s|m|h|d)(?!\w)")  # not the 5m of a rule's name
_MILLISECONDS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def shortened(text: str) -> str:
    """The same configuration with all durations divided by `FACTOR`."""
    return _DURATION.sub(lambda found: f"{int(found[1]) * _MILLISECONDS[found[2]] // FACTOR}ms", text)


def missing() -> list[str]:
    """Binaries that are not installed."""
    return [name for name in BINARIES if shutil.which(name) is None]


@contextmanager
def process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs for the length of the block."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                running.kill()


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What the condition gives once it is true; TimeoutError says what was waited for."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        pause.wait(0.1)


def answers(url: str) -> bool:
    """Whether the address answers 200."""
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Stack:
    """What runs: the addresses, and how to ask them."""

    prometheus: str
    alertmanager: str

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of Prometheus; RuntimeError where it refuses."""
        body = httpx.get(f"http://{self.prometheus}/api/v1/{path}", params=parameters, trust_env=False).json()
        if body["status"] != "success":
            raise RuntimeError(f"{path} {parameters}: {body}")
        return body["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an expression now."""
        rows: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return rows

    def series(self, expr: str, start: float, end: float, step: float = 0.25) -> list[dict[str, Any]]:
        """The series of an expression over time."""
        rows: list[dict[str, Any]] = self.get("query_range", query=expr, start=start, end=end, step=step)["result"]
        return rows

    def notified(self, alert: str, **labels: str) -> list[dict[str, Any]]:
        """Alerts of that name, and with these labels, that stand in Alertmanager."""
        filters = [f'{name}="{value}"' for name, value in {"alertname": alert, **labels}.items()]
        parameters = {"filter": filters, "active": "true"}
        address = f"http://{self.alertmanager}/api/v2/alerts"
        rows: list[dict[str, Any]] = httpx.get(address, params=parameters, trust_env=False).json()
        return rows


@contextmanager
def stack(folder: Path, service: str, prometheus: str, alertmanager: str) -> Iterator[Stack]:
    """Run both on these addresses (HOST:PORT), watching the service, until the block ends."""
    addresses = {"oodgate:8000": service, "alertmanager:9093": alertmanager}
    for source in [
        *DEPLOY.glob("prometheus/*.yml"),
        *DEPLOY.glob("prometheus/rules/*.yml"),
        *DEPLOY.glob("alertmanager/*.yml"),
    ]:
        text = shortened(source.read_text())
        for shipped, real in addresses.items():
            text = text.replace(shipped, real)
        copy = folder / source.relative_to(DEPLOY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    commands = {
        PROMETHEUS: [
            f"--config.file={folder / 'prometheus' / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'prometheus-data'}",
            f"--web.listen-address={prometheus}",
            "--enable-feature=exemplar-storage",
        ],
        ALERTMANAGER: [
            f"--config.file={folder / 'alertmanager' / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alertmanager-data'}",
            f"--web.listen-address={alertmanager}",
            "--cluster.listen-address=",
        ],
    }
    with ExitStack() as running:
        for binary, arguments in commands.items():
            running.enter_context(process([binary, *arguments], folder / f"{binary}.log"))
        for address in (prometheus, alertmanager):
            wait_until(partial(answers, f"http://{address}/-/ready"), 30, f"{address} ready")
        yield Stack(prometheus, alertmanager)


@dataclass(frozen=True)
class Asked:
    """One query of one panel, with its variables filled in."""

    dashboard: str
    panel: str
    legend: str
    expr: str


def panel_queries(window: str = "20s") -> list[Asked]:
    """Every query of every panel of the dashboards; all models, versions and instances."""
    filled = {"$__rate_interval": window, "$model": ".*", "$version": ".*", "$instance": ".*"}
    asked = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                expr = target["expr"]
                for variable, value in filled.items():
                    expr = expr.replace(variable, value)
                asked.append(Asked(path.stem, panel["title"], target["legendFormat"], expr))
    return asked
