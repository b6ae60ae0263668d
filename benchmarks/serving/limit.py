# SPDX-License-Identifier: Apache-2.0
"""The machine's composite limit: decode, then the bare forward at batch 16, in one process with nothing around it.

    python -m benchmarks.serving.limit --workload A

It stays alive between measurements, idle, and measures on a line of standard input: `PRECISION MODE SECONDS`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from benchmarks.serving.servers import THREADS, passive
from benchmarks.serving.workloads import ROOT, WORKLOADS, Workload, encoded

Measure = Callable[[str, str, float], dict[str, float]]


@contextmanager
def limit(workload: Workload) -> Iterator[Measure]:
    """A process that measures when called with precision, mode (eager or compiled) and seconds.

    Yields:
        a function that returns images_per_s, images_per_cpu_s and cores.
    """
    command = [sys.executable, "-m", "benchmarks.serving.limit", "--workload", workload.letter]
    process = subprocess.Popen(
        command, cwd=ROOT, env=passive(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, told = process.stdin, process.stdout

    def measure(precision: str, mode: str, seconds: float) -> dict[str, float]:
        asked.write(f"{precision} {mode} {seconds}\n")
        asked.flush()
        line = told.readline()
        if not line:
            raise RuntimeError("the limit's process ended; its traceback is above")
        found: dict[str, float] = json.loads(line)
        return found

    try:
        yield measure
    finally:
        asked.close()
        process.wait()


def main() -> None:
    import torch

    from benchmarks.serving.peers.classifier import MAX_BATCH, Classifier

    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    workload = WORKLOADS[parser.parse_args().workload]
    images = [path.read_bytes() for path in encoded(workload.images)]
    known: dict[tuple[str, str], Any] = {}

    def classifier(precision: str, mode: str) -> Classifier:
        if (precision, mode) not in known:
            made = Classifier(workload.artifact, precision, THREADS)
            if mode == "compiled":
                torch._inductor.config.freezing = True
                made.module = torch.compile(made.module)
            for _ in range(3):
                made.logits([made.decode(image) for image in (images * MAX_BATCH)[:MAX_BATCH]])
            known[precision, mode] = made
        found: Classifier = known[precision, mode]
        return found

    for line in sys.stdin:
        precision, mode, seconds = line.split()
        ready, turn, done = classifier(precision, mode), cycle(images), 0
        began, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < float(seconds):
            ready.logits([ready.decode(next(turn)) for _ in range(MAX_BATCH)])
            done += MAX_BATCH
        wall, cpu = time.perf_counter() - began, time.process_time() - used
        print(
            json.dumps({"images_per_s": done / wall, "images_per_cpu_s": done / cpu, "cores": cpu / wall}), flush=True
        )


if __name__ == "__main__":
    main()
