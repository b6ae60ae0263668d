# SPDX-License-Identifier: Apache-2.0
"""A picture of the dashboards' own queries while a stream goes bad and well again.

Real server, Prometheus and Alertmanager; the embedded model; CIFAR-10 test images, for a while one in five SVHN.
Drawn with matplotlib: it is not Grafana.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from benchmarks.datasets import load
from benchmarks.watch.stack import FACTOR, Stack, answers, panel_queries, process, shortened, stack, wait_until
from service.replay import Mix, Replay, images_below, stream

OUT = Path(__file__).parents[2] / "docs" / "watch.png"
RATE, SECONDS, MIX = 20.0, 180.0, "0:0,40:0.2,70:0"  # the CUSUM takes longer to fall than to rise
IMAGES = 1_000
STEP = 0.5  # seconds between points
ALERT, DRIFT = "OodgateDeferralRateHigh", "OodgateDriftDetected"
COLOURS = {"pending": "gold", "firing": "tomato"}


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def write_images(folder: Path, name: str) -> list[Path]:
    folder.mkdir()
    for index, image in enumerate(load(name)[0][:IMAGES]):
        Image.fromarray(image).save(folder / f"{index:04}.png")
    return images_below(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, strange = write_images(folder / "id", "cifar10-test"), write_images(folder / "ood", "svhn-test")
        service = free_address()
        os.environ["OODGATE_STATE_DIR"] = str(folder / "state")
        command = [sys.executable, "-m", "service", "serve", "--port", service.rpartition(":")[2]]
        with (
            process(command, folder / "service.log"),
            stack(folder, service, free_address(), free_address()) as watching,
        ):
            wait_until(lambda: answers(f"http://{service}/v2/health/ready"), 180, "the server is ready")
            wait_until(lambda: watching.query("up == 1"), 20, "the target is up")
            began = time.time()
            sender = Replay(f"http://{service}", report=print)
            total = asyncio.run(sender.run(stream(images, strange, RATE, Mix.parse(MIX).at, seed=0), SECONDS))
            print(f"total    {total.line()}")
            draw(watching, began, began + SECONDS)


def draw(watching: Stack, began: float, ended: float) -> None:
    """Four panels; behind two of them the states of an alert that judges the same."""
    mpl.use("Agg")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")

    def rows(panel: str) -> list[tuple[str, dict[str, Any]]]:
        asked = [query for query in panel_queries("5m") if query.panel == panel]
        return [
            (query.legend, row) for query in asked for row in watching.series(shortened(query.expr), began, ended, STEP)
        ]

    def plot(axis: Axes, panel: str, unit: str) -> None:
        for legend, row in rows(panel):
            for label, value in row["metric"].items():
                legend = legend.replace(f"{{{{{label}}}}}", value)
            seconds, values = np.array(row["values"], float).T
            limit = legend.startswith(("upper", "lower", "limit"))
            axis.plot(seconds - began, values, "--" if limit else "-", label=legend, linewidth=1)
        axis.set_title(panel, fontsize=9)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, ended - began)
        axis.legend(fontsize=7, loc="upper right")

    def shade(axis: Axes, alert: str, chosen: str, top: float) -> None:
        for state, colour in COLOURS.items():
            label = f"{alert} {state}"
            expr = f'ALERTS{{alertname="{alert}",alertstate="{state}"{chosen}}}'
            for row in watching.series(expr, began, ended, STEP):
                seconds = np.array([float(at) for at, _ in row["values"]]) - began
                for stretch in np.split(seconds, np.flatnonzero(np.diff(seconds) > 1.5 * STEP) + 1):
                    axis.axvspan(stretch[0], stretch[-1], color=colour, alpha=0.35, label=label, linewidth=0)
                    print(f"{alert} {state} from second {stretch[0]:.0f} to {stretch[-1]:.0f}")
                    label = "_"  # one line of the legend is enough
        axis.set_ylim(0, top)  # room for the legend
        axis.legend(fontsize=7, loc="upper right")

    plot(axes[0, 0], "Deferral ratio (5 min) and what the calibration explains", "share")
    shade(axes[0, 0], ALERT, "", 0.4)
    heat(axes[0, 1], [row for _, row in rows("P-values")], began)
    plot(axes[1, 0], "CUSUM", "accepted images")
    shade(axes[1, 0], DRIFT, ',test="cusum"', 1_200)
    plot(axes[1, 1], "Decisions by reason", "images/s")
    for axis in axes[1]:
        axis.set_xlabel("seconds")
    figure.suptitle(
        f"A fifth of the stream is OOD from second 40 to 70; all durations 1/{FACTOR}: 10 s are the rules' 5 min.\n"
        "The dashboards' queries on a real Prometheus, drawn with matplotlib: this is not Grafana.",
        fontsize=9,
    )
    with io.BytesIO() as drawn:
        figure.savefig(drawn, dpi=80)
        Image.open(drawn).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(OUT, optimize=True)
    print(f"{OUT.name}: {OUT.stat().st_size / 1000:.0f} kB")


def heat(axis: Axes, rows: list[dict[str, Any]], began: float) -> None:
    """Images by p-value over time: cumulative buckets, told apart."""
    rows = sorted(rows, key=lambda row: float(row["metric"]["le"]))[:-1]  # no p-value is above 1
    edges = [row["metric"]["le"] for row in rows]
    times = np.array([float(at) for at, _ in rows[0]["values"]]) - began
    cumulative = np.array([[float(value) for _, value in row["values"]] for row in rows])
    counts = np.diff(cumulative, axis=0, prepend=0)
    shares = counts / np.maximum(cumulative[-1], 1e-9)
    image = axis.imshow(
        shares, origin="lower", aspect="auto", cmap="Oranges", extent=(times[0], times[-1], -0.5, len(rows) - 0.5)
    )
    axis.set_yticks(range(len(edges)), [f"≤ {edge}" for edge in edges], fontsize=6)
    axis.set_title("P-values", fontsize=9)
    axis.figure.colorbar(image, ax=axis, label="share of images")


if __name__ == "__main__":
    main()
