# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark, without a peer: its client, its arithmetic and its table."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import uvloop

from benchmarks.serving import environments, experiments, load, networks, plots, results, servers, table, usage
from benchmarks.serving.client import Client, burst, count, finished, open_loop, percentiles
from benchmarks.serving.goals import Goal, Measured, goals
from benchmarks.serving.prediction_only import PredictionOnly
from benchmarks.serving.results import COMMON, PEER_PACKAGES, efficiency
from benchmarks.serving.servers import PEERS, SERVERS
from benchmarks.serving.workloads import WORKLOADS
from detector import Detector, artifact as artifacts
from detector.artifact import read_manifest
from detector.errors import GoldenMismatch
from detector.policy import Verdict
from service.engine import Engine
from service.served import ServedModel
from tests.helpers import EMBEDDED, encoded, toy_images

RESULTS = Path(__file__).parent / "data" / "serving"  # one real run of a second on the null model
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def run() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "N.json").read_text())["runs"][0]
    return found


def test_the_section_shows_what_was_measured_and_says_what_was_not() -> None:
    section = table.section(RESULTS)
    value = efficiency(run())
    assert f"| oodgate | fp32 eager | {value:.2f} |" in section
    assert "| A: efficiency against the limit, fp32 eager | ≥ 0.95 | none | not measured |" in section


def test_only_what_is_between_the_markers_of_the_page_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n\n## Decoding\n\nkept\n")
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(table, "RESULTS", RESULTS)
    table.main()
    first = page.read_text()
    table.main()
    assert page.read_text() == first
    assert first.startswith("# Performance\n\n## Decoding\n\nkept\n\n## Serving\n\n<!-- serving -->\n")
    assert (tmp_path / "serving-N.svg").exists()


def test_results_of_another_machine_have_a_section_and_figures_of_their_own(tmp_path: Path) -> None:
    both = shutil.copytree(RESULTS, tmp_path / "results")
    shutil.copytree(RESULTS, both / "old")
    (both / "nothing measured").mkdir()
    section = table.section(both)
    own, other = section.split("### Another machine: ")
    assert "serving-N.svg" in own
    assert "serving-old-N.svg" in other
    assert "not measured" not in other
    assert {path.name for path in plots.write(both, tmp_path)} == {"serving-N.svg", "serving-old-N.svg"}


