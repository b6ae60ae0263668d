# SPDX-License-Identifier: Apache-2.0
"""The shipped rules, routes and dashboards on real Prometheus and Alertmanager: a stream goes bad and well again."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.watch.stack import FACTOR, Asked, Stack, missing, panel_queries, shortened, stack, wait_until
from service.replay import Replay, images_below, stream
from tests.e2e.server import Process, free_port, running
from tests.helpers import GOOD, ROOT, encoded, toy_images

DEPLOY = ROOT / "deploy"
ALERT, DRIFT = "OodgateDeferralRateHigh", "OodgateDriftDetected"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
RATE = 40.0  # images a second; the deferral alert wants a hundred in its window, the CUSUM 700 to fall again
MINUTE = 60 / FACTOR
ALERTS: dict[str, dict[str, str]] = {ALERT: {}, DRIFT: {"test": "cusum"}}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="the promtool binary is not installed")


@dataclass(frozen=True)
class Story:
    """What was seen while the stream was well, bad, and well again."""

    stack: Stack
    metrics: str
    began: float
    turned: float  # when a fifth of the stream became OOD
    ended: float
    notified: dict[str, list[dict[str, Any]]]  # by alert

    def states(self, alert: str, **labels: str) -> list[tuple[float, str]]:
        """When the alert was in which state; the states of several tests or instances must not be mixed."""
        chosen = ",".join(f'{name}="{value}"' for name, value in {"alertname": alert, **labels}.items())
        rows = self.stack.series(f"ALERTS{{{chosen}}}", self.began, self.ended)
        return sorted((float(at), row["metric"]["alertstate"]) for row in rows for at, _ in row["values"])

    def value(self, expr: str) -> list[float]:
        """As of the end of the story, so that no later test looks at an emptier window."""
        rows = self.stack.get("query", query=expr, time=self.ended)["result"]
        return [float(row["value"][1]) for row in rows]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    for name, pixels in (("id", toy_images(300, seed=77)[0]), ("ood", noise)):
        (root / name).mkdir()
        for index, image in enumerate(pixels):
            (root / name / f"{index:03}.png").write_bytes(encoded(image))
    return root / "id", root / "ood"


class Sender:
    """Sends a stream in a thread of its own for the length of the block; `share` of it is OOD, now."""

    def __init__(self, server: Process, folders: tuple[Path, Path]) -> None:
        self.share, self.over = 0.0, False
        images, strange = map(images_below, folders)
        sendings = stream(images, strange, RATE, lambda _: self.share, seed=0)
        sending = Replay(server.url).run(takewhile(lambda _: not self.over, sendings), seconds=600)
        self._thread = threading.Thread(target=asyncio.run, args=(sending,))

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self._thread.join()


def resolved(watching: Stack, alert: str, labels: dict[str, str]) -> bool:
    return not watching.notified(alert, **labels)


@pytest.fixture(scope="module")
def story(toy_models: Path, images: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    if missing():
        pytest.skip(f"not installed: {', '.join(missing())}")
    folder = tmp_path_factory.mktemp("watch")
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with running(toy_models) as server, stack(folder, server.url.removeprefix("http://"), *addresses) as watching:
        # The first scrape comes before the first image: a counter's rise is seen only from a value seen before it.
        wait_until(lambda: watching.query("up == 1"), 20, "the target is up")
        headers = {"content-type": "image/png", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        assert server.client.post("/v1/verdict", content=GOOD, headers=headers).status_code == 200
        began = time.time()
        with Sender(server, images) as sender:
            wait_until(lambda: watching.query("model:oodgate_decisions:increase5m >= 100"), 60, "a window of images")
            turned, sender.share = time.time(), 0.2
            notified = {
                alert: wait_until(partial(watching.notified, alert, **labels), 90, f"{alert} reaches Alertmanager")
                for alert, labels in ALERTS.items()
            }
            sender.share = 0.0
            for alert, labels in ALERTS.items():
                wait_until(partial(resolved, watching, alert, labels), 90, f"{alert} resolves")
            ended = time.time()
            metrics = server.client.get("/metrics").text
        yield Story(watching, metrics, began, turned, ended, notified)


# --- the story ---


def test_every_target_is_up(story: Story) -> None:
    targets = story.stack.get("targets")["activeTargets"]
    assert [(target["labels"]["job"], target["health"]) for target in targets] == [("oodgate", "up")]


def test_every_rule_evaluates_without_error(story: Story) -> None:
    rules = [rule for group in story.stack.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 20
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.parametrize(
    "record", re.findall(r"record: (\S+)", (DEPLOY / "prometheus" / "rules" / "recording.yml").read_text())
)
def test_every_recording_rule_gives_a_number(story: Story, record: str) -> None:
    values = story.value(record)
    assert values
    assert all(map(math.isfinite, values))


@pytest.mark.parametrize(("alert", "minutes"), [(ALERT, 5), (DRIFT, 1)])
def test_the_alert_pends_then_fires_then_resolves(story: Story, alert: str, minutes: int) -> None:
    states = story.states(alert, **ALERTS[alert])
    (first, pended), (second, fired) = _runs(states)[:2]
    assert (first, second) == ("pending", "firing")
    assert pended > story.turned  # nothing while the stream was well
    assert fired - pended >= minutes * MINUTE
    last = max(at for at, state in states if state == "firing")
    assert fired < last < story.ended


@pytest.mark.parametrize(("alert", "said"), [(ALERT, "defers"), (DRIFT, "cusum says that the stream has drifted")])
def test_alertmanager_got_the_alert_for_the_receiver_that_pages(story: Story, alert: str, said: str) -> None:
    [received] = story.notified[alert]
    assert [receiver["name"] for receiver in received["receivers"]] == ["page"]
    assert received["labels"]["model"] == "toy"
    assert said in received["annotations"]["summary"]


def test_the_drift_alarm_stood_at_1_and_fell_by_itself(story: Story) -> None:
    [row] = story.stack.series('oodgate_drift_alarm{test="cusum"}', story.began, story.ended)
    values = [value for _, value in row["values"]]
    assert values[0] == "0"
    assert "0" in values[values.index("1") :]


def test_no_alert_speaks_of_errors_that_there_were_not(story: Story) -> None:
    rows = story.stack.series('ALERTS{alertstate="firing"}', story.began, story.ended)
    fired = {row["metric"]["alertname"] for row in rows}
    # At a thirtieth a scrape must come within half a second, and minutes of a full queue are seconds: on a busy machine
    # OodgateNotReady and OodgateQueueSaturated may be right.
    assert fired <= {ALERT, DRIFT, "OodgateNotReady", "OodgateQueueSaturated"}


@pytest.mark.parametrize("asked", [asked for asked in panel_queries() if asked.panel == "Request latency"])
def test_the_callers_trace_is_a_point_of_the_latency_panel(story: Story, asked: Asked) -> None:
    rows = story.stack.get("query_exemplars", query=asked.expr, start=story.began - 30, end=story.ended)
    assert TRACE in {exemplar["labels"]["trace_id"] for row in rows for exemplar in row["exemplars"]}


def _runs(states: list[tuple[float, str]]) -> list[tuple[str, float]]:
    """Each state and when it began."""
    runs: list[tuple[str, float]] = []
    for at, state in states:
        if not runs or runs[-1][0] != state:
            runs.append((state, at))
    return runs


# --- the dashboards ---


@pytest.mark.parametrize("asked", panel_queries(), ids=lambda asked: f"{asked.dashboard}-{asked.panel}-{asked.legend}")
def test_every_query_of_every_panel_returns_data(story: Story, asked: Asked) -> None:
    values = story.value(asked.expr)
    assert any(map(math.isfinite, values)), values


@pytest.mark.parametrize("variable", ["model", "version", "instance"])
def test_every_variable_of_the_dashboards_has_values(story: Story, variable: str) -> None:
    series = "oodgate_build_info" if variable == "instance" else "oodgate_model_ready"
    assert [row["metric"][variable] for row in story.stack.query(series)]


# --- the files ---


def promtool(*arguments: object, text: str | None = None) -> None:
    command = ["promtool", *map(str, arguments)]
    check = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


@needs_promtool
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


@needs_promtool
@pytest.mark.parametrize("fixture", sorted((DEPLOY / "prometheus" / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_alerts_fire_and_stay_silent_as_their_fixtures_say(fixture: Path) -> None:
    promtool("test", "rules", fixture)


@pytest.mark.skipif(shutil.which("amtool") is None, reason="the amtool binary is not installed")
@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_every_severity_has_a_receiver_of_its_name(severity: str) -> None:
    config = f"--config.file={DEPLOY / 'alertmanager' / 'alertmanager.yml'}"
    command = ["amtool", "config", "routes", "test", config, f"--verify.receivers={severity}", f"severity={severity}"]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


@needs_promtool
def test_scrape_passes_promtools_lint(story: Story) -> None:
    promtool("check", "metrics", text=story.metrics)


def test_shortening_touches_durations_alone() -> None:
    text = "for: 5m\nexpr: rate(a[1h]) / job:b:ratio_rate5m > 0.001 * 180 * 24\nscrape_interval: 15s"
    short = "for: 10000ms\nexpr: rate(a[120000ms]) / job:b:ratio_rate5m > 0.001 * 180 * 24\nscrape_interval: 500ms"
    assert shortened(text) == short
