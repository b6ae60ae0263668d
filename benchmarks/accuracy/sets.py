# SPDX-License-Identifier: Apache-2.0
"""The images a published network is fitted, tuned, calibrated and measured on.

A published network has seen the whole training set, so nothing of it is left for calibration: tune, calibration and
test images are three disjoint parts of the test images, 20, 30 and 50 %, ordered by their digest.

CIFAR-10    train: its 50,000; the 5,000 test images at hand.
CIFAR-100   train: 15,000 of its 50,000; the 5,000 test images at hand.
ImageNet    train: one photo of each class; held out: 500 Flickr photos. No near-OOD set of that size is at hand.

Tiny-ImageNet lacks the classes that are near CIFAR-10's, not those near CIFAR-100's: there its AUROC is too low.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import datasets
from benchmarks.datasets import FAR_OOD, NEAR_OOD, data_dir
from detector.data import UNLABELLED, ArrayDataset, Dataset, Labels, Subset
from detector.images import Pixels, Preprocessing, decode, image_ids

TRAIN_IMAGES = 20_000  # of a published network
SHARES = {"tune": 0.2, "calibration": 0.3, "test": 0.5}
TRAIN = {"cifar10": "cifar10-train", "cifar100": "cifar100-train15k"}
NEAR = {"cifar10": NEAR_OOD, "cifar100": ("cifar10-test", "tinyimagenet"), "imagenet": ()}
PHOTO_TRAIN, PHOTO_TEST = "imagenet-samples-1000", "imagenet-nips17-500"
PHOTO_FAR = ("textures-224-500", "scenes-224-500")

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Sets:
    """Everything one network is measured on: labelled in-distribution parts, and OOD sets by name."""

    train: Dataset
    tune: Dataset
    calibration: Dataset
    test: Dataset
    near: Mapping[str, Dataset]
    far: Mapping[str, Dataset]


class PhotoDataset:
    """JPEG photos of one zip file, decoded when they are read; labels int64 [N]."""

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        self.preprocessing, self.path = preprocessing, path
        with zipfile.ZipFile(path) as archive:
            self.names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            self.files = [archive.read(name) for name in self.names]
            known = json.loads(archive.read("index.json")) if "index.json" in archive.namelist() else []
        self.labels = _photo_labels(self.names, known)
        self.classes: Sequence[str] = [str(index) for index in range(1000)]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Pixels:
        return decode(self.files[index], self.preprocessing)

    def name(self, index: int) -> str:
        return f"{self.path.name}/{self.names[index]}"

    def fingerprint(self) -> str:
        return f"{self.path.name} {self.path.stat().st_size}"


def load_sets(known: str, preprocessing: Preprocessing, *, train: int | None = None, limit: int | None = None) -> Sets:
    """The sets of a network that was trained on `known`.

    Args:
        known: cifar10, cifar100 or imagenet.
        preprocessing: the network's.
        train: training images, balanced over the classes; None takes all.
        limit: images of each other set; None takes all.
    """
    if known == "imagenet":
        everything: Dataset = photos(PHOTO_TRAIN, preprocessing)
        held_out: Dataset = photos(PHOTO_TEST, preprocessing)
        near: dict[str, Dataset] = {}
        far = {name: photos(name, preprocessing) for name in PHOTO_FAR}
    else:
        everything, held_out = _small(TRAIN[known], preprocessing), _small(f"{known}-test", preprocessing)
        near = {name: _small(name, preprocessing) for name in NEAR[known]}
        far = {name: _small(name, preprocessing) for name in FAR_OOD}
    parts = {name: Subset(held_out, part) for name, part in _parts(held_out).items()}
    return Sets(
        everything if train is None else Subset(everything, balanced(everything.labels, train)),
        **{name: spread(part, limit) for name, part in parts.items()},
        near={name: spread(dataset, limit) for name, dataset in near.items()},
        far={name: spread(dataset, limit) for name, dataset in far.items()},
    )


def photos(name: str, preprocessing: Preprocessing) -> Dataset:
    """One set of ImageNet-size photos; FileNotFoundError where it is absent."""
    return PhotoDataset(data_dir() / f"{name}.zip", preprocessing)


def balanced(labels: Labels, size: int, seed: int = 0) -> Indices:
    """Indices, ascending, of about `size` random images, as many of each class as it has, up to an equal share."""
    classes = np.unique(labels)
    share = -(-size // max(1, len(classes)))
    order = np.random.default_rng(seed).permutation(len(labels))
    ranked = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[ranked]
    rank_in_class = np.arange(len(ranked)) - np.searchsorted(sorted_labels, sorted_labels)
    chosen: Indices = np.sort(ranked[rank_in_class < share])
    return chosen


def _small(name: str, preprocessing: Preprocessing) -> Dataset:
    images, labels = datasets.load(name)
    return ArrayDataset(images, labels, preprocessing, source=name)


def _parts(held_out: Dataset) -> dict[str, Indices]:
    ids = np.concatenate([image_ids(held_out.read(index)[None]) for index in range(len(held_out))])
    order = np.argsort(ids, kind="stable")
    bounds = np.round(np.cumsum([0.0, *SHARES.values()]) * len(order)).astype(int)
    return dict(zip(SHARES, (order[start:stop] for start, stop in pairwise(bounds)), strict=True))


def spread(dataset: Dataset, limit: int | None) -> Dataset:
    """`limit` images evenly over a data set; all where it is None."""
    if limit is None or limit >= len(dataset):
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, limit).astype(np.int64))  # a set may be sorted by class


def _photo_labels(names: list[str], known: list[dict[str, object]]) -> Labels:
    """From the index, or by order where there is one photo of each class, or none."""
    if len(names) == 1000:
        return np.arange(1000)
    found = {str(entry["file"]): entry.get("label") for entry in known}
    labels = [found.get(name) for name in names]
    return np.array([label if isinstance(label, int) else UNLABELLED for label in labels], dtype=np.int64)
