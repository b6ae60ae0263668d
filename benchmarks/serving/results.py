# SPDX-License-Identifier: Apache-2.0
"""Results as files: what was measured, with what versions, on what machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.serving import environments
from benchmarks.serving.servers import THREADS
from benchmarks.serving.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results"
OURS = ("torch", "torchvision", "numpy", "pillow", "fastapi", "starlette", "uvicorn", "pydantic")
COMMON = "common"  # among the open loops: the one at the same rate for every server
COMMON_SHARE = 0.9
PEER_PACKAGES = ("litserve", "bentoml", "mosec", "ray")  # FastAPI is among ours


def write_runs(
    folder: Path,
    workload: Workload,
    seconds: float,
    runs: Sequence[dict[str, Any]],
    failures: Sequence[dict[str, Any]],
    common_rate: float | None = None,
) -> None:
    """The runs of one workload; those of servers and precisions that were not run again are kept."""
    path = folder / f"{workload.letter}.json"
    new = {(run["server"], run["asked"]) for run in (*runs, *failures)}
    old = json.loads(path.read_text()) if path.exists() else {"runs": [], "failures": []}

    def kept(name: str) -> list[dict[str, Any]]:
        return [run for run in old[name] if (run["server"], run["asked"]) not in new]

    content = {"workload": workload.letter, "title": workload.title, "seconds": seconds, "common_rate": common_rate}
    write(path, content | {"failures": [*kept("failures"), *failures], "runs": [*kept("runs"), *runs]})


def check_machine(folder: Path) -> None:
    """Exit where runs that are stored there are of another machine: one table would show both."""
    for letter, stored in stored_runs(folder).items():
        if stored["machine"] != machine():
            path = folder / f"{letter}.json"
            raise SystemExit(
                f"{path} is of another machine; give this one a folder of its own, with --out {folder}/NAME"
            )


def stored_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured of each workload, by its letter."""
    paths = {letter: folder / f"{letter}.json" for letter in WORKLOADS}
    return {letter: json.loads(path.read_text()) for letter, path in paths.items() if path.exists()}


def common_rate(folder: Path, workload: Workload, peers: Sequence[float]) -> float | None:
    """The rate of the open loop that is the same for every server, images/s.

    Args:
        folder: where a rate is found that another run used.
        workload: whose.
        peers: throughputs at concurrency 32: 90 % of the best; where there is none, the rate that peers had before.
    """
    if peers:
        return COMMON_SHARE * max(peers)
    path = folder / f"{workload.letter}.json"
    stored: dict[str, float | None] = json.loads(path.read_text()) if path.exists() else {}
    return stored.get("common_rate")


def write(path: Path, content: dict[str, Any]) -> None:
    """A result with the machine and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "versions": versions()} | content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and threads of a forward pass; nothing that names the host."""
    fields = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    told = {name.strip(): value.strip() for name, _, value in fields}
    flags = told.get("flags", "").split()
    return {
        "cpu": told.get("model name", platform.machine()),
        "features": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "torch_threads": THREADS,
    }


def processor() -> str:
    """The processor, and the widest arithmetic that it has: `AMD EPYC (avx2)`."""
    here = machine()
    return f"{here['cpu']} ({', '.join(here['features'])})"


def versions() -> dict[str, str]:
    """Of Python, of what computes, and of every peer."""
    peers = {package: environments.versions(package)[package] for package in PEER_PACKAGES}
    return {"python": platform.python_version()} | {name: version(name) for name in OURS} | peers


def elsewhere(folder: Path) -> list[Path]:
    """Folders with the results of other machines, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and stored_runs(path))


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Minimum, median and maximum."""
    ordered = sorted(values)
    return ordered[0], median(ordered), ordered[-1]


def at_32(run: dict[str, Any]) -> float:
    """Images per second with 32 under way: by count, or by a window where that saw more.

    A window loses what is under way at its end; the client that counts is slower than wrk.
    """
    window = run["closed"].get("32", run["counted"])
    return float(max(run["counted"]["images_per_s"], window["images_per_s"]))


def efficiency(run: dict[str, Any]) -> float:
    """Images per CPU-second of the server over those of the bare limit beside it."""
    return float(run["counted"]["images_per_cpu_s"] / run["limit"]["images_per_cpu_s"])


def modes(runs: Iterable[dict[str, Any]]) -> str:
    """The forwards that the runs of a server settled on: `compiled`, or `eager or compiled` where they differ."""
    return " or ".join(dict.fromkeys(run["mode"] for run in runs))


def line(run: dict[str, Any]) -> str:
    """One run in one line, for the person who waits."""
    begun = f"ready {run['ready_s']:5.1f} s {run['resident_mb']:6.0f} MB"
    parts = [f"{run['server']:24}{run['asked']:5}{run['mode']:9}{begun}"]
    for level, found in run["closed"].items():
        parts.append(f"c={level}: {found['images_per_s']:.1f}/s p50 {found['p50_ms']:.1f} p99 {found['p99_ms']:.1f} ms")
        if found["failed"]:
            parts.append(f"FAILED {found['failed']:.0f}")
    parts.append(f"efficiency {efficiency(run):.3f}")
    for share, found in run["open"].items():
        parts.append(f"at {found['rate']:.0f}/s ({share}): p50 {found['p50_ms']:.1f} p99 {found['p99_ms']:.1f} ms")
    return " | ".join(parts)
