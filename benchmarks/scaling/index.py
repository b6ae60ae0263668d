# SPDX-License-Identifier: Apache-2.0
"""What the exact search of a bank costs an image, what the approximate index costs, and what it misses.

    python -m benchmarks.scaling.index

`knn` over 2,048 features of 1,000 classes, which are made: Gaussians around class means, rectified. Core seconds, not
the clock. Writes benchmarks/scaling/results/index.json.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.outputs import Outputs
from detector.scores.index import INDEX_FROM, SEARCHED, centres
from detector.scores.nearest import Knn, unit_rows

RESULT = Path("benchmarks/scaling/results/index.json")
SIZES = (10_000, 25_000, 50_000, 100_000)
CLASSES, DIMENSIONS, QUERIES, BATCH = 1_000, 2_048, 256, 32
NETWORK = cast(Backbone, SimpleNamespace(device=torch.device("cpu"), num_classes=CLASSES))


def main() -> None:
    torch.set_num_threads(1)
    queries = features(QUERIES, seed=1)
    result = {
        "features": f"made: {DIMENSIONS:,} of {CLASSES:,} classes",
        "score": "knn",
        "lists_searched": SEARCHED,
        "index_from": INDEX_FROM,
        "rows": {str(size): measured(size, queries) for size in SIZES},
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "processor": platform.processor()},
        "versions": {name: version(name) for name in ("torch", "faiss-cpu")} | {"python": platform.python_version()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def features(rows: int, seed: int) -> Tensor:
    """Features as a rectified layer gives them, float32 [rows, 2048], the classes by turns."""
    means = torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(rows, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    return (means[torch.arange(rows) % CLASSES] + noise).clamp_min_(0)


def measured(size: int, queries: Tensor) -> dict[str, float]:
    bank = unit_rows(features(size, seed=2)).float()
    found: list[Tensor] = []
    training = core_seconds(lambda: found.append(centres(bank)))
    exact = Knn.from_state({"bank": bank}, NETWORK)
    loading = core_seconds(lambda: Knn.from_state({"bank": bank, "centres": found[0]}, NETWORK))
    indexed = Knn.from_state({"bank": bank, "centres": found[0]}, NETWORK)
    scores = [score_all(score, queries, QUERIES) for score in (exact, indexed)]
    excess = scores[1] / scores[0] - 1
    return {
        **{
            f"{name}_ms_in_batches_of_{batch}": 1000 * core_seconds(score_in(score, queries, batch)) / QUERIES
            for name, score in (("exact", exact), ("index", indexed))
            for batch in (1, BATCH)
        },
        "same_score": float((excess.abs() < 1e-6).double().mean()),
        "largest_excess": float(excess.max()),
        "training_s": training,
        "loading_s": loading,
    }


def score_in(score: Knn, queries: Tensor, batch: int) -> Callable[[], Any]:
    return lambda: score_all(score, queries, batch)


def score_all(score: Knn, queries: Tensor, batch: int) -> Tensor:
    logits = torch.zeros(len(queries), CLASSES)
    parts = (Outputs(*part) for part in zip(torch.split(logits, batch), torch.split(queries, batch), strict=True))
    return torch.cat([score.score(part) for part in parts])


def core_seconds(work: Callable[[], object]) -> float:
    """Seconds of all cores together that this process spends on some work."""
    before = time.process_time()
    work()
    return time.process_time() - before


if __name__ == "__main__":
    main()
