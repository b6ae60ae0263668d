# SPDX-License-Identifier: Apache-2.0
"""What one number per server cannot show: a burst, a busy neighbour, growth, what the verdict costs, and settling.

    python -m benchmarks.serving.experiments --workload A --repeats 3 --seconds 8 [--kind burst …] [--server NAME …]

Writes benchmarks/serving/results/experiments.json, one entry for each kind, workload, server and precision.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.serving import load, networks, results
from benchmarks.serving.run import LEAST_COUNTED, PRECISIONS, SATURATED, WARM_S
from benchmarks.serving.servers import SERVERS, running, stop_cleanly
from benchmarks.serving.usage import resident_mb
from benchmarks.serving.workloads import WORKLOADS, Workload

BURST_REQUESTS, SINGLES = 8, 30
HALF, MOST_LOADS = 0.5, 200
GROWTH = (32, 64, 128, 256, 512)


def burst(workload: Workload, server: str, precision: str, seconds: float) -> dict[str, Any]:
    """Latency of single requests before a burst at concurrency 32 and right after it."""
    with running(SERVERS[server], workload, precision) as live:
        load.closed(live, SATURATED, WARM_S)
        return load.burst(live, SATURATED, BURST_REQUESTS, SINGLES)


def neighbour(workload: Workload, server: str, precision: str, seconds: float) -> dict[str, Any]:
    """Throughput alone, and beside a process that spins on one core.

    The neighbour takes at most half of its core from a server that wants all of it, so a fair share of what the server
    does alone is (cores - 1/2) / cores.
    """
    with running(SERVERS[server], workload, precision) as live:
        load.closed(live, SATURATED, WARM_S)
        alone = load.closed(live, SATURATED, seconds)
        with spinning(core=0):
            beside = load.closed(live, SATURATED, seconds)
    cores = os.cpu_count() or 1
    fair = alone["images_per_s"] * (cores - 0.5) / cores
    return {"alone": alone, "beside": beside, "share_of_fair": beside["images_per_s"] / fair}


def growth(workload: Workload, server: str, precision: str, seconds: float) -> dict[str, Any]:
    """Throughput, memory and latency from 32 to 512 concurrent requests on one server."""
    with running(SERVERS[server], workload, precision) as live:
        rate = load.closed(live, SATURATED, WARM_S)["images_per_s"]
        levels = {}
        for level in GROWTH:
            found = load.closed(live, level, load.long_enough(seconds, level, rate))
            levels[str(level)] = found | {"resident_mb": resident_mb(live.process)}
    return {"levels": levels}


def verdict(workload: Workload, server: str, precision: str, seconds: float) -> dict[str, Any]:
    """Throughput and images per CPU-second with the verdict and without it, one right after the other."""
    found: dict[str, Any] = {}
    forwards = []
    for name, each in (("verdict", "oodgate"), ("prediction_only", "oodgate-prediction-only")):
        with running(SERVERS[each], workload, precision) as live:
            forwards.append(live.forward)
            rate = load.closed(live, SATURATED, WARM_S)["images_per_s"]
            found[name] = load.counted(live, SATURATED, max(LEAST_COUNTED, round(rate * seconds)))
    if forwards[0] != forwards[1]:
        raise RuntimeError(f"with the verdict {forwards[0]} ran, without it {forwards[1]}; nothing can be compared")
    return found | {
        "forward": forwards[0],
        "ratio": found["verdict"]["images_per_s"] / found["prediction_only"]["images_per_s"],
        "ratio_per_cpu_s": found["verdict"]["images_per_cpu_s"] / found["prediction_only"]["images_per_cpu_s"],
    }


def settling(workload: Workload, server: str, precision: str, seconds: float) -> dict[str, Any]:
    """Latency at half load with the eager forward alone, while the compiled one is made and tried, and after."""
    with running(SERVERS[server], workload, precision) as live:
        load.closed(live, SATURATED, WARM_S)
        rate = HALF * load.closed(live, SATURATED, seconds)["images_per_s"]
        sent_for = load.enough_sent(seconds, rate)
        eager = load.open_loop(live, rate, sent_for, 0)
    with TemporaryDirectory() as state:
        fresh = {"OODGATE_COMPILE": "auto", "OODGATE_STATE_DIR": state}
        with running(SERVERS[server], workload, precision, fresh) as live:
            began = time.monotonic()
            meanwhile: list[dict[str, float]] = []
            while not live.card()["settled"] and len(meanwhile) < MOST_LOADS:
                meanwhile.append(load.open_loop(live, rate, sent_for, len(meanwhile), at_once=True))
            took = time.monotonic() - began
            forward = live.card()
            if not meanwhile or not forward["settled"]:
                raise RuntimeError(f"{took:.0f} s after it was ready the forward had not settled, or it had at once")
            settled = load.open_loop(live, rate, sent_for, 0)
    times = {"eager": eager, "meanwhile": meanwhile, "settled": settled}
    return {"rate": rate, "settled_s": took, "mode": forward["mode"], **times}


KINDS = {"settling": settling, "burst": burst, "neighbour": neighbour, "growth": growth, "verdict": verdict}


@contextmanager
def spinning(core: int) -> Iterator[None]:
    """A process that does nothing but keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    psutil.Process(process.pid).cpu_affinity([core])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _write(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / "experiments.json"
    old = json.loads(path.read_text())["experiments"] if path.exists() else []
    same = ("kind", "workload", "server", "asked")
    kept = [one for one in old if any(one[name] != entry[name] for name in same)]
    results.write(path, {"experiments": [*kept, entry]})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--server", nargs="+", choices=SERVERS, default=["oodgate"])
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    networks.ensure(workload)
    stop_cleanly()
    for kind in args.kind:
        for server in args.server:
            found = [KINDS[kind](workload, server, args.precision, args.seconds) for _ in range(args.repeats)]
            entry = {"kind": kind, "workload": workload.letter, "server": server, "asked": args.precision}
            _write(args.out, entry | {"seconds": args.seconds, "machine": results.machine(), "runs": found})
            print(kind, workload.letter, server, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
