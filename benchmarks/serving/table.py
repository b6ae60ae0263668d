# SPDX-License-Identifier: Apache-2.0
"""Write the section of docs/performance.md about serving from the stored results.

python -m benchmarks.serving.table
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.readme import replaced
from benchmarks.serving import plots
from benchmarks.serving.goals import Goal, Measured, Run, closed, goals
from benchmarks.serving.results import (
    COMMON,
    PEER_PACKAGES,
    RESULTS,
    at_32,
    efficiency,
    elsewhere,
    modes,
    spread,
    stored_runs,
)
from benchmarks.serving.servers import PEERS as PEER_NAMES, SERVERS
from benchmarks.serving.workloads import ROOT, WORKLOADS

START_UP = ROOT / "benchmarks" / "results" / "start_up.json"
DECODING = START_UP.with_name("decode.json")
PAGE, MARKER = ROOT / "docs" / "performance.md", "serving"
EMPTY = f"## Serving\n\n<!-- {MARKER} -->\n<!-- /{MARKER} -->\n"
PEERS = """\
Each peer runs as its documentation recommends, in an environment of its own (`benchmarks/serving/peers/NAME/`: its
server and its pins); torch, torchvision, numpy and Pillow are the same files for everybody. Batches of at most 16;
windows of 10 ms where there is one to set.

