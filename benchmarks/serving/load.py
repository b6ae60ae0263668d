# SPDX-License-Identifier: Apache-2.0
"""Load on a running server: closed loop by `wrk`, open loop and bursts by `client.py`, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.servers import Running
from benchmarks.serving.usage import cpu_seconds, settle
from benchmarks.serving.workloads import ROOT

SCRIPT = Path(__file__).with_name("post.lua")
ROUNDS, LONGEST_S = 3, 60.0
LEAST_SENT = 120  # of an open loop: of fewer than a hundred, the 99th percentile is the slowest
TIMEOUT_S = 120  # of one request; a queue of 512 slow images drains well within it


def closed(running: Running, concurrency: int, seconds: float) -> dict[str, float]:
    """wrk with so many connections, each with one request under way.

    Returns:
        images, images_per_s, images_per_cpu_s, p50_ms, p90_ms, p99_ms, max_ms, cores, and failed: refused, broken
        or timed out.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise RuntimeError("the benchmark needs wrk: apt-get install wrk")
    settle(running.process)
    command = [
        wrk, "-t1", f"-c{concurrency}", f"-d{max(1, round(seconds))}s", f"--timeout={TIMEOUT_S}s", f"-s{SCRIPT}",
        running.url, "--", running.content_type, str(_listed(running)),
    ]  # fmt: skip
    before, started = cpu_seconds(running.process), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used, wall = cpu_seconds(running.process) - before, time.monotonic() - started
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    good = result["answered"] - result["refused"]
    return {
        "images": good,
        "images_per_s": good / result["seconds"],
        "images_per_cpu_s": good / used,
        **{name: result[name] for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms")},
        "failed": result["refused"] + result["broken"],
        "cores": used / wall,
    }


def long_enough(seconds: float, concurrency: int, images_per_s: float) -> float:
    """Seconds in which each connection is answered a few times; else the slowest answers would not be seen."""
    return min(LONGEST_S, max(seconds, ROUNDS * concurrency / max(images_per_s, 1)))


def enough_sent(seconds: float, rate: float) -> float:
    """Seconds in which an open loop sends enough for its 99th percentile."""
    return min(LONGEST_S, max(seconds, LEAST_SENT / rate))


def counted(running: Running, concurrency: int, requests: int) -> dict[str, float]:
    """So many requests with so many under way; all that the server did for them is done when the clocks are read.

    wrk ends with a batch half computed, whose CPU time would count and whose images would not.

    Returns:
        images_per_s, images_per_cpu_s, failed.
    """
    settle(running.process)
    before = cpu_seconds(running.process)
    found = _client(running, "count", "--connections", str(concurrency), "--requests", str(requests))
    used = cpu_seconds(running.process) - before
    return {
        "images_per_s": found["answered"] / found["seconds"],
        "images_per_cpu_s": found["answered"] / used,
        "failed": found["failed"],
    }


def open_loop(running: Running, rate: float, seconds: float, seed: int, *, at_once: bool = False) -> dict[str, float]:
    """Poisson arrivals at a fixed rate; latency counts from the instant a request should have been sent.

    Args:
        running: the server.
        rate: images/s.
        seconds: for how long.
        seed: of the arrivals.
        at_once: do not wait until the server is idle.

    Returns:
        rate (images/s), sent, failed, of these unsent because too many were under way, p50_ms, p90_ms, p99_ms, max_ms.
    """
    found: dict[str, float] = _client(
        running, "open", "--rate", f"{rate:.3f}", "--seconds", f"{seconds}", "--seed", str(seed), at_once=at_once
    )
    return found


def burst(running: Running, connections: int, requests: int, singles: int) -> dict[str, Any]:
    """Single requests, a burst, and single requests again, on the same connections.

    Returns:
        before_ms and after_ms, lists in order.
    """
    counts = {"--connections": connections, "--requests": requests, "--singles": singles}
    found: dict[str, Any] = _client(running, "burst", *(str(part) for pair in counts.items() for part in pair))
    return found


def _client(running: Running, *arguments: str, at_once: bool = False) -> Any:
    if not at_once:
        settle(running.process)
    where = ["--url", running.url, "--content-type", running.content_type, "--bodies", str(_listed(running))]
    command = [sys.executable, "-m", "benchmarks.serving.client", *where, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _listed(running: Running) -> Path:
    path = running.bodies[0].parent.with_suffix(".txt")
    path.write_text("".join(f"{body}\n" for body in running.bodies))
    return path
