# SPDX-License-Identifier: Apache-2.0
"""Verdicts a second of the default model on Ray Serve with one replica and with two, by turns, one core each.

    make bench-scaling

Writes benchmarks/scaling/results/replicas.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.scaling.cluster import machine, serving

RESULT = Path("benchmarks/scaling/results/replicas.json")
IMAGE = Path("examples/cat.png")
CALLERS, REQUESTS, ROUNDS = 32, 1_500, 3


def main() -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    loads: list[float] = []
    with TemporaryDirectory() as state, machine(**environment(state)):
        for _ in range(ROUNDS):
            for replicas, measured in rates.items():
                with serving(replicas) as url:
                    measured.append(rate(url))
                    loads.append(os.getloadavg()[0])
    medians = {replicas: statistics.median(measured) for replicas, measured in rates.items()}
    result = {
        "image": "32 x 32 PNG",
        "callers": CALLERS,
        "requests": REQUESTS,
        "verdicts_per_second": {str(replicas): measured for replicas, measured in rates.items()},
        "two_against_one": medians[2] / medians[1],
        "machine": {"cores": os.cpu_count(), "load_average": loads},
        "versions": {name: version(name) for name in ("ray", "torch", "fastapi", "uvicorn")}
        | {"python": platform.python_version()},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def environment(state: str) -> dict[str, str]:
    return {
        "OODGATE_MODELS": str(Path("models").resolve()),
        "OODGATE_STATE_DIR": state,
        "OODGATE_ALLOW_OPEN": "true",
        "OODGATE_COMPILE": "off",
        "OODGATE_DECODE_THREADS": "1",
        "OODGATE_TORCH_THREADS": "1",
        "OODGATE_LOG_LEVEL": "WARNING",
    }


def rate(url: str) -> float:
    """Verdicts a second, after a tenth of the requests to warm up."""
    body = IMAGE.read_bytes()
    limits = httpx.Limits(max_connections=CALLERS, max_keepalive_connections=CALLERS)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as client, ThreadPoolExecutor(CALLERS) as callers:

        def ask(_: int) -> None:
            client.post("/v1/verdict", content=body, headers={"content-type": "image/png"}).raise_for_status()

        list(callers.map(ask, range(REQUESTS // 10)))
        started = time.monotonic()
        list(callers.map(ask, range(REQUESTS)))
        return REQUESTS / (time.monotonic() - started)


if __name__ == "__main__":
    main()