- LitServe: decode in a thread pool inside `batch`, ZeroMQ queues, an inference process for each core.
- BentoML: one batchable API, adaptive batching as by default.
- mosec: two decoding processes, then one inference process with dynamic batching.
- Ray Serve: one replica, `@serve.batch`, decode in a thread pool inside the batch.
- FastAPI: a synchronous handler in the default thread pool; `fastapi-2` with two worker processes."""
PRECISIONS = ("auto", "fp32", "bf16")


def section(folder: Path) -> str:
    """Everything between the markers; a folder in it holds the results of another machine."""
    stored = stored_runs(folder)
    experiments = folder / "experiments.json"
    found = json.loads(experiments.read_text())["experiments"] if experiments.exists() else []
    if not stored:
        raise FileNotFoundError(f"{folder} holds no result; run `python -m benchmarks.serving.run` first")
    alone = json.loads(START_UP.read_text())
    decoding = json.loads(DECODING.read_text())["alone"]
    measured = Measured(_runs(stored), found, alone, decoding)
    parts = [_context(next(iter(stored.values()))), PEERS, "### Goals", _goal_table(goals(measured))]
    for letter, result in stored.items():
        parts += [f"### {letter}: {result['title']}", *_workload(letter, result, measured)]
    growth = measured.experiment("growth", "A")
    if growth:
        parts += ["### Growth: A, fp32", _growth_table(growth)]
    settling = {letter: found for letter in WORKLOADS if (found := measured.experiment("settling", letter))}
    if settling:
        parts += ["### While the compiled forward is made", _settling_table(settling)]
    for other in elsewhere(folder):
        parts += _other_machine(other)
    return "\n\n".join(parts)


def _runs(stored: Mapping[str, dict[str, Any]]) -> dict[str, Sequence[Run]]:
    return {letter: result["runs"] for letter, result in stored.items()}


def _other_machine(folder: Path) -> Iterator[str]:
    stored = stored_runs(folder)
    measured = Measured(_runs(stored), [])
    yield f"### Another machine: {_machine(next(iter(stored.values())))}"
    yield _goal_table([row for row in goals(measured) if row.values])
    for letter, result in stored.items():
        yield f"#### {letter}: {result['title']}"
        yield from _workload(letter, result, measured, f"{folder.name}-")


def _workload(letter: str, result: dict[str, Any], measured: Measured, machine: str = "") -> Iterator[str]:
    yield f"![Throughput of workload {letter} by concurrency](serving-{machine}{letter}.svg)"
    yield _workload_table(letter, measured)
    yield _lengths(result)
    yield from _common_rates(letter, measured)
    yield from (f"{one['server']} {one['asked']} failed in repeat {one['repeat']}." for one in result["failures"])


def _context(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    peers = ", ".join(f"{package} {versions[package]}" for package in (*PEER_PACKAGES, "fastapi"))
    return (
        f"{_machine(result)}; Python {versions['python']}, torch {versions['torch']}; {peers}. "
        f"{machine['torch_threads']} torch threads and `OMP_WAIT_POLICY=PASSIVE` for everybody. The same network, "
        "weights, preprocessing and images for all; the servers take turns, one running at a time. Peers predict only; "
        "oodgate predicts, scores, decides and counts: in B as the default model did then, by `fusion` with banks of "
        "1,000 rows; in A and C so too, with banks of the 400 photos it was fitted on; in N by energy alone.\n\n"
        "*Efficiency*: images per CPU-second of all the server's processes over a fixed number of requests, 32 under "
        "way, ÷ images per CPU-second of decode + bare forward at batch 16 in one process, measured beside it. "
        "Figures: *median (minimum to maximum)* over the repeats. Open loop: Poisson arrivals at a share of the "
        "server's own throughput at concurrency 32, and at 90 % of the best peer's, the same rate for all servers "
        "of a repeat; latency counts from the instant a request should have been sent. *Memory*: proportional set "
        "size, in which pages of libraries that the driver and the limit's process have too are counted in part."
    )


def _machine(result: dict[str, Any]) -> str:
    told = result["machine"]
    return f"{told['cpu']} ({', '.join(told['features'])}), {told['cores']} cores, {told['memory_gb']} GB"


def _goal_table(rows: Sequence[Goal]) -> str:
    lines = ["| goal | bound | measured | |", "|---|---|---|---|"]
    for row in rows:
        bound = f"≥ {row.least:g}" if row.least is not None else f"≤ {row.most:g}"
        verdict = {None: "not measured", True: "met", False: "**missed**"}[row.met]
        lines.append(f"| {row.what} | {bound} | {_spread(row.values, row.digits)} | {verdict} |")
    return "\n".join(lines)


def _workload_table(letter: str, measured: Measured) -> str:
    header = (
        "server", "forward", "efficiency", "images/s at 32", "p50, p99 at 1, ms", "p99 at 32, ms", "p99 at 50 %, ms",
        "p99 at 90 %, ms", "p99 at the common rate, ms", "memory, MB", "ready, s", "failed",
    )  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for server, runs in _variants(letter, measured):
        first = runs[0]
        asked = " (auto)" if first["asked"] == "auto" else ""
        failed = sum(
            found["failed"]
            for run in runs
            for found in (run["counted"], *run["closed"].values(), *run["open"].values())
        )
        cells = [
            server,
            f"{first['precision']} {modes(runs)}{asked}",
            _spread(map(efficiency, runs), 2),
            _spread(map(at_32, runs), 0 if at_32(first) > 200 else 1),
            f"{_level(runs, 1, 'p50_ms')}, {_level(runs, 1, 'p99_ms')}",
            _level(runs, 32, "p99_ms"),
            _open(runs, "50%"),
            _open(runs, "90%"),
            _open(runs, COMMON),
            _spread((run["resident_mb"] for run in runs), 0),
            _spread((run["ready_s"] for run in runs), 1),
            f"{failed:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_limits(letter, measured)])


def _limits(letter: str, measured: Measured) -> Iterator[str]:
    by_forward: dict[str, list[Run]] = {}
    for _, runs in _variants(letter, measured):
        for run in runs:
            by_forward.setdefault(f"{run['precision']} {run['mode']}", []).append(run)
    for forward, runs in sorted(by_forward.items()):
        rate = _spread((run["limit"]["images_per_s"] for run in runs), 1)
        cost = _spread((run["limit"]["images_per_cpu_s"] for run in runs), 1)
        yield f"Limit, {forward}: {rate} images/s, {cost} images per CPU-second."


def _lengths(result: dict[str, Any]) -> str:
    alone = [run["closed"]["1"]["images"] for run in result["runs"] if "1" in run["closed"]]
    sent = [found["sent"] for run in result["runs"] for found in run["open"].values()]
    return (
        f"Loads of {result['seconds']:g} s or more: one caller was answered {min(alone):,.0f} to {max(alone):,.0f} "
        f"times, an open loop sent {min(sent):,.0f} to {max(sent):,.0f} requests."
    )


def _common_rates(letter: str, measured: Measured) -> Iterator[str]:
    """Which share the common rate was of what the best peer of the same repeat did."""
    best: dict[int, float] = {}
    rates: dict[int, float] = {}
    for server, runs in _variants(letter, measured):
        for run in runs:
            if server in PEER_NAMES:
                best[run["repeat"]] = max(best.get(run["repeat"], 0.0), at_32(run))
            if COMMON in run["open"]:
                rates[run["repeat"]] = run["open"][COMMON]["rate"]
    shares = [f"{rates[repeat] / best[repeat]:.0%}" for repeat in sorted(best.keys() & rates.keys())]
    if shares:
        yield f"The common rate, of what the best peer of the repeat did: {', '.join(shares)}."


def _variants(letter: str, measured: Measured) -> Iterator[tuple[str, list[Run]]]:
    for server in SERVERS:
        for asked in PRECISIONS:
            runs = [run for run in measured.of(letter, server, asked) if "32" in run["closed"]]
            if runs:
                yield server, runs


def _growth_table(runs: Sequence[dict[str, Any]]) -> str:
    lines = ["| concurrent | images/s | p99, ms | memory, MB | failed |", "|---|---|---|---|---|"]
    for level in runs[0]["levels"]:
        found = [run["levels"][level] for run in runs]
        figures = [_spread((one[name] for one in found), 1) for name in ("images_per_s", "p99_ms", "resident_mb")]
        lines.append(f"| {level} | {' | '.join(figures)} | {sum(one['failed'] for one in found):.0f} |")
    return "\n".join(lines)


def _settling_table(by_workload: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    lines = [
        "An open loop at half of what the eager forward carries, in float32: with the eager forward alone; from ready",
        "until the forward has settled, nothing having been compiled before; and then. Medians, and the worst of the",
        "loads one after another.",
        "",
        "| workload | settled after, s | on | p50, ms: eager, meanwhile, settled "
        "| p99, ms: eager, meanwhile (worst), settled | failed |",
        "|---|---|---|---|---|---|",
    ]
    for letter, runs in by_workload.items():
        loads = [[run["eager"], *run["meanwhile"], run["settled"]] for run in runs]
        cells = [letter, _spread((run["settled_s"] for run in runs), 0), ", ".join(run["mode"] for run in runs)]
        for figure in ("p50_ms", "p99_ms"):
            meanwhile = [one[figure] for run in runs for one in run["meanwhile"]]
            worst = f" ({max(meanwhile):,.1f})" if figure == "p99_ms" else ""
            of_others = {name: _spread((run[name][figure] for run in runs), 1) for name in ("eager", "settled")}
            cells.append(f"{of_others['eager']}, {median(meanwhile):,.1f}{worst}, {of_others['settled']}")
        cells.append(f"{sum(one['failed'] for run in loads for one in run):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _level(runs: Sequence[Run], concurrency: int, figure: str) -> str:
    measured = [run for run in runs if str(concurrency) in run["closed"]]
    return _spread(map(closed(concurrency, figure), measured), 1)


def _open(runs: Sequence[Run], share: str) -> str:
    return _spread((run["open"][share]["p99_ms"] for run in runs if share in run["open"]), 1)


def _spread(values: Iterable[float], digits: int) -> str:
    known = tuple(values)
    if not known:
        return "none"
    low, middle, high = spread(known)
    if len(known) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def main() -> None:
    page = PAGE.read_text() if PAGE.exists() else "# Performance\n"
    if f"<!-- {MARKER} -->" not in page:
        page = f"{page}\n{EMPTY}"
    PAGE.write_text(replaced(page, MARKER, f"\n{section(RESULTS)}\n"))
    plots.write(RESULTS, PAGE.parent)


if __name__ == "__main__":
    main()
