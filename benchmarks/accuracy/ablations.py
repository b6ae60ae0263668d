# SPDX-License-Identifier: Apache-2.0
"""GROOD taken apart: one part away at a time, plain and whitened, and its early layer, mix-up coefficient and bank.

    python -m benchmarks.accuracy.ablations --network resnet20

Writes benchmarks/accuracy/results/ablations-NETWORK.json. Rows of the development networks were in view when the first
constants were frozen; those of other networks describe and select nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import subjects
from benchmarks.accuracy.features import LAYERS, SHARES, Features, features
from benchmarks.accuracy.fitting import fitted, group_means
from benchmarks.accuracy.sets import balanced
from detector.backbone import Backbone
from detector.evaluation import auroc
from detector.scores.fusion import Fusion
from detector.scores.grood import Grood, Whitened, gradient_bank
from detector.scores.nearest import NEIGHBOURS, exact_distances, unit_rows

RESULTS = Path("benchmarks/accuracy/results")
FORMS = ("grood", "grood_margin", "grood_w", "grood_margin_w")
BANK, BANKS = 10_000, (100, 300, 1_000, 3_000, 10_000, 20_000)
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="GROOD taken apart.")
    parser.add_argument("--network", choices=("resnet20", "resnet56", "wide"), required=True)
    name = parser.parse_args().network
    table = ablate(features(name), subjects.subject(name).backbone)
    (RESULTS / f"ablations-{name}.json").write_text(
        json.dumps(subjects.provenance(name) | {"rows": table}, indent=1) + "\n"
    )
    for row, means in table.items():
        print(f"{row:60} {means['near']:.2%} {means['far']:.2%}")


def ablate(known: Features, backbone: Backbone) -> dict[str, Row]:
    """Near and far AUROC of each variant, by its description."""
    forms = ("grood", "grood_norm", "grood_margin", "grood_w", "grood_margin_w", "mds", "rmds", "knn")
    names = {
        "grood": "plain: 1-NN (`grood`)",
        "grood_norm": "plain: norm (`grood_norm`)",
        "grood_margin": "plain: margin (`grood_margin`)",
        "grood_w": "whitened: 1-NN (`grood_w`)",
        "grood_margin_w": "whitened: margin (`grood_margin_w`)",
        "mds": "plain: Mahalanobis (`mds`)",
        "rmds": "plain: relative Mahalanobis (`rmds`)",
        "knn": "plain: KNN (`knn`)",
    }
    table = {names[name]: row for name, row in _means(known, backbone, forms).items()}
    table["whitened: norm"] = _whitened_norm(known, backbone)
    table["plain: 1-NN, wrongly classified training images in the bank too"] = _whole_bank(known, backbone)
    table["whitened by calibration images: margin"] = _whitened_by_held_out(known, backbone)
    table |= _without_ood_prototype(known, backbone)
    for generator, text in {"prototype_mean": "mean of the class prototypes", "noise": "mean of blurred noise"}.items():
        for name, row in _means(known, backbone, FORMS, generator).items():
            table[f"`{name}`, q = {text}"] = row
    for layer in LAYERS:
        for share in SHARES:
            scores = fitted(("grood", "grood_w", "grood_margin_w"), known, backbone, layer=layer, share=share)
            for name, row in group_means(scores, known).items():
                table[f"`{name}`, mix-up at {layer}, coefficient {share}"] = _rates(row)
    for size in BANKS:
        rows = group_means(fitted((*Fusion.members, "fusion"), known, backbone, bank_size=size), known)
        for name in ("grood", "grood_w", "knn", "fusion"):
            table[f"`{name}`, bank of {size:,}"] = _rates(rows[name])
    return table


def _means(known: Features, backbone: Backbone, names: tuple[str, ...], generator: str = "mixup") -> dict[str, Row]:
    scores = fitted(names, known, backbone, generator=generator)
    return {name: _rates(row) for name, row in group_means(scores, known).items()}


def _rates(row: Mapping[str, float]) -> Row:
    return {group: row[group] for group in ("near", "far")}


def _whitened_norm(known: Features, backbone: Backbone) -> Row:
    """`grood_norm` where `grood_w` measures: its whitening, temperature and OOD prototype."""
    score = fitted(("grood_w",), known, backbone)["grood_w"]
    assert isinstance(score, Whitened)
    transform, q = score.whitening.double(), score.ood_prototype.double()
    prototypes = torch.vstack([score.prototypes.double(), q])

    def log_norm(h: Tensor) -> Tensor:
        whitened = h.double() @ transform
        distances = exact_distances(whitened, prototypes)
        log_pi = torch.log_softmax(-distances, dim=1)[:, -1]
        return log_pi + ((whitened - q).abs().sum(dim=1) / distances[:, -1]).log()

    return _measured(log_norm, known)


def _whitened_by_held_out(known: Features, backbone: Backbone) -> Row:
    """`grood_margin_w` with the spread within classes of images that the network was not trained on."""
    score = fitted(("grood_margin_w",), known, backbone)["grood_margin_w"]
    assert isinstance(score, Whitened)
    features, labels = known.sets["calibration"].double(), known.labels["calibration"]
    away = features - score._raw_prototypes[labels]
    score._variances, score._axes = torch.linalg.eigh(away.T @ away / len(away))
    score.tune(known.outputs("tune"), known.labels["tune"])
    return _rates(group_means({"grood_margin_w": score}, known)["grood_margin_w"])


def _whole_bank(known: Features, backbone: Backbone) -> Row:
    """`grood` with as many training images in its bank as it has of the correctly classified ones, right or wrong."""
    score = fitted(("grood",), known, backbone)["grood"]
    assert isinstance(score, Grood)
    bank = gradient_bank(_bank(known), score.prototypes, score.ood_prototype)
    whole = Grood.from_state(score.state() | {"bank": bank}, backbone)
    return _rates(group_means({"grood": whole}, known)["grood"])


def _bank(known: Features) -> Tensor:
    """Features of training images, as many of each class, as many as a bank has by default."""
    return known.sets["train"][torch.from_numpy(balanced(known.labels["train"].numpy(), BANK))]


def _without_ood_prototype(known: Features, backbone: Backbone) -> dict[str, Row]:
    """The prototypes alone: their softmax, and the distance to the nearest; and KNN in the whitened space."""
    score = fitted(("grood_margin_w",), known, backbone)["grood_margin_w"]
    plain = fitted(("grood_margin",), known, backbone)["grood_margin"]
    assert isinstance(score, Whitened)
    transform = score.whitening.double()
    centred = known.sets["train"].double().mean(dim=0)
    bank = unit_rows((_bank(known).double() - centred) @ transform)

    def distances(h: Tensor) -> Tensor:
        return exact_distances(h.double() @ transform, score.prototypes.double())

    def raw(h: Tensor) -> Tensor:
        return exact_distances(h.double(), plain.state()["prototypes"].double())

    def knn(h: Tensor) -> Tensor:
        queries = unit_rows((h.double() - centred) @ transform)
        return -(queries @ bank.T).topk(NEIGHBOURS, dim=1).values[:, -1]

    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "plain: prototype softmax without q": lambda h: -torch.softmax(-raw(h), dim=1).amax(dim=1),
        "whitened: prototype softmax without q": lambda h: -torch.softmax(-distances(h), dim=1).amax(dim=1),
        "plain: distance to the nearest prototype": lambda h: raw(h).amin(dim=1),
        "whitened: distance to the nearest prototype": lambda h: distances(h).amin(dim=1),
        "whitened: KNN on centred, normalised features": knn,
    }
    return {name: _measured(variant, known) for name, variant in variants.items()}


def _measured(variant: Callable[[Tensor], Tensor], known: Features) -> Row:
    inside = variant(known.sets["test"]).numpy()
    by_set = {name: auroc(inside, variant(known.sets[name]).numpy()) for name in known.groups}
    return {group: float(np.mean([by_set[name] for name in known.of_group(group)])) for group in ("near", "far")}


if __name__ == "__main__":
    main()
