# SPDX-License-Identifier: Apache-2.0
"""What one request costs oodgate, warm: CPU time of each thread, then of each function on the event loop.

    python -m benchmarks.serving.cost --workload N
    python -m benchmarks.serving.cost --workload B --precision auto
    python -m benchmarks.serving.cost --workload N --concurrency 1

Both are CPU clocks of threads, so that a neighbour on the machine does not show. The second run is under cProfile,
which makes small functions look larger than they are: read it for shares, and the first for times. Writes
cost-WORKLOAD.txt, or cost-WORKLOAD-at-1.txt, beside the results: give another machine a folder of its own, by --out.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import json
import os
import pstats
import re
import signal
import sys
import threading
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.serving import load, networks
from benchmarks.serving.results import RESULTS
from benchmarks.serving.run import PRECISIONS, SATURATED, WARM_S
from benchmarks.serving.servers import COSTED, running, stop_cleanly
from benchmarks.serving.usage import settle
from benchmarks.serving.workloads import BUILD, ROOT, WORKLOADS, Workload
from detector.cli import main as serve

THREADS, PROFILE, ASKED = BUILD / "cost-threads.json", BUILD / "cost.prof", "BENCH_PROFILE"
ROWS, LEAST = 40, 1000  # requests
BEGIN = signal.SIGUSR1


def watched() -> None:
    """`oodgate serve` that leaves the CPU time of its threads, or a profile of its event loop, when it stops."""
    startup, shutdown = uvicorn.Server.startup, uvicorn.Server.shutdown
    profile, before = cProfile.Profile(timer=time.thread_time), dict[int, float]()

    def begin() -> None:
        before.update((thread.ident or 0, _cpu_seconds(thread)) for thread in threading.enumerate())
        if os.environ.get(ASKED):
            profile.enable()

    async def started(self: uvicorn.Server, *args: Any, **kwargs: Any) -> None:
        await startup(self, *args, **kwargs)
        asyncio.get_running_loop().add_signal_handler(BEGIN, begin)

    async def stopping(self: uvicorn.Server, *args: Any, **kwargs: Any) -> None:
        if os.environ.get(ASKED):
            profile.disable()
            profile.dump_stats(PROFILE)
        used: dict[str, float] = {}
        for thread in threading.enumerate():
            name = re.sub(r"[-_ ]*\d.*", "", thread.name)
            used[name] = used.get(name, 0.0) + _cpu_seconds(thread) - before.get(thread.ident or 0, 0.0)
        THREADS.write_text(json.dumps(used))
        await shutdown(self, *args, **kwargs)

    uvicorn.Server.startup, uvicorn.Server.shutdown = started, stopping  # type: ignore[method-assign]
    serve()


def _cpu_seconds(thread: threading.Thread) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))


def measure(workload: Workload, precision: str, concurrency: int, seconds: float) -> str:
    """The report, as text."""
    requests = _run(workload, precision, concurrency, seconds)
    threads = json.loads(THREADS.read_text())
    head = f"workload {workload.letter}, precision {precision}, concurrency {concurrency}, {requests:.0f} requests"
    lines = [head, ""]
    lines += ["microseconds of CPU per request, by thread"]
    lines += [
        f"{1e6 * used / requests:9.1f}  {name}" for name, used in sorted(threads.items(), key=lambda item: -item[1])
    ]
    os.environ[ASKED] = "1"
    profiled = _run(workload, precision, concurrency, seconds)
    lines += ["", "microseconds per request on the event loop, under cProfile"]
    return "\n".join([*lines, _functions(profiled), ""])


def _run(workload: Workload, precision: str, concurrency: int, seconds: float) -> int:
    """How many requests were measured; what a server does once, at the first of them, is over by then."""
    with running(COSTED, workload, precision) as live:
        rate = load.closed(live, concurrency, WARM_S)["images_per_s"]
        requests = max(LEAST, round(seconds * rate))
        settle(live.process)  # of what was under way at the end
        live.process.send_signal(BEGIN)
        load.counted(live, concurrency, requests)
        return requests


def _functions(requests: float) -> str:
    table = io.StringIO()
    stats: Any = pstats.Stats(str(PROFILE), stream=table)
    rows = [
        (1e6 * own / requests, 1e6 * whole / requests, calls / requests, _where(*function))
        for function, (_, calls, own, whole, _) in stats.stats.items()
    ]
    parts = ["", f"{'own':>9}{'with callees':>14}{'calls':>8}"]
    by_own, by_whole = (sorted(rows, key=itemgetter(column), reverse=True)[:ROWS] for column in (0, 1))
    for title, chosen in (("largest by own time", by_own), ("largest with callees", by_whole)):
        parts.append(f"-- {title}")
        parts += [f"{own:9.1f}{whole:14.1f}{calls:8.1f}  {where}" for own, whole, calls, where in chosen]
    return "\n".join(parts)


def _where(file: str, line: int, name: str) -> str:
    if file == "~":
        return name
    path = Path(file)
    kept = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{kept}:{line} {name}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, default="N")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--concurrency", type=int, default=SATURATED)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    networks.ensure(workload)
    stop_cleanly()
    report = measure(workload, args.precision, args.concurrency, args.seconds)
    at = "" if args.concurrency == SATURATED else f"-at-{args.concurrency}"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"cost-{workload.letter}{at}.txt").write_text(report)
    print(report)


if __name__ == "__main__":
    watched() if sys.argv[1:2] == ["serve"] else main()
