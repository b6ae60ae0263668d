# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measures: a network, its images, and a digest of the weights, so that a result names its subject."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy import networks
from benchmarks.accuracy.features import TRAIN_IMAGES
from benchmarks.accuracy.sets import Sets, balanced, load_sets, spread
from benchmarks.cifar10.splits import split
from benchmarks.datasets import CIFAR10_CLASSES, FAR_OOD, NEAR_OOD, load
from detector import Detector
from detector.artifact import WEIGHTS, file_digest, read_manifest
from detector.backbone import Backbone
from detector.data import ArrayDataset, Dataset, Subset

EMBEDDED = Path("models/cifar10/1")
NAMES = ("embedded", *networks.NETWORKS)
AskedPrecision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Subject:
    """One network with its images.

    Args:
        backbone: the network.
        sets: its images.
        known: the data set it was trained on: cifar10, cifar100 or imagenet.
    """

    backbone: Backbone
    sets: Sets
    known: str


def subject(
    name: str, limit: int | None = None, train: int | None = None, precision: AskedPrecision = "auto"
) -> Subject:
    """One of NAMES.

    Args:
        name: `embedded`, the network of the default model, or a published one.
        limit: images of each set but train; None takes all.
        train: training images; None takes 20,000 for a published network, all for the embedded one.
        precision: of the embedded network, `auto` as it is served on this machine; a published one runs in float32.

    Raises:
        FileNotFoundError: its weights or images are not there.
    """
    if name == "embedded":
        return _embedded(limit, train, precision)
    backbone = networks.load(name)
    known = networks.NETWORKS[name].known
    return Subject(backbone, load_sets(known, backbone.preprocessing, train=train or TRAIN_IMAGES, limit=limit), known)


def weights(name: str) -> dict[str, str]:
    """The file of a network's weights and its SHA-256; of the embedded network also the model it is read from."""
    if name != "embedded":
        path = networks.weights_file(name)
        return {"file": path.name, "sha256": file_digest(path)}
    path, manifest = EMBEDDED / WEIGHTS, read_manifest(EMBEDDED)
    return {"file": str(path), "sha256": file_digest(path), "model_digest": manifest.model_digest}


def versions(*more: str) -> dict[str, str]:
    """Python's version and those of the packages that compute, and of more packages by name."""
    packages = ("oodgate", "torchvision", "numpy", "scipy", *more)
    computing = {"python": platform.python_version(), "torch": torch.__version__}  # which tells a CPU build from others
    return computing | {name: version(name) for name in packages}


def provenance(name: str, *packages: str) -> dict[str, Any]:
    """What every result says of its subject: `network`, `weights` and `versions`."""
    return {"network": name, "weights": weights(name), "versions": versions(*packages)}


def named(result: Mapping[str, Any]) -> str:
    """The weights of a result for a reader: file, the first digits of their digest, and what that rests on."""
    weights = result["weights"]
    by = f", known afterwards by {weights['known_by']}" if "known_by" in weights else ""
    return f"Weights `{weights['file']}`, `{weights['sha256'][:12]}`{by}"


def _embedded(limit: int | None, train: int | None, precision: AskedPrecision) -> Subject:
    """The network of the default model, on the images that it was never trained on."""
    backbone = Detector.load(EMBEDDED, precision=precision).backbone
    preprocessing = read_manifest(EMBEDDED).preprocessing

    def dataset(images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> Dataset:
        return spread(ArrayDataset(images, labels, preprocessing, classes=CIFAR10_CLASSES), limit)

    parts = split()
    fit = ArrayDataset(*parts["fit"], preprocessing, classes=CIFAR10_CLASSES)
    sets = Sets(
        fit if train is None else Subset(fit, balanced(fit.labels, train)),
        dataset(*parts["tune"]),
        dataset(*parts["calibration"]),
        dataset(*load("cifar10-test")),
        {name: dataset(load(name)[0], None) for name in NEAR_OOD},
        {name: dataset(load(name)[0], None) for name in FAR_OOD},
    )
    return Subject(backbone, sets, "cifar10")
