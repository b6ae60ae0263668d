# SPDX-License-Identifier: Apache-2.0
"""The evaluation images: where they lie and how they are read.

Two homes are understood. `OODGATE_DATA_DIR` (default `../shared/data` beside the repository) may hold lossless WebP
mosaics, 40 images of 32x32 across, row-major, `NAME-00.webp`, `NAME-01.webp`, ... with `NAME-labels.npz`.
Where CIFAR-10 is not there, `torchvision.datasets.CIFAR10` downloads it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NEAR_OOD = ("cifar100-test", "tinyimagenet")
FAR_OOD = ("mnist-test", "svhn-test", "textures", "scenes")
SIDE, ACROSS = 32, 40

Images = NDArray[np.uint8]  # [N, 32, 32, 3]
Labels = NDArray[np.int64]  # [N]


def data_dir() -> Path:
    beside_repository = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("OODGATE_DATA_DIR", beside_repository))


def available(name: str) -> bool:
    return (data_dir() / f"{name}-labels.npz").exists()


def load(name: str) -> tuple[Images, Labels]:
    """One 32-pixel set: uint8 images [N, 32, 32, 3] and int64 labels [N]; FileNotFoundError where it is absent."""
    folder = data_dir()
    if name.startswith("cifar10-") and not available(name):
        return _from_torchvision(train=name == "cifar10-train")
    with np.load(folder / f"{name}-labels.npz", allow_pickle=False) as archive:
        labels = archive["labels"].astype(np.int64)
    tiles = [_tiles(path) for path in sorted(folder.glob(f"{name}-[0-9][0-9].webp"))]
    return np.concatenate(tiles)[: len(labels)], labels


def _tiles(mosaic: Path) -> Images:
    with Image.open(mosaic) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows = pixels.shape[0] // SIDE
    return pixels.reshape(rows, SIDE, ACROSS, SIDE, 3).swapaxes(1, 2).reshape(rows * ACROSS, SIDE, SIDE, 3)


def _from_torchvision(train: bool) -> tuple[Images, Labels]:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(data_dir()), train=train, download=True)
    return np.asarray(data.data, dtype=np.uint8), np.asarray(data.targets, dtype=np.int64)
