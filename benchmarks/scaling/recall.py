# SPDX-License-Identifier: Apache-2.0
"""What the approximate index misses on real features, and what that costs in AUROC: the embedded model, CIFAR-10.

    python -m benchmarks.scaling.recall

The bank is the 40,000 images the model was fitted on, then their mirror images, then the same shifted by two pixels:
100,000 rows in all. Queries are test images and every OOD set. Features are kept under build/scaling. Writes
benchmarks/scaling/results/recall.json.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cifar10.splits import split
from benchmarks.datasets import FAR_OOD, NEAR_OOD, Images, load
from detector import Detector
from detector.backbone import Backbone
from detector.evaluation import auroc
from detector.features import BATCH
from detector.outputs import Outputs
from detector.scores import Grood, Score
from detector.scores.grood import comparable, gradient_bank
from detector.scores.index import SEARCHED, centres
from detector.scores.nearest import Knn, unit_rows

MODEL = Path("models/cifar10/1")
RESULT = Path("benchmarks/scaling/results/recall.json")
CACHE = Path("build/scaling/recall.safetensors")
SIZES = (50_000, 100_000)
QUERIES = 1_000  # of each set
SHIFT = 2  # pixels
SAME = 1e-6  # relative: rounding of float32


def main() -> None:
    torch.set_num_threads(1)
    detector = Detector.load(MODEL, device="cpu", precision="bf16")
    features = load_file(CACHE) if CACHE.exists() else computed(detector.backbone)
    print(f"{len(features['bank']):,} rows of {features['bank'].shape[1]}", flush=True)
    rows = {str(size): measured(detector, features, size) for size in SIZES}
    result = {
        "model": detector.manifest.model_digest,
        "dimensions": features["bank"].shape[1],
        "queries": sum(len(value) for name, value in features.items() if name != "bank"),
        "lists_searched": SEARCHED,
        "rows": rows,
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "processor": platform.processor()},
        "versions": {name: version(name) for name in ("torch", "faiss-cpu")} | {"python": platform.python_version()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def computed(backbone: Backbone) -> dict[str, Tensor]:
    """Penultimate features: of the bank, in its order, and of each set of queries."""
    sets = {"bank": np.concatenate(list(views(split()["fit"][0])))[: max(SIZES)]}
    sets |= {name: load(name)[0][:QUERIES] for name in ("cifar10-test", *NEAR_OOD, *FAR_OOD)}
    found = {name: features_of(backbone, images) for name, images in sets.items()}
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, CACHE)
    return found


def views(images: Images) -> Iterator[Images]:
    """The images [N, H, W, 3], mirrored, and shifted with their edges reflected."""
    yield images
    yield images[:, :, ::-1]
    padded = np.pad(images, ((0, 0), (SHIFT, 0), (SHIFT, 0), (0, 0)), mode="reflect")
    yield padded[:, :-SHIFT, :-SHIFT]


def features_of(backbone: Backbone, images: Images) -> Tensor:
    parts = (torch.from_numpy(part.copy()) for part in np.array_split(images, max(1, len(images) // BATCH)))
    return torch.cat([backbone.outputs(part).penultimate for part in parts])


def measured(detector: Detector, features: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    """By score, over a bank of the first `size` rows: what the index finds against the exact search."""
    rows = features["bank"][:size]
    fitted = detector.fitted["grood"].state()
    anchors = {name: fitted[name] for name in ("prototypes", "ood_prototype")}
    gradients = gradient_bank(rows, **anchors)
    unit = unit_rows(rows).float()
    found: dict[str, Any] = {}
    for kind, state, searched in (
        (Knn, {"bank": unit}, unit),
        (Grood, anchors | {"bank": gradients}, comparable(gradients)),
    ):
        exact = kind.from_state(state, detector.backbone)
        indexed = kind.from_state(state | {"centres": centres(searched)}, detector.backbone)
        found[kind.name] = compared(*(scores(each, features, detector.backbone) for each in (exact, indexed)))
        print(size, kind.name, found[kind.name], flush=True)
    return found


def scores(score: Score, features: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Of each set of queries, float64 [N]; in batches, as a server asks."""
    logits = torch.zeros(BATCH, backbone.num_classes)
    return {
        name: torch.cat([score.score(Outputs(logits[: len(part)], part)) for part in torch.split(rows, BATCH)])
        for name, rows in features.items()
        if name != "bank"
    }


def compared(exact: Mapping[str, Tensor], indexed: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of queries whose score the index leaves as it is, the largest excess, and both AUROCs."""
    before, after = (torch.cat(list(each.values())) for each in (exact, indexed))
    excess = after / before - 1
    found = {"same_score": float((excess < SAME).double().mean()), "largest_excess": float(excess.max())}
    for name, each in (("exact", exact), ("index", indexed)):
        for group, sets in (("near", NEAR_OOD), ("far", FAR_OOD)):
            rates = [auroc(each["cifar10-test"].numpy(), each[ood].numpy()) for ood in sets]
            found[f"{name}_{group}_auroc"] = float(np.mean(rates))
    return found


if __name__ == "__main__":
    main()
