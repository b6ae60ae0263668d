# SPDX-License-Identifier: Apache-2.0
"""Measure an accelerator: the bare forward, the whole verdict from host uint8 images, and what lies between.

    python -m benchmarks.gpu

For each precision and batch size: images a second of the bare forward (eager in both orders of memory, and compiled,
on a GPU as CUDA graphs), of an upload alone (pageable, and staged through pinned buffers on a stream of its own), of
the search of the bank alone, and of the engine's steps with one batch ahead. Then p99 of one image at a time, and the
decisions of every path on the golden images of a real model, against the CPU's. Writes
benchmarks/gpu/results/DEVICE.json; `--device cpu` runs every step but those that only a GPU has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.subject import Bucketed, Subject, bare, subject
from detector import Detector, artifact as artifacts
from detector.backbone import Precision, resolve_device
from detector.staging import Staging

RESULTS = Path("benchmarks/gpu/results")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
GOAL_BATCH = 64
GOALS = {"engine_of_compiled_forward": 0.90, "grood_adds": 0.10, "p99_ms_over_forward": 2.0}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = resolve_device(options.device)
    compiled = device.type == "cuda" or options.compile
    measured = {precision: _precision(options, str(device), precision, compiled=compiled) for precision in PRECISIONS}
    result = {
        "network": f"{options.network}, {options.size} x {options.size}, random weights",
        "bank": options.bank,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "precisions": measured,
        "goals": GOALS,
        "golden": golden(options.model, str(device), compiled=compiled),
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "cuda": torch.version.cuda},
        "versions": {name: version(name) for name in ("torch", "torchvision")} | {"python": platform.python_version()},
    }
    name = re.sub(r"\W+", "-", str(result["device"])).strip("-").lower()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--bank", type=int, default=100_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--compile", action="store_true", help="on a CPU too, which takes minutes")
    parser.add_argument("--model", type=Path, default=Path("models/cifar10/1"), help="whose golden images are judged")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _precision(options: argparse.Namespace, device: str, precision: Precision, *, compiled: bool) -> dict[str, Any]:
    made = subject(options.network, options.size, options.bank, options.classes, device, precision)
    best = made
    if compiled:
        backbone = made.backbone.with_forward(Bucketed(bare(made.backbone)), "compiled")
        best = Subject(backbone, made.grood, made.decider)
    by_batch = {str(size): _rates(made, best, size, options.seconds) for size in options.batches}
    found: dict[str, Any] = {"images_per_second": by_batch, "one_at_a_time_ms": _latency(best, options.seconds)}
    at = by_batch.get(str(GOAL_BATCH))
    if at is not None and compiled:
        found["reached"] = {
            "engine_of_compiled_forward": at["engine"] / at["forward_compiled"],
            "grood_adds": at["forward_compiled"] / at["bank_search"],
            "p99_ms_over_forward": found["one_at_a_time_ms"]["engine_p99"] - found["one_at_a_time_ms"]["forward_p99"],
        }
    return found


def _rates(made: Subject, best: Subject, size: int, seconds: float) -> dict[str, float]:
    """Images a second of each step alone, and of all of them, at one batch size."""
    backbone = made.backbone
    images = torch.randint(0, 256, (size, *backbone.input_shape), dtype=torch.uint8)
    there = images.to(backbone.device)
    planes = there.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # the same, colour by colour in memory
    outputs = backbone.outputs(images)
    staging = Staging(backbone.input_shape, backbone.device)
    eager, contiguous = bare(backbone), bare(backbone, channels_last=False)
    steps: dict[str, Callable[[], Any]] = {
        "upload_pageable": lambda: images.to(backbone.device, copy=True),
        "upload_staged": lambda: staging.upload(images),
        "forward_contiguous": lambda: contiguous(planes),
        "forward_channels_last": lambda: eager(there),
        "bank_search": lambda: made.score(outputs.sharing()),
    }
    if best is not made:
        steps["forward_compiled"] = lambda: best.backbone.forward(there)
    with torch.inference_mode():
        rates = {name: size * _per_second(step, backbone.device, seconds) for name, step in steps.items()}
        rates["engine"] = size * _pipelined(best, images, seconds)
    return rates


def _per_second(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    for _ in range(3):  # the first runs compile, choose kernels and record graphs
        step()
    _wait(device)
    runs, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step()
        runs += 1
        if runs % 8 == 0:
            _wait(device)  # the clock must not run ahead of the device for long
    _wait(device)
    return runs / (time.perf_counter() - started)


def _pipelined(best: Subject, images: Tensor, seconds: float) -> float:
    """Batches a second from host images to verdicts; the next batch is started before the last is fetched."""
    for _ in range(3):
        best.finish(best.start(images))
    ahead = best.start(images)
    runs, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        following = best.start(images)
        best.finish(ahead)
        ahead = following
        runs += 1
    best.finish(ahead)
    return runs / (time.perf_counter() - started)


def _latency(best: Subject, seconds: float) -> dict[str, float]:
    """Milliseconds of one image at a time: the forward of one that is there already, and all of the engine's steps."""
    images = torch.randint(0, 256, (1, *best.backbone.input_shape), dtype=torch.uint8)
    there = images.to(best.backbone.device)

    def forward() -> None:
        best.backbone.forward(there)
        _wait(best.backbone.device)

    found: dict[str, float] = {}
    for name, step in (("forward", forward), ("engine", lambda: best.finish(best.start(images)))):
        with torch.inference_mode():
            times = torch.tensor(_times(step, seconds), dtype=torch.float64)
        found |= {f"{name}_p50": float(times.quantile(0.5)), f"{name}_p99": float(times.quantile(0.99))}
    return found


def _times(step: Callable[[], Any], seconds: float) -> list[float]:
    for _ in range(3):
        step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - started))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def golden(model: Path, device: str, *, compiled: bool) -> dict[str, dict[str, Any]]:
    """By path: whether labels and decisions on the golden images are the CPU's, and how far scores are from its."""
    images = artifacts.load(model).golden["images"]
    reference = Detector.load(model, device="cpu", precision="fp32").verdicts(images)
    found: dict[str, dict[str, Any]] = {}
    for precision in artifacts.read_manifest(model).precisions:
        eager = Detector.load(model, device=device, precision=precision)
        paths = {f"{precision} eager": eager}
        if compiled:
            paths[f"{precision} compiled"] = eager.with_forward(Bucketed(bare(eager.backbone)), {})
        for name, detector in paths.items():
            verdicts = detector.verdicts(images)
            pairs = list(zip(verdicts, reference, strict=True))
            found[name] = {
                "same": all((a.decision, a.prediction.label) == (b.decision, b.prediction.label) for a, b in pairs),
                "largest_score_difference": max(abs(a.ood.score - b.ood.score) for a, b in pairs),
            }
    return found


if __name__ == "__main__":
    main()
