# SPDX-License-Identifier: Apache-2.0
"""Compile the forward of a model ahead of time, in a process of its own: `python -m detector.compiling JOB`.

The process has a low priority and one thread, so that a server beside it goes on answering. It leaves a directory
of shared libraries, one for each batch size, and what their rounding moves: how far each score differs from the form
that was calibrated. The directory appears whole or not at all. At the end of its stdin the process ends, whatever it
does: a server that is killed leaves no compiler behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from detector import artifact as artifacts
from detector.artifact import Manifest
from detector.backbone import Precision
from detector.compiled import CompiledForward
from detector.detector import Detector
from detector.errors import BackboneError
from detector.forward import Forward
from detector.golden import draw
from detector.images import Pixels
from detector.machine import cpu_capabilities
from detector.outputs import BATCH
from detector.policy import DOUBT, doubt

SIZES = (1, 4, 8)  # of batches: each costs its weights in memory again, and larger ones are no faster an image
MOVES = "moves.json"
DRAWN, MOST_BATCHES = 128, 16  # images whose scores are compared
SAFETY = 4  # times the largest move seen


class Job(BaseModel):
    """What to compile.

    Args:
        model: a model directory.
        precision: one that it was calibrated in.
        threads: the most that will run one forward pass together.
        out: the directory to make.
        niceness: of the process; 19 yields to everybody else on the machine.
    """

    model_config = ConfigDict(frozen=True)

    model: Path
    precision: Precision
    threads: int
    out: Path
    niceness: int = 19


def key(manifest: Manifest, precision: Precision, threads: int) -> str:
    """Of everything that the libraries and their proof depend on: model, code, torch, processor.

    Raises:
        BackboneError: this torch does not tell what the processor can do.
    """
    own = Path(__file__).parent
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(own.rglob("*.py"))]
    versions = [torch.__version__, *map(_version, ("torchvision", "timm"))]  # which hold networks
    machine = cpu_capabilities()
    if not machine:  # else a processor could be given code that is made for another
        raise BackboneError("this torch does not tell what the processor can do; it is compiled from torch 2.12 on")
    parts = [manifest.model_digest, precision, threads, SIZES, versions, code, machine]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def libraries(directory: Path) -> dict[int, Path]:
    """The shared libraries of a directory that `run` made, by batch size."""
    return {size: directory / f"{size}.so" for size in SIZES}


def moves(directory: Path) -> dict[str, float]:
    """By score, and DOUBT, how far the libraries of a directory may move it."""
    content: dict[str, float] = json.loads((directory / MOVES).read_text())
    return content


def partial(job: Job, process: int) -> Path:
    """Where a process of that number does a job; the directory is gone when it has ended by itself."""
    return job.out.with_name(f"{job.out.name}.partial-{process}")


def run(job: Job) -> None:
    """Do a job.

    Raises:
        BackboneError: the network cannot be compiled, or needs operators outside torch.
        GoldenMismatch: compiled, it gives other golden answers.
    """
    artifact = artifacts.load(job.model)
    eager = Detector.from_artifact(artifact, torch.device("cpu"), job.precision)
    network = eager.backbone.lean(whole=eager.backbone.runs_whole)
    made = partial(job, os.getpid())
    made.mkdir(exist_ok=True)
    try:
        for size, path in libraries(made).items():
            blank = torch.zeros(size, *eager.backbone.input_shape, dtype=torch.uint8)
            shutil.copyfile(_compiled(network, blank, job.threads), path)
        moved = []
        for size, path in libraries(made).items():  # each by itself, and what it leaves over by the one for 1
            settled = eager.with_forward(CompiledForward({1: libraries(made)[1], size: path}), {})
            settled.self_test(artifact.golden)
            moved.append(measured_moves(eager, settled))
        (made / MOVES).write_text(json.dumps(largest(moved)))
        if not job.out.exists():  # else another process was faster
            made.replace(job.out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _compiled(network: Forward, images: Tensor, threads: int) -> Path:
    try:
        with torch.no_grad():
            program = torch.export.export(network, (images,), strict=False)
            # The threads are counted when it runs: a piece of a large batch has fewer than a small batch.
            threading_options = {"cpp.threads": threads, "cpp.dynamic_threads": True}
            options = {"freezing": True, "compile_threads": 1, **threading_options}
            module: Any = program.module()
            library = Path(str(torch._inductor.aot_compile(module, (images,), options=options)))
    except Exception as error:  # export and compiler raise many kinds, all meaning the same here
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line for line in lines if "error: " in line), lines[0])  # of the C++ compiler, where it spoke
        raise BackboneError(f"torch cannot compile the network: {why}") from error
    if "proxy_executor_call_function" in library.with_suffix(".cpp").read_text():
        raise BackboneError("the network needs operators that cannot be compiled")
    return library


def measured_moves(eager: Detector, settled: Detector, size: int = BATCH) -> dict[str, float]:
    """By score, and DOUBT, how far another form of the same model may move it: by drawn images, with a margin.

    They are run in batches of `size`, at most sixteen of them.
    """
    height, width, _ = eager.backbone.input_shape
    images = draw(height, width, DRAWN, seed=1)[: MOST_BATCHES * size]
    first, second = (_values(detector, images, size) for detector in (eager, settled))
    return {name: SAFETY * float(np.abs(first[name] - second[name]).max()) for name in first}


def largest(moves: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest of several moves, by score."""
    return {name: max(each[name] for each in moves) for name in moves[0]}


def _values(detector: Detector, images: Pixels, size: int) -> dict[str, NDArray[np.float64]]:
    outputs = [detector.outputs(images[start : start + size]) for start in range(0, len(images), size)]
    found = [detector.scores(part) | {DOUBT: doubt(part.logits).cpu().numpy()} for part in outputs]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    with suppress(ProcessLookupError):  # where this process leads no group
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    job = Job.model_validate_json(sys.argv[1])
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.nice(job.niceness)
    torch.set_num_threads(1)
    run(job)


if __name__ == "__main__":
    main()
