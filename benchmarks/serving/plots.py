# SPDX-License-Identifier: Apache-2.0
"""Throughput by concurrency of every server, one figure for each workload."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from statistics import median

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.serving.results import elsewhere
from benchmarks.serving.workloads import WORKLOADS
from detector.plots import STYLE


def write(results: Path, folder: Path) -> list[Path]:
    """Draw `serving-LETTER.svg` for each stored workload, `serving-MACHINE-LETTER.svg` for another machine's.

    Returns:
        the files written.
    """
    machines = {"serving": results} | {f"serving-{other.name}": other for other in elsewhere(results)}
    written = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for (name, measured), letter in product(machines.items(), WORKLOADS):
            path = measured / f"{letter}.json"
            if path.exists():
                written.append(folder / f"{name}-{letter}.svg")
                _drawn(json.loads(path.read_text())).savefig(written[-1], metadata={"Date": None})
    return written


def _drawn(result: dict[str, object]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, dict[int, list[float]]] = {}
    runs = result["runs"]
    assert isinstance(runs, list)
    for run in runs:
        curve = curves.setdefault(f"{run['server']} {run['precision']} {run['mode']}", {})
        for level, found in run["closed"].items():
            curve.setdefault(int(level), []).append(found["images_per_s"])
    for name, curve in curves.items():
        levels = sorted(curve)
        bold = 2.5 if name.startswith("oodgate") else 1.2
        axes.plot(levels, [median(curve[level]) for level in levels], marker="o", linewidth=bold, label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel("images per second, median")
    axes.set_title(str(result["title"]))
    axes.legend(fontsize="small")
    return figure
