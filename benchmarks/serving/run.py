# SPDX-License-Identifier: Apache-2.0
"""Measure the servers on a workload, interleaved: every repeat runs each server once, beside the machine's limit.

    python -m benchmarks.serving.run --workload A --repeats 3 --seconds 8 [--server NAME …] [--precision fp32 …]

Writes benchmarks/serving/results/A.json after every server, so that an interrupted run keeps what it has. Results of
another machine go to a folder of their own, `--out benchmarks/serving/results/NAME`; the page shows them apart.
"""

from __future__ import annotations

import argparse
import http.client
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import load, networks, results
from benchmarks.serving.limit import Measure, limit
from benchmarks.serving.results import COMMON
from benchmarks.serving.servers import PEERS, SERVERS, Running, running, stop_cleanly
from benchmarks.serving.usage import cpu_seconds, resident_mb
from benchmarks.serving.workloads import WORKLOADS, Workload

LEVELS, SATURATED, LOADS = (1, 8, 32, 128), 32, (0.5, 0.9)
WARM_S, LEAST_COUNTED = 2.0, 4 * SATURATED
PRECISIONS = ("fp32", "bf16", "auto")  # auto is oodgate as it sets itself up; a peer has no such thing
FAILURES = (RuntimeError, OSError, http.client.HTTPException, subprocess.SubprocessError)
SAME_LABELS = {"fp32": 1.0, "bf16": 0.9}  # rounding may move an image that lies between two classes


@dataclass(frozen=True)
class Plan:
    """How long and at what load each server is measured."""

    seconds: float  # of each load, or longer where it would see too little
    levels: Sequence[int]
    loads: Sequence[float]  # shares of its own throughput
    rate: float | None  # images/s of one more open loop, the same for every server


def measure(
    workload: Workload, server: str, precision: str, plan: Plan, repeat: int, bare: Measure, expected: Sequence[int]
) -> dict[str, Any]:
    """One server once: the limit beside it, its answers checked, then every load."""
    started = time.time()
    with running(SERVERS[server], workload, precision) as live:
        forward = live.forward
        agreement = _agreement(live, expected)
        rate = load.closed(live, SATURATED, WARM_S)["images_per_s"]
        before = bare(forward["precision"], forward["mode"], plan.seconds / 2)
        closed = {
            str(level): load.closed(live, level, load.long_enough(plan.seconds, level, rate)) for level in plan.levels
        }
        counted = load.counted(live, SATURATED, max(LEAST_COUNTED, round(rate * plan.seconds)))
        after = bare(forward["precision"], forward["mode"], plan.seconds / 2)
        capacity = results.at_32({"closed": closed, "counted": counted})
        rates = {f"{share:.0%}": share * capacity for share in plan.loads}
        if plan.rate:
            rates[COMMON] = plan.rate
        opened = {
            name: load.open_loop(live, rate, load.enough_sent(plan.seconds, rate), repeat)
            for name, rate in rates.items()
        }
        return {
            "server": server,
            "asked": precision,
            **forward,
            "repeat": repeat,
            "started": round(started),
            "ready_s": live.ready_s,
            "resident_mb": resident_mb(live.process),
            "cpu_s": cpu_seconds(live.process),
            "agreement": agreement,
            "limit": {name: (before[name] + after[name]) / 2 for name in before},
            "counted": counted,
            "closed": closed,
            "open": opened,
        }


def throughputs(workload: Workload, peers: Sequence[str]) -> list[float]:
    """Images per second of each peer at concurrency 32; of one that fails, which is told later, nothing."""
    found = []
    for peer in peers:
        try:
            with running(SERVERS[peer], workload, "fp32") as live:
                load.closed(live, SATURATED, WARM_S)
                found.append(load.closed(live, SATURATED, WARM_S)["images_per_s"])
        except FAILURES as error:
            print(f"{peer} FAILED: {error}", flush=True)
    return found


def labels_of_oodgate(workload: Workload) -> list[int]:
    """What oodgate predicts for the workload's images in fp32: what every other server is held against."""
    with running(SERVERS["oodgate"], workload, "fp32") as live:
        return live.labels()


def _agreement(live: Running, expected: Sequence[int]) -> float:
    same = [found == wanted for found, wanted in zip(live.labels(), expected, strict=True)]
    share = sum(same) / len(same)
    if share < SAME_LABELS[live.forward["precision"]]:
        raise RuntimeError(f"{live.server.name} predicts another class for {1 - share:.0%} of the images")
    return share


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--server", nargs="+", choices=SERVERS, default=["oodgate", *PEERS])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["auto", "fp32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--concurrency", nargs="+", type=int, default=LEVELS)
    parser.add_argument("--open-loop", nargs="*", type=float, default=LOADS, help="Shares of the measured capacity.")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    results.check_machine(args.out)
    networks.ensure(workload)
    stop_cleanly()
    pairs = [
        (server, precision)
        for server in args.server
        for precision in args.precision
        if precision != "auto" or not SERVERS[server].peer
    ]
    runs: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    expected = labels_of_oodgate(workload)
    peers = throughputs(workload, [server for server in args.server if SERVERS[server].peer])
    rate = results.common_rate(args.out, workload, peers)
    plan = Plan(args.seconds, args.concurrency, args.open_loop, rate)
    with limit(workload) as bare:
        for repeat in range(args.repeats):
            for server, precision in pairs if repeat % 2 == 0 else reversed(pairs):
                try:
                    runs.append(measure(workload, server, precision, plan, repeat, bare, expected))
                except FAILURES as error:  # of one server: the others are still measured
                    failures.append({"server": server, "asked": precision, "repeat": repeat, "error": str(error)})
                    print(f"{server} {precision} FAILED: {error}", flush=True)
                else:
                    print(results.line(runs[-1]), flush=True)
                results.write_runs(args.out, workload, args.seconds, runs, failures, rate)
    if failures:
        raise SystemExit(f"{len(failures)} of {len(failures) + len(runs)} runs failed")


if __name__ == "__main__":
    main()