def test_results_of_two_machines_are_not_mixed_in_one_file(tmp_path: Path) -> None:
    results.check_machine(tmp_path)
    stored = json.loads((RESULTS / "N.json").read_text())
    results.write_runs(tmp_path, WORKLOADS["N"], 1.0, stored["runs"], [])
    results.check_machine(tmp_path)
    (tmp_path / "N.json").write_text(json.dumps(stored | {"machine": {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="--out"):
        results.check_machine(tmp_path)


def test_no_result_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no result"):
        table.section(tmp_path)


def test_figures_do_not_change_with_time(tmp_path: Path) -> None:
    first = plots.write(RESULTS, tmp_path)[0].read_bytes()
    assert plots.write(RESULTS, tmp_path)[0].read_bytes() == first


def test_a_goal_is_met_by_its_median() -> None:
    met = [Goal("", 0.95, None, (0.9, 0.96, 0.99)).met, Goal("", None, 30, (29, 31, 40)).met, Goal("", 1, None, ()).met]
    assert met == [True, False, None]


def test_a_ratio_to_the_best_peer_pairs_repeats_and_takes_the_best_of_each() -> None:
    def ran(server: str, repeat: int, rate: float) -> dict[str, Any]:
        closed = {"32": {"images_per_s": rate, "images_per_cpu_s": rate, "p99_ms": 1.0, "p50_ms": 1.0}}
        found = run() | {"server": server, "repeat": repeat, "closed": {"1": closed["32"], **closed}}
        found |= {"counted": {"images_per_s": rate, "images_per_cpu_s": rate, "failed": 0}}
        return found | {
            "open": {"90%": {"p99_ms": rate}, COMMON: {"p99_ms": rate / 2}},
            "limit": {"images_per_cpu_s": 10.0},
        }

    rates = {("oodgate", 0): 6, ("oodgate", 1): 8, ("mosec", 0): 3, ("mosec", 1): 1, ("ray", 0): 1, ("ray", 1): 4}
    measured = Measured({"A": [ran(server, repeat, rate) for (server, repeat), rate in rates.items()]}, [])
    rows = {row.what: list(row.values) for row in goals(measured)}
    assert rows["A: efficiency ÷ best peer, fp32 eager"] == pytest.approx([2, 2])
    assert rows["A: p99 at 90 % of its own throughput each, fp32 eager ÷ best peer's"] == pytest.approx([6, 8])
    assert rows["A: p99 at one rate for all, near 90 % of the best peer's, fp32 eager ÷ best peer's"] == pytest.approx(
        [6, 8]
    )
    assert rows["A: efficiency against the limit, fp32 eager"] == pytest.approx([0.6, 0.8])


def test_the_common_rate_is_90_percent_of_the_best_peer_s_and_stays_where_no_peer_runs_again(tmp_path: Path) -> None:
    assert results.common_rate(tmp_path, WORKLOADS["A"], []) is None
    rate = results.common_rate(tmp_path, WORKLOADS["A"], [80.0, 100.0, 95.0])
    assert rate == pytest.approx(90)
    results.write_runs(tmp_path, WORKLOADS["A"], 1.0, [run()], [], rate)
    assert results.common_rate(tmp_path, WORKLOADS["A"], []) == pytest.approx(90)


def test_the_table_says_which_share_of_the_best_peer_s_throughput_the_common_rate_was() -> None:
    def ran(server: str, repeat: int, rate: float) -> dict[str, Any]:
        figures = {"images_per_s": rate, "images_per_cpu_s": rate}
        found = run() | {"server": server, "repeat": repeat, "closed": {"32": figures}, "counted": figures}
        return found | {"open": {COMMON: {"rate": 90.0}}}

    runs = [ran("mosec", 0, 100), ran("ray", 0, 50), ran("mosec", 1, 80), ran("oodgate", 1, 500)]
    (said,) = table._common_rates("A", Measured({"A": runs}, []))
    assert said.endswith(": 90%, 112%.")


@pytest.mark.parametrize("peer", PEER_PACKAGES)
def test_every_peer_is_pinned(peer: str) -> None:
    assert peer in environments.versions(peer)
    assert all("==" in line for line in environments.requirements(peer).read_text().splitlines())


def test_every_peer_of_the_table_has_pins() -> None:
    assert all(environments.requirements(SERVERS[name].peer).exists() for name in PEERS)


@pytest.mark.parametrize(
    ("received", "status"),
    [
        (ANSWER, 200),
        (ANSWER[:-1], 0),
        (b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 503),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n", 0),
        (b"HTTP/1.1 200 OK\r\nContent-Le", 0),
    ],
)
def test_an_answer_is_finished_once_all_of_it_has_come(received: bytes, status: int) -> None:
    assert finished(bytearray(received)) == status


@asynccontextmanager
async def answering(body: bytes, after: int = 1) -> AsyncIterator[str]:
    """A server that answers requests of one body, none before so many have come."""
    come, enough = 0, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal come
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(body)) == body
                come += 1
                if come >= after:
                    enough.set()
                await enough.wait()
                writer.write(ANSWER)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predict"


def test_open_loop_latency_counts_from_the_intended_instant(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"an image")
    instants = np.cumsum(np.random.default_rng(0).exponential(1 / 100, 120))
    instants = instants[instants < 0.5]

    async def measured() -> dict[str, float]:
        async with answering(b"an image", after=len(instants)) as url:
            client = Client(url, "image/png", [body])
            found = await open_loop(client, rate=100, seconds=0.5, seed=0)
            client.close()
            return found

    found = uvloop.run(measured())
    assert (found["sent"], found["failed"]) == (len(instants), 0)
    slack = 2.0  # the timers of uvloop are whole milliseconds
    assert found["max_ms"] >= 1e3 * (instants[-1] - instants[0]) - slack  # the first waited for the last to come


def test_a_request_that_failed_took_for_ever() -> None:
    found = percentiles([0.001] * 98 + [float("inf")] * 2)
    assert (found["p90_ms"], found["p99_ms"]) == (1, float("inf"))


def test_a_count_ends_when_all_are_answered(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"x")

    async def measured() -> dict[str, float]:
        async with answering(b"x") as url:
            client = Client(url, "image/png", [body])
            found = await count(client, connections=4, requests=10)
            client.close()
            return found

    found = uvloop.run(measured())
    assert (found["answered"], found["failed"]) == (10, 0)


def test_a_burst_leaves_as_many_singles_after_it_as_before(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"x")

    async def measured() -> dict[str, list[float]]:
        async with answering(b"x") as url:
            client = Client(url, "image/png", [body])
            found = await burst(client, connections=4, requests=3, singles=5)
            client.close()
            return found

    found = uvloop.run(measured())
    assert [len(found["before_ms"]), len(found["after_ms"])] == [5, 5]


def test_a_window_lasts_until_every_connection_has_been_answered_a_few_times() -> None:
    assert load.long_enough(8, concurrency=32, images_per_s=1000) == 8
    assert load.long_enough(8, concurrency=128, images_per_s=16) == 24
    assert load.long_enough(8, concurrency=512, images_per_s=0) == load.LONGEST_S


def test_an_open_loop_lasts_until_it_has_a_99th_percentile() -> None:
    assert load.enough_sent(1, rate=1_000) == 1
    assert load.enough_sent(1, rate=20) == 6
    assert load.enough_sent(1, rate=0.01) == load.LONGEST_S


def test_a_server_is_started_measured_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [tmp_path / f"{index}" for index in range(3)]
    for path, pixels in zip(images, toy_images(3, seed=0)[0], strict=True):
        path.write_bytes(encoded(pixels))
    monkeypatch.setattr(servers, "encoded", lambda _: images)
    with servers.running(SERVERS["oodgate"], WORKLOADS["B"], "fp32") as live:
        assert live.card()["settled"]
        assert live.labels() == [verdict.prediction.index for verdict in detector().verdicts(toy_images(3, seed=0)[0])]
        found = load.open_loop(live, rate=50, seconds=0.5, seed=0)
        assert usage.cpu_seconds(live.process) > 0
        assert usage.resident_mb(live.process) > 100
    assert found["sent"] > 0
    assert found["failed"] == 0
    assert not live.process.is_running()


def detector() -> Detector:
    return Detector.load(EMBEDDED, precision="fp32")


def test_prediction_only_answers_through_the_engine_with_the_same_labels_and_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images = detector(), toy_images(4, seed=0)[0]
    wanted = [verdict.prediction.index for verdict in model.verdicts(images)]
    model.__class__ = PredictionOnly
    for score in model.fitted.values():
        monkeypatch.setattr(score, "score", lambda outputs: pytest.fail("a score was computed"))
    monkeypatch.setattr(model.decider, "decide", lambda *_: pytest.fail("something was decided"))

    async def judged() -> list[Verdict]:
        engine = Engine(max_batch=4, capacity=4, timeout_s=20, stall_s=20)
        served = ServedModel(model, model.decider)
        try:
            answers = [engine.judge(served, image, time.monotonic() + 20) for image in images]
            return [answer.verdict for answer in await asyncio.gather(*answers)]
        finally:
            await engine.close(20)

    found = asyncio.run(judged())
    assert [verdict.prediction.index for verdict in found] == wanted
    assert {verdict.decision for verdict in found} == {"accept"}


@pytest.mark.parametrize(
    ("shares", "windows"),
    [([2.0, 1.9, 0.05], 3), ([2.0, *[0.3] * 20], 1 + usage.POLLING_WINDOWS), ([0.3] * 5 + [1.0] + [0.3] * 20, 18)],
    ids=["idle", "polls", "pauses between batches"],
)
def test_a_server_has_settled_when_it_is_idle_or_only_polls(
    shares: list[float], windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = np.concatenate([[0.0], np.cumsum(shares)]) * usage.WINDOW_S
    readings = [reading for before_and_after in pairwise(total) for reading in before_and_after]
    asked = iter(readings)
    monkeypatch.setattr(usage, "cpu_seconds", lambda _: next(asked))
    monkeypatch.setattr("threading.Event", lambda: SimpleNamespace(wait=lambda _: None))
    usage.settle(psutil.Process())
    assert len(readings) - len(list(asked)) == 2 * windows


def test_prediction_only_passes_the_self_test_that_its_compiled_forward_must_pass() -> None:
    model, golden = detector(), artifacts.load(EMBEDDED).golden
    model.__class__ = PredictionOnly
    model.self_test(golden)
    golden["fp32.deferred"] = ~golden["fp32.deferred"]
    with pytest.raises(GoldenMismatch):
        model.self_test(golden)


def test_a_verdict_is_not_compared_with_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running(server: servers.Server, *_: object) -> Iterator[SimpleNamespace]:
        mode = "compiled" if server.name == "oodgate" else "eager"
        yield SimpleNamespace(forward={"precision": "fp32", "mode": mode})

    measured = {"images_per_s": 100.0, "images_per_cpu_s": 50.0}
    monkeypatch.setattr(experiments, "running", running)
    monkeypatch.setattr(load, "closed", lambda *_: measured)
    monkeypatch.setattr(load, "counted", lambda *_: measured)
    with pytest.raises(RuntimeError, match="nothing can be compared"):
        experiments.verdict(WORKLOADS["B"], "oodgate", "auto", 1)


def test_the_embedded_model_needs_no_fit() -> None:
    before = read_manifest(WORKLOADS["B"].artifact)
    networks.ensure(WORKLOADS["B"])
    assert read_manifest(WORKLOADS["B"].artifact) == before
