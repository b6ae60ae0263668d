# SPDX-License-Identifier: Apache-2.0
"""What the approximate index misses on real features, and what that costs in AUROC.

    python -m benchmarks.scaling.recall --network embedded

`resnet20` and `resnet56` (published weights) have a bank of 20,000 CIFAR-10 training images. `embedded`, the embedded
model, has one of 100,000 rows: the 40,000 images it was fitted on, their mirror images, and the same shifted by two
pixels, as far as needed; their features are kept under build/scaling. Queries are test images and every OOD set.
Writes into benchmarks/scaling/results/recall.json, a network at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.accuracy import networks
from benchmarks.accuracy.features import features
from benchmarks.accuracy.fitting import fitted
from benchmarks.cifar10.splits import split
from benchmarks.datasets import FAR_OOD, NEAR_OOD, Images, load
from detector import Detector
from detector.backbone import Backbone
from detector.evaluation import auroc
from detector.outputs import BATCH, Outputs
from detector.scores import Grood, Score
from detector.scores.base import State
from detector.scores.grood import comparable, gradient_bank
from detector.scores.index import SEARCHED, centres
from detector.scores.nearest import Knn, unit_rows

MODEL = Path("models/cifar10/1")
RESULT = Path("benchmarks/scaling/results/recall.json")
CACHE = Path("build/scaling/recall.safetensors")
SIZES = {"resnet20": (20_000,), "resnet56": (20_000,), "embedded": (50_000, 100_000)}
SOURCES = {"test": "cifar10-test"}
QUERIES = 1_000  # of each set
SHIFT = 2  # pixels
SAME = 1e-6  # relative: rounding of float32


@dataclass(frozen=True)
class Known:
    """What a search is measured on.

    Args:
        backbone: the network.
        bank: features of training images, float32 [B, D].
        queries: features of `test` and of each OOD set, float32 [N, D].
        groups: `near` or `far` of each OOD set.
        prototypes, ood_prototype: GROOD's.
    """

    backbone: Backbone
    bank: Tensor
    queries: Mapping[str, Tensor]
    groups: Mapping[str, str]
    prototypes: Tensor
    ood_prototype: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.recall")
    parser.add_argument("--network", choices=SIZES, required=True)
    name = parser.parse_args().network
    torch.set_num_threads(1)
    known = embedded() if name == "embedded" else published(name)
    found = {
        "dimensions": known.bank.shape[1],
        "queries": sum(map(len, known.queries.values())),
        "lists_searched": SEARCHED,
        "rows": {str(size): measured(known, size) for size in SIZES[name]},
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "processor": platform.processor()},
        "versions": {name: version(name) for name in ("torch", "faiss-cpu")} | {"python": platform.python_version()},
    }
    result = (json.loads(RESULT.read_text()) if RESULT.exists() else {}) | {name: found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def published(name: str) -> Known:
    """A published network, from the features that the ablations keep."""
    kept, backbone = features(name), networks.load(name)
    state = fitted(("grood",), kept, backbone)["grood"].state()
    queries = {each: kept.sets[each] for each in ("test", *kept.groups)}
    return Known(backbone, kept.sets["train"], queries, kept.groups, state["prototypes"], state["ood_prototype"])


def embedded() -> Known:
    """The embedded model, in bfloat16 as it serves."""
    detector = Detector.load(MODEL, device="cpu", precision="bf16")
    groups = dict.fromkeys(NEAR_OOD, "near") | dict.fromkeys(FAR_OOD, "far")
    if not CACHE.exists():
        sets = {"bank": np.concatenate(list(views(split()["fit"][0])))[: max(SIZES["embedded"])]}
        sets |= {name: load(SOURCES.get(name, name))[0][:QUERIES] for name in ("test", *groups)}
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: features_of(detector.backbone, images) for name, images in sets.items()}, CACHE)
    queries = load_file(CACHE)
    bank = queries.pop("bank")
    state = detector.fitted["grood"].state()
    return Known(detector.backbone, bank, queries, groups, state["prototypes"], state["ood_prototype"])


def views(images: Images) -> Iterator[Images]:
    """The images [N, H, W, 3], mirrored, and shifted with their edges reflected."""
    yield images
    yield images[:, :, ::-1]
    padded = np.pad(images, ((0, 0), (SHIFT, 0), (SHIFT, 0), (0, 0)), mode="reflect")
    yield padded[:, :-SHIFT, :-SHIFT]


def features_of(backbone: Backbone, images: Images) -> Tensor:
    parts = (torch.from_numpy(part.copy()) for part in np.array_split(images, max(1, len(images) // BATCH)))
    return torch.cat([backbone.outputs(part).penultimate for part in parts])


def measured(known: Known, size: int) -> dict[str, dict[str, float]]:
    """By score, over a bank of the first `size` rows: what the index finds against the exact search."""
    rows = known.bank[:size]
    anchors = {"prototypes": known.prototypes, "ood_prototype": known.ood_prototype}
    gradients, unit = gradient_bank(rows, **anchors), unit_rows(rows).float()
    found: dict[str, dict[str, float]] = {}
    kinds: tuple[tuple[type[Score], State, Tensor], ...] = (
        (Knn, {"bank": unit}, unit),
        (Grood, anchors | {"bank": gradients}, comparable(gradients)),
    )
    for kind, state, searched in kinds:
        exact = kind.from_state(state, known.backbone)
        indexed = kind.from_state(state | {"centres": centres(searched)}, known.backbone)
        found[kind.name] = compared(scores(exact, known), scores(indexed, known), known.groups)
    return found


def scores(score: Score, known: Known) -> dict[str, Tensor]:
    """Of each set of queries, float64 [N]; in batches, as a server asks."""
    logits = torch.zeros(BATCH, known.backbone.num_classes)
    return {
        name: torch.cat([score.score(Outputs(logits[: len(part)], part)) for part in torch.split(rows, BATCH)])
        for name, rows in known.queries.items()
    }


def compared(exact: Mapping[str, Tensor], indexed: Mapping[str, Tensor], groups: Mapping[str, str]) -> dict[str, float]:
    """Share of queries whose score the index leaves as it is, the largest excess, and both AUROCs."""
    before, after = (torch.cat(list(each.values())) for each in (exact, indexed))
    found = {
        "same_score": float((after <= before * (1 + SAME)).double().mean()),
        "largest_excess": float((after / before).nan_to_num(1).max()) - 1,
    }
    for name, each in (("exact", exact), ("index", indexed)):
        for group in ("near", "far"):
            rates = [auroc(each["test"].numpy(), each[ood].numpy()) for ood, its in groups.items() if its == group]
            found[f"{name}_{group}_auroc"] = float(np.mean(rates))
    return found


if __name__ == "__main__":
    main()
