# SPDX-License-Identifier: Apache-2.0
"""The long forms of the fault tests, measured, and mixed traffic for as long as asked.

    python -m tests.faults.soak [--minutes 15] [--only overload …]

Overload needs the evaluation photos.

Writes tests/faults/results/soak.json and the table of docs/reliability.md. Ends with an error where a promise was
broken; what was measured is written all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import uvloop
from numpy.typing import NDArray

from benchmarks.serving import networks
from benchmarks.serving.workloads import WORKLOADS, Workload, encoded as encoded_files
from service.recent import SLOT_S, SLOTS
from tests.e2e.server import Process, running
from tests.faults import report, scenarios
from tests.faults.report import Result
from tests.faults.wire import Connection, at_rest, cpu_s, open_files, request, resident_bytes
from tests.helpers import EMBEDDED, GOOD, HUGE_PNG, encoded, photo

SAMPLE_S = 2.0
CONNECTIONS = 16
DEADLINE_S = 2.0  # of a request under overload


@contextmanager
def served(models: Path = EMBEDDED.parents[1], **more: str) -> Iterator[Process]:
    """A model, by default the embedded one, behind a server of its own."""
    with tempfile.TemporaryDirectory() as state, running(models, state_dir=state, **more) as server:
        yield server
        assert server.terminate() == 0


def percentile_ms(seconds: Sequence[float], q: float) -> float:
    return round(1000 * float(np.percentile(seconds, q)), 1) if seconds else 0.0


def loop_lag(server: Process) -> float:
    """Mean seconds that the event loop woke late, since the start."""
    lines = server.client.get("/metrics").text.splitlines()
    value = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("oodgate_event_loop_lag")}
    name = "oodgate_event_loop_lag_seconds"
    return value[f"{name}_sum"] / value[f"{name}_count"]


def decoding() -> Result:
    with served() as server:
        statuses, probes = asyncio.run(scenarios.decoding(server.url, 64))
        seconds = [took for _, took in probes]
        return {
            "images": statuses.total(),
            "answered": statuses[200],
            "probes": len(probes),
            "probes_failed": sum(status != 200 for status, _ in probes),
            "probe_p50_ms": percentile_ms(seconds, 50),
            "probe_p99_ms": percentile_ms(seconds, 99),
            "loop_lag_mean_ms": round(1000 * loop_lag(server), 1),
        }


def vanishing() -> Result:
    with served() as server:
        seen = asyncio.run(scenarios.vanishing(server.url, 2000))
        return {"requests": seen.total(), **{name: seen[name] for name in ("answered", "left")},
                "wrong": seen.total() - seen["answered"] - seen["left"]}  # fmt: skip


def overload(seconds: float, workload: Workload) -> Result:
    """First as much as the server does for as many callers as fill a batch, then ten times that as an open loop.

    The forward is the eager one in both: a compiled one would take its place in the middle.
    """
    networks.ensure(workload)
    bodies = [path.read_bytes() for path in encoded_files(workload.images)]
    requests = [request(scenarios.VERDICT, body, kind=workload.mime) for body in bodies]
    settings = {"request_timeout_s": str(DEADLINE_S), "queue_capacity": "64", "compile": "off"}
    with served(workload.models, **settings) as server:
        pid = server.process.pid
        asyncio.run(scenarios.crowd(server.url, 32, 200, bodies, workload.mime))  # warm
        began, used = time.monotonic(), cpu_s(pid)
        alone = asyncio.run(scenarios.crowd(server.url, 32, 1500, bodies, workload.mime))
        rate, per_cpu_s = len(alone) / (time.monotonic() - began), len(alone) / (cpu_s(pid) - used)
        memory, used = resident_bytes(pid), cpu_s(pid)
        answers = uvloop.run(scenarios.arrivals(server.url, requests, report.OVERLOAD * rate, seconds))
        asyncio.run(at_rest(server.url))
        admitted = [answer.took_s for answer in answers if answer.status == 200]
        refused = [answer.took_s for answer in answers if answer.status == 429]
        statuses = Counter(answer.status for answer in answers)
        return {
            "workload": workload.title,
            "unloaded_per_s": round(rate),
            "offered_per_s": round(report.OVERLOAD * rate),
            "seconds": seconds,
            "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "refusals_without_retry_after": sum(answer.status == 429 and not answer.told for answer in answers),
            "sent_late_p99_ms": percentile_ms([answer.late_s for answer in answers], 99),
            "refused_p99_ms": percentile_ms(refused, 99),
            "admitted_p99_ms": percentile_ms(admitted, 99),
            "deadline_ms": 1000 * DEADLINE_S,
            "unloaded_per_cpu_s": round(per_cpu_s, 1),
            "admitted_per_cpu_s": round(len(admitted) / (cpu_s(pid) - used), 1),
            "growth_mb": round((resident_bytes(pid) - memory) / 1e6, 1),
        }


def mistreatment() -> Result:
    """Bodies that never end, half-closed connections, pipelining, and ten thousand idle connections."""
    with served(request_timeout_s="5") as server:
        pid = server.process.pid
        asyncio.run(scenarios.crowd(server.url, 16, 200))
        files, memory = open_files(pid), resident_bytes(pid)
        slow, others = asyncio.run(scenarios.slow_bodies(server.url, 1000))
        ends = asyncio.run(scenarios.half_closed(server.url, 500))
        piped = asyncio.run(scenarios.pipelined(server.url, 1500))
        beside = asyncio.run(scenarios.idle(server.url, 10_000, until_closed=True))
        asyncio.run(at_rest(server.url))
        return {
            "slow": dict(slow), "beside_slow": dict(others), "half_closed": dict(ends),
            "pipelined": len(piped),
            "pipelined_in_order": [request_id for _, request_id in piped] == [f"p-{i}" for i in range(len(piped))],
            "idle": 10_000, "beside_idle": dict(beside),
            "growth_mb": round((resident_bytes(pid) - memory) / 1e6, 1),
            "open_files_more": open_files(pid) - files,
        }  # fmt: skip


def form(*bodies: bytes) -> tuple[bytes, str]:
    """A form of several files, and its content type."""
    parts = b"".join(
        b'--frontier\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n' + body + b"\r\n"
        for body in bodies
    )
    return parts + b"--frontier--\r\n", "multipart/form-data; boundary=frontier"


def mixture(model: str) -> list[tuple[bytes, int | None]]:
    """Requests of every kind, and the status each is due; None: the caller leaves before its answer.

    Args:
        model: name of a model of 32 x 32 pixels.
    """
    large, several = encoded(photo(1600, 1200), "JPEG"), form(GOOD, b"no image", GOOD)
    tensor = {"name": "image", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [7] * 3072}
    infer = json.dumps({"inputs": [tensor]}).encode()
    usual = [(request(scenarios.VERDICT, body), 200) for body in scenarios.SMALL]
    return [
        *usual, *usual,
        (request(scenarios.VERDICT, large, kind="image/jpeg"), 200),
        (request(scenarios.VERDICT, several[0], kind=several[1]), 200),
        (request(f"/v2/models/{model}/infer", infer, kind="application/json"), 200),
        (request(f"/v2/models/{model}/infer", b"{", kind="application/json"), 400),
        (request("/metrics"), 200), (request("/v2/health/ready"), 200), (request("/v1/models"), 200),
        (request(scenarios.VERDICT, large[:9000], kind="image/jpeg"), 422),
        (request(scenarios.VERDICT, HUGE_PNG), 413), (request(scenarios.VERDICT, GOOD, kind="image/gif"), 415),
        (request(scenarios.VERDICT, b""), 400), (request("/nowhere"), 404),
        (request(scenarios.VERDICT, GOOD), None), (request(scenarios.VERDICT, large, kind="image/jpeg")[:-999], None),
    ]  # fmt: skip


def mixed(minutes: float) -> Result:
    """Traffic of every kind; memory and open files sampled once the server remembers as much as it ever will."""
    kinds, fill_s = mixture("cifar10"), SLOT_S * SLOTS
    samples: list[tuple[float, int, int]] = []
    ends: Counter[str] = Counter()

    async def worker(url: str, number: int, end: float) -> None:
        generator = random.Random(number)
        connection = await Connection.open(url)
        while time.monotonic() < end:
            data, due = generator.choice(kinds)
            try:
                await connection.send(data)
                status = None if due is None else (await connection.reply()).status
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                ends["lost"] += 1
                connection = await Connection.open(url)
                continue
            ends["left" if due is None else "as due" if status == due else f"{status} instead of {due}"] += 1
            if due is None:
                connection.vanish()
                connection = await Connection.open(url)
        connection.vanish()

    async def sample(pid: int, end: float) -> None:
        await asyncio.sleep(fill_s)
        while time.monotonic() < end:
            samples.append((time.monotonic(), resident_bytes(pid), open_files(pid)))
            await asyncio.sleep(SAMPLE_S)

    async def traffic(server: Process) -> None:
        end = time.monotonic() + fill_s + 60 * minutes
        async with asyncio.TaskGroup() as group:
            group.create_task(sample(server.process.pid, end))
            for number in range(CONNECTIONS):
                group.create_task(worker(server.url, number, end))
        await at_rest(server.url)

    with served() as server:
        server.wait_logged(600, logger="detector.settling")  # the compiled forward takes its room once
        asyncio.run(traffic(server))
        worrying = Counter(str(record["message"]) for record in server.log if record["level"] in ("ERROR", "CRITICAL"))
        files_after = open_files(server.process.pid)
    seen = np.array(samples)
    slope, error = slope_of(seen[:, 0], seen[:, 1])
    return {
        "minutes": minutes + fill_s / 60,
        "requests": ends.total(),
        "ends": dict(ends.most_common()),
        "lost": ends.total() - ends["as due"] - ends["left"],
        "errors_logged": dict(worrying),
        "resident_mb": {"first": round(seen[0, 1] / 1e6, 1), "last": round(seen[-1, 1] / 1e6, 1)},
        "resident_slope_mb_per_h": round(3600 * slope / 1e6, 2),
        "resident_slope_error_mb_per_h": round(3600 * error / 1e6, 2),
        "open_files": {"least": int(seen[:, 2].min()), "most": int(seen[:, 2].max()), "after": files_after},
    }


def slope_of(times: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float]:
    """Least-squares slope and its standard error; neighbouring samples depend on each other, so blocks of ten count."""
    blocks = max(3, len(times) // 10)
    t = np.array([part.mean() for part in np.array_split(times, blocks)])
    v = np.array([part.mean() for part in np.array_split(values, blocks)])
    centred = t - t.mean()
    slope = float((centred * v).sum() / (centred**2).sum())
    residual = v - v.mean() - slope * centred
    return slope, float(np.sqrt((residual**2).sum() / (blocks - 2) / (centred**2).sum()))


def machine() -> Result:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(), "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "load": round(os.getloadavg()[0], 1), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15, help="of mixed traffic, behind those that fill")
    parser.add_argument("--overload", type=float, default=60, help="seconds of overload")
    parser.add_argument("--only", nargs="+", help="stages to measure again; the others stay as they are stored")
    arguments = parser.parse_args()
    result: Result = json.loads((report.RESULTS / "soak.json").read_text()) if arguments.only else {}
    result["machine"] = machine()
    stages: dict[str, Callable[[], Result]] = {
        "decoding": decoding,
        "vanishing": vanishing,
        "overload": lambda: overload(arguments.overload, WORKLOADS["A"]),
        "overload_small": lambda: overload(arguments.overload, WORKLOADS["B"]),
        "mistreatment": mistreatment,
        "mixed": lambda: mixed(arguments.minutes),
    }
    for name in arguments.only or stages:
        result[name] = stages[name]()
        sys.stdout.write(json.dumps({name: result[name]}) + "\n")
        sys.stdout.flush()
    result = json.loads(json.dumps(result))  # as it is read again
    result["promises"] = {promise: bool(kept(result)) for promise, kept in report.PROMISES}
    report.write("soak", result)
    report.require(result)


if __name__ == "__main__":
    main()
