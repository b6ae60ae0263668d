# SPDX-License-Identifier: Apache-2.0
"""Penultimate features of one network on all its sets, kept under build/ for what needs no second forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.accuracy import subjects
from benchmarks.accuracy.sets import balanced
from detector.backbone import Backbone
from detector.data import Dataset, Subset
from detector.features import collect, stream
from detector.outputs import Outputs
from detector.scores import FitOptions
from detector.scores.gather import EarlyMaps

CACHE = Path("build/accuracy")
LAYERS = ("layer1", "layer2", "layer3")
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
MIXED_IMAGES, MEAN_IMAGES = 1_000, 5_000  # a mix-up prototype for the ablation: images mixed, images in a class mean


@dataclass(frozen=True)
class Features:
    """What an ablation reads.

    Args:
        weight, bias: of the last layer.
        sets: for `train`, `tune`, `calibration`, `test` and each OOD set by name: features [N, D].
        labels, ids: int64 [N] of the in-distribution sets.
        groups: `near` or `far` of each OOD set.
        ood_prototypes: q [D] by (layer, share).
    """

    weight: Tensor
    bias: Tensor
    sets: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    ids: Mapping[str, Tensor]
    groups: Mapping[str, str]
    ood_prototypes: Mapping[tuple[str, float], Tensor]

    def outputs(self, name: str) -> Outputs:
        """One set as the network's outputs, without early maps."""
        h = self.sets[name]
        return Outputs(h @ self.weight.T + self.bias, h, ids=self.ids.get(name))

    def of_group(self, group: str) -> list[str]:
        """The OOD sets of a group."""
        return [name for name, its in self.groups.items() if its == group]


def features(name: str) -> Features:
    """The features of a network of `subjects.NAMES`, computed where they are not kept."""
    train = len(subjects.subject(name).sets.train)
    path = CACHE / f"{name}-{subjects.weights(name)['sha256'][:12]}-{train}.safetensors"
    if not path.exists():
        _compute(name, path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        groups = json.loads((file.metadata() or {})["groups"])
    return Features(
        tensors["weight"],
        tensors["bias"],
        _part(tensors, "set."),
        _part(tensors, "labels."),
        _part(tensors, "ids."),
        groups,
        {(key.split("/")[0], float(key.split("/")[1])): value for key, value in _part(tensors, "q.").items()},
    )


def _compute(name: str, path: Path) -> None:
    subject = subjects.subject(name)
    backbone, sets = subject.backbone, subject.sets
    tensors = {"weight": backbone.weight, "bias": backbone.bias}
    known = {"train": sets.train, "tune": sets.tune, "calibration": sets.calibration, "test": sets.test}
    for part, dataset in (known | dict(sets.near) | dict(sets.far)).items():
        collected = collect(backbone, dataset)
        tensors[f"set.{part}"] = collected.outputs.penultimate
        if part in known:
            tensors |= {f"labels.{part}": torch.from_numpy(collected.labels), f"ids.{part}": collected.ids}
    for layer in (layer for layer in LAYERS if hasattr(backbone.module, layer)):
        for share, q in _ood_prototypes(backbone, layer, sets.train).items():
            tensors[f"q.{layer}/{share}"] = q
    groups = dict.fromkeys(sets.near, "near") | dict.fromkeys(sets.far, "far")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"groups": json.dumps(groups)})


def _ood_prototypes(backbone: Backbone, layer: str, train: Dataset) -> dict[float, Tensor]:
    tapped = Backbone(backbone.module, backbone.preprocessing, head=backbone.head, early=layer)
    gatherer = EarlyMaps(replace(FitOptions(), num_classes=backbone.num_classes, mixup_images=MIXED_IMAGES))
    for outputs, labels in stream(tapped, Subset(train, balanced(train.labels, MEAN_IMAGES)), early=True):
        gatherer.add(outputs, labels)
    return {share: gatherer.mean_of_mixed(tapped, share).float() for share in SHARES}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
