# SPDX-License-Identifier: Apache-2.0
"""Scores fitted from stored features: what `detector.fit` does, without running the network again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.accuracy.features import Features
from detector.backbone import Backbone
from detector.evaluation import auroc
from detector.features import bind
from detector.scores import FitOptions, Gatherer, Score, registry, score_all
from detector.scores.gather import EarlyMaps


class StoredPrototypes(EarlyMaps):
    """The mix-up of one early layer, as the features hold it."""

    def __init__(self, features: Features, layer: str) -> None:
        self.features, self.layer = features, layer

    def mean_of_mixed(self, backbone: Backbone, share: float, batch_size: int = 100) -> Tensor:
        return self.features.ood_prototypes[self.layer, share].double()


def fitted(
    names: Sequence[str],
    features: Features,
    backbone: Backbone,
    *,
    layer: str = "layer1",
    share: float | None = None,
    bank_size: int = 10_000,
    generator: str = "mixup",
) -> dict[str, Score]:
    """Forward-only scores fitted on `train` and tuned on `tune`.

    Args:
        names: of the registry, the members of a fusion among them.
        features, backbone: of one network.
        layer, share: of the mix-up; None keeps each score's own share.
        bank_size: rows of a nearest-neighbour bank.
        generator: of the OOD prototype.
    """
    options = FitOptions(num_classes=backbone.num_classes, bank_size=bank_size, generator=generator)
    scores = {name: registry()[name](options) for name in names}
    pool: dict[type[Gatherer], Gatherer] = {EarlyMaps: StoredPrototypes(features, layer)}
    outputs, labels = features.outputs("train"), features.labels["train"]
    for score in scores.values():
        for kind, gatherer in score.gathered.items():
            if kind not in pool:
                gatherer.add(outputs, labels)
                pool[kind] = gatherer
        score.gathered = {kind: pool[kind] for kind in score.gathered}
        if share is not None:
            score.mixup_coefficient = share  # type: ignore[attr-defined]
        score.finalize(backbone)
    tune(scores, features)
    return scores


def tune(scores: Mapping[str, Score], features: Features) -> None:
    """Members before what is made of them."""
    bind(scores)
    for score in sorted(scores.values(), key=lambda score: bool(score.members)):
        score.tune(features.outputs("tune"), features.labels["tune"])


def group_means(scores: Mapping[str, Score], features: Features) -> dict[str, dict[str, float]]:
    """AUROC of each score: the unweighted near and far means, and each set."""
    names = list(scores)
    known = score_all(scores, names, features.outputs("test"))
    table: dict[str, dict[str, float]] = {name: {} for name in names}
    for ood in features.groups:
        values = score_all(scores, names, features.outputs(ood))
        for name in names:
            table[name][ood] = auroc(known[name].numpy(), values[name].numpy())
    for row in table.values():
        for group in ("near", "far"):
            row[group] = float(torch.tensor([row[name] for name in features.of_group(group)]).mean())
    return table
