# SPDX-License-Identifier: Apache-2.0
"""Images a second of each step, and milliseconds of one image at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.subject import Subject, bare
from detector.policy import Verdict
from detector.staging import Staging


def rates(made: Subject, prepared: Mapping[str, Subject], size: int, seconds: float) -> dict[str, Any]:
    """Images a second of each step alone, and of the engine's steps together, at one batch size.

    Args:
        made: the eager subject.
        prepared: by the name of a form, the same with its forward; the engine runs the last that works.
        size: images in a batch.
        seconds: of each measurement.

    Returns:
        rates by the name of the step; of a form that fails, `failed_NAME`: the reason.
    """
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
    found: dict[str, Any] = {}
    best = made
    with torch.inference_mode():
        for name, step in steps.items():
            found[name] = size * _per_second(step, backbone.device, seconds)
        for name, subject in prepared.items():
            run = subject.backbone.forward
            try:
                found[f"forward_{name}"] = size * _per_second(partial(run, there), backbone.device, seconds)
                best = subject
            except Exception as error:  # no compiler, say: the other steps are still worth their time
                found[f"failed_{name}"] = f"{type(error).__name__}: {str(error)[:200]}"
        found["engine"] = size * _pipelined(best, images, seconds)
    return found


def latency(best: Subject, seconds: float) -> dict[str, float]:
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


def agreement(mine: Sequence[Verdict], theirs: Sequence[Verdict]) -> dict[str, Any]:
    """Whether labels and decisions are the same, and how far scores are apart at most."""
    pairs = list(zip(mine, theirs, strict=True))
    return {
        "same": all((a.decision, a.prediction.label) == (b.decision, b.prediction.label) for a, b in pairs),
        "largest_score_difference": max(abs(a.ood.score - b.ood.score) for a, b in pairs),
    }


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
