# SPDX-License-Identifier: Apache-2.0
"""The workloads: which model, and which encoded images are posted.

The photos are collages of real ones (`imagenet-nips17-500.zip` in `benchmarks.datasets.data_dir()`), at the sizes of a
photo on the web and of a 12-megapixel camera; JPEG quality 90, 4:2:0. The PNGs are CIFAR-10 test images.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.datasets import data_dir, load
from detector.images import Pixels

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "serving"
PHOTOS = "imagenet-nips17-500.zip"
TILE, SEED = 224, 0


@dataclass(frozen=True)
class Workload:
    """One network under one kind of traffic.

    Args:
        letter: its name on the command line and in the results.
        title: what a reader sees.
        network: resnet18, resnet50, null or cifar10: the model's name.
        images: photos, large or png: what is posted.
    """

    letter: str
    title: str
    network: str
    images: str

    @property
    def models(self) -> Path:
        """The folder that holds this workload's model and no other."""
        return ROOT / "models" if self.network == "cifar10" else BUILD / "models" / self.network

    @property
    def artifact(self) -> Path:
        return self.models / self.network / "1"

    @property
    def mime(self) -> str:
        return "image/png" if self.images == "png" else "image/jpeg"


WORKLOADS = {
    workload.letter: workload
    for workload in (
        Workload("A", "ResNet-18 at 224 px, 500x375 JPEG", "resnet18", "photos"),
        Workload("B", "default model (CIFAR ResNet-18) at 32 px, PNG", "cifar10", "png"),
        Workload("C", "ResNet-50 at 224 px, 500x375 JPEG", "resnet50", "photos"),
        Workload("D", "ResNet-18 at 224 px, 12-megapixel JPEG, baseline and progressive in turn", "resnet18", "large"),
        Workload("N", "null model that decides by its energy, at 32 px, PNG: the serving layer alone", "null", "png"),
    )
}


def encoded(images: str) -> list[Path]:
    """The files of one kind of traffic, made once.

    Raises:
        FileNotFoundError: the photos to make them from are not there.
    """
    folder = BUILD / "images" / images
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate({"photos": _photos, "large": _large, "png": _png}[images]()):
            (folder / f"{index:03}").write_bytes(data)
        done.touch()
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def _photos() -> Iterator[bytes]:
    tiles = _tiles()
    for index in range(64):
        yield _jpeg(_collage(tiles, index, across=3, down=2).crop((37, 0, 635, 448)).resize((500, 375)))


def _large() -> Iterator[bytes]:
    tiles = _tiles()
    for index in range(8):
        collage = _collage(tiles, index, across=18, down=14)
        yield _jpeg(collage.crop((0, 0, 4000, 3000)), progressive=index % 2 == 1)


def _png() -> Iterator[bytes]:
    for image in load("cifar10-test")[0][:256]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        yield buffer.getvalue()


def _collage(tiles: Pixels, seed: int, across: int, down: int) -> Image.Image:
    chosen: NDArray[np.int64] = np.random.default_rng([SEED, seed]).choice(len(tiles), across * down)
    rows = tiles[chosen].reshape(down, across, TILE, TILE, 3).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(down * TILE, across * TILE, 3))


def _jpeg(image: Image.Image, *, progressive: bool = False) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling="4:2:0", progressive=progressive)
    return buffer.getvalue()


def _tiles() -> Pixels:
    return squares(PHOTOS)


def squares(archive: str) -> Pixels:
    """All photos of an archive as uint8 [N, 224, 224, 3], in the order of their names."""
    with zipfile.ZipFile(data_dir() / archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".jpg"))
        return np.stack([np.asarray(Image.open(io.BytesIO(files.read(name))).convert("RGB")) for name in names])
