# SPDX-License-Identifier: Apache-2.0
"""Measure an accelerator: the bare forward, the whole verdict from host uint8 images, and what lies between.

    python -m benchmarks.gpu

For each batch size and precision: images a second of the bare forward (eager in both orders of memory, and on a GPU
recorded as a CUDA graph and compiled), of an upload alone (pageable, and staged through pinned buffers on a stream of
its own), of the search of the bank alone, and of the engine's steps with one batch ahead. Then p99 of one image at a
time, JPEG decoding by Pillow and by nvJPEG, and the decisions of every path on the golden images of a real model,
against the CPU's. Writes DEVICE.json and DEVICE.md under benchmarks/gpu/results, after every size anew; sizes whose
turn comes after `--minutes` are left out and named. `--device cpu` runs every step but those that only a GPU has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import jpegs
from benchmarks.gpu.forms import compiled
from benchmarks.gpu.measures import agreement, latency, rates
from benchmarks.gpu.subject import Subject, bare, subject
from benchmarks.gpu.table import table
from detector import Detector, artifact as artifacts
from detector.backbone import Precision
from detector.machine import resolve_device
from detector.nvjpeg import NvJpeg
from detector.recording import Bucketed, Make, recorded

RESULTS = Path("benchmarks/gpu/results")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
BATCHES = (64, 1, 256, 16, 32, 128, 8, 4, 2)  # the goals' first, so that they are measured whatever happens
GOAL_BATCH = "64"
GOALS = {"engine_of_compiled_forward": 0.90, "grood_adds": 0.10, "p99_ms_over_forward": 2.0}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    end = time.monotonic() + 60 * options.minutes
    device = resolve_device(options.device)
    forms = _forms(device, compile_anyway=options.compile)
    result = _described(options, device)
    # Short, and the point of it all: before what may take minutes.
    result["golden"] = golden(options.model, str(device), forms)
    result["jpeg_files_per_second"] = jpegs.files_per_second(device, options.seconds)
    subjects = {name: _subjects(options, str(device), name, forms) for name in PRECISIONS}
    for size in options.batches:
        for precision, measured in subjects.items():
            found = result["precisions"].setdefault(precision, {"images_per_second": {}, "not_measured": []})
            if time.monotonic() > end:
                found["not_measured"].append(size)
            else:
                found.update(_at(*measured, size, options.seconds, found))
            _write(result, options.out)
    print(table(result))


def _at(
    made: Subject, prepared: dict[str, Subject], size: int, seconds: float, before: dict[str, Any]
) -> dict[str, Any]:
    """What is known of a precision once a size is measured too."""
    at = rates(made, prepared, size, seconds)
    known = before | {"images_per_second": before["images_per_second"] | {str(size): at}}
    if size == 1:
        works = [subject for name, subject in prepared.items() if f"forward_{name}" in at]
        known["one_at_a_time_ms"] = latency([made, *works][-1], seconds)
    return known | {"reached": reached(known)}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--bank", type=int, default=100_000)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further size is begun")
    parser.add_argument("--compile", action="store_true", help="on a CPU too, which takes minutes")
    parser.add_argument("--model", type=Path, default=Path("models/cifar10/1"), help="whose golden images are judged")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _forms(device: torch.device, *, compile_anyway: bool) -> dict[str, Make]:
    """What a forward can be made into here, the one expected to be fastest last."""
    if device.type == "cuda":
        return {"recorded": recorded, "compiled": compiled}
    return {"compiled": compiled} if compile_anyway else {}


def _described(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "network": f"{options.network}, {options.size} x {options.size}, random weights",
        "bank": options.bank,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "precisions": {},
        "goals": GOALS,
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32},
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "cuda": torch.version.cuda},
        "versions": {name: version(name) for name in ("torch", "torchvision")} | {"python": platform.python_version()},
    }


def _subjects(
    options: argparse.Namespace, device: str, precision: Precision, forms: dict[str, Make]
) -> tuple[Subject, dict[str, Subject]]:
    """The eager one, and one for each form."""
    made = subject(options.network, options.size, options.bank, options.classes, device, precision)
    prepared = {}
    for name, make in forms.items():
        backbone = made.backbone.with_forward(Bucketed(bare(made.backbone), make, max(BATCHES)), "compiled")
        prepared[name] = Subject(backbone, made.grood, made.decider)
    return made, prepared


def reached(found: dict[str, Any]) -> dict[str, float]:
    """What there is of the goals: ratios at the goal's batch, milliseconds one at a time."""
    at, alone = found["images_per_second"].get(GOAL_BATCH, {}), found.get("one_at_a_time_ms")
    reached = {}
    if "forward_compiled" in at:
        reached["engine_of_compiled_forward"] = at["engine"] / at["forward_compiled"]
        reached["grood_adds"] = at["forward_compiled"] / at["bank_search"]
    if alone is not None:
        reached["p99_ms_over_forward"] = alone["engine_p99"] - alone["forward_p99"]
    return reached


def golden(model: Path, device: str, forms: dict[str, Make]) -> dict[str, dict[str, Any]]:
    """By path: whether labels and decisions on the golden images are the CPU's, and how far scores are from its."""
    images = artifacts.load(model).golden["images"]
    reference = Detector.load(model, device="cpu", precision="fp32").verdicts(images)
    found: dict[str, dict[str, Any]] = {}
    for precision in artifacts.read_manifest(model).precisions:
        eager = Detector.load(model, device=device, precision=precision)
        paths = {f"{precision} eager": eager}
        for name, make in forms.items():
            paths[f"{precision} {name}"] = eager.with_forward(Bucketed(bare(eager.backbone), make), {})
        for name, detector in paths.items():
            try:
                found[name] = agreement(detector.verdicts(images), reference)
            except Exception as error:  # no compiler, say: the other paths can still be proven
                found[name] = {"same": False, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    if torch.device(device).type == "cuda":
        found["nvjpeg"] = jpegs.golden(model, NvJpeg(torch.device(device)))
    return found


def _write(result: dict[str, Any], folder: Path) -> None:
    name = re.sub(r"\W+", "-", str(result["device"])).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(result) + "\n")


if __name__ == "__main__":
    main()
