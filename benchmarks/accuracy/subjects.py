# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measures: a network, its images, and a digest of the weights, so that a result names its subject."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.accuracy import networks
from benchmarks.accuracy.sets import TRAIN_IMAGES, Sets, balanced, load_sets, spread
from benchmarks.cifar10.splits import split
from benchmarks.datasets import CIFAR10_CLASSES, FAR_OOD, NEAR_OOD, Images, Labels, load
from detector import Detector
from detector.artifact import WEIGHTS, file_digest, read_manifest
from detector.backbone import Backbone
from detector.data import ArrayDataset, Subset
from detector.networks import load_network, parse_spec

EMBEDDED = Path("models/cifar10/1")
WIDE, WIDE_HELD_OUT = Path("benchmarks/accuracy/weights/cifar10-wide.safetensors"), 2_000
NAMES = ("embedded", "wide", *networks.NETWORKS)
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
        name: `embedded`, the network of the default model; `wide`, ours of the published width; or a published one.
        limit: images of each set but train; None takes all.
        train: training images; None takes 20,000 for a published network, all for ours.
        precision: of the embedded network, `auto` as it is served on this machine; others run in float32.

    Raises:
        FileNotFoundError: its weights or images are not there.
    """
    if name == "embedded":
        return _ours(Detector.load(EMBEDDED, precision=precision).backbone, split(), limit, train)
    if name == "wide":
        module, _, preprocessing = load_network(parse_spec("cifar_resnet18"), str(WIDE))
        return _ours(Backbone(module, preprocessing), split(WIDE_HELD_OUT), limit, train)
    backbone = networks.load(name)
    known = networks.NETWORKS[name].known
    return Subject(backbone, load_sets(known, backbone.preprocessing, train=train or TRAIN_IMAGES, limit=limit), known)


def weights(name: str) -> dict[str, str]:
    """The file of a network's weights and its SHA-256; of the embedded network also the model it is read from."""
    if name != "embedded":
        path = WIDE if name == "wide" else networks.weights_file(name)
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


def _ours(
    backbone: Backbone, parts: Mapping[str, tuple[Images, Labels]], limit: int | None, train: int | None
) -> Subject:
    """A network of ours, on the images that it was trained on and those that it was not."""

    def dataset(images: Images, labels: Labels | None) -> ArrayDataset:
        return ArrayDataset(images, labels, backbone.preprocessing, classes=CIFAR10_CLASSES)

    fit = dataset(*parts["fit"])
    sets = Sets(
        fit if train is None else Subset(fit, balanced(fit.labels, train)),
        spread(dataset(*parts["tune"]), limit),
        spread(dataset(*parts["calibration"]), limit),
        spread(dataset(*load("cifar10-test")), limit),
        {name: spread(dataset(load(name)[0], None), limit) for name in NEAR_OOD},
        {name: spread(dataset(load(name)[0], None), limit) for name in FAR_OOD},
    )
    return Subject(backbone, sets, "cifar10")
