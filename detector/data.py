# SPDX-License-Identifier: Apache-2.0
"""Data sets as people have them, and the batches that are read from them.

Folders of images are in `detector.encoded`, Parquet files and WebDataset tars in `detector.archives`; all of them
may lie behind a URI. Here are arrays in memory, and what opens each of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detector.archives import ParquetDataset, TarDataset
from detector.encoded import UNLABELLED as UNLABELLED, FileDataset, digest
from detector.errors import DataError
from detector.files import Files, is_uri
from detector.images import IMAGE_SUFFIXES, Limits, Pixels, Preprocessing, resize
from detector.machine import cores

Labels = NDArray[np.int64]
AHEAD = 3  # batches decoded while the network works on one


class Dataset(Protocol):
    """Images by number. `labels` is int64 [N], UNLABELLED where there is none; `classes` names the labels."""

    labels: Labels
    classes: Sequence[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """One image as the network takes it: uint8 [H, W, 3]."""
        ...

    def name(self, index: int) -> str:
        """Where an image comes from, for messages and groups."""
        ...

    def fingerprint(self) -> str:
        """A digest that changes with the images and labels; files count by path, size and time."""
        ...


@dataclass(frozen=True)
class Batch:
    """images uint8 [N, H, W, 3], labels int64 [N], indices int64 [N] into the data set."""

    images: Pixels
    labels: Labels
    indices: NDArray[np.int64]


class ArrayDataset:
    """Images in memory: uint8 [N, H, W, 3], any size; labels int64 [N] or None."""

    def __init__(
        self,
        images: Pixels,
        labels: Labels | None,
        preprocessing: Preprocessing,
        *,
        classes: Sequence[str] = (),
        source: str = "array",
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise DataError(f"{source}: images must be uint8 [N, H, W, 3]; got {images.dtype} {images.shape}")
        if labels is not None and labels.shape != (len(images),):
            raise DataError(f"{source}: {len(images)} images but labels of shape {labels.shape}")
        self.images, self.preprocessing, self.source = images, preprocessing, source
        self.labels = np.full(len(images), UNLABELLED) if labels is None else labels.astype(np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pixels:
        pixels: Pixels = self.images[index]
        if pixels.shape[:2] == self.preprocessing.crop and min(pixels.shape[:2]) == self.preprocessing.resize:
            return pixels
        return resize(Image.fromarray(pixels), self.preprocessing)

    def name(self, index: int) -> str:
        return f"{self.source}[{index}]"

    def fingerprint(self) -> str:
        return digest(self.labels.tobytes(), np.ascontiguousarray(self.images).data)


class Subset:
    """Some images of another data set, in the order of `indices`."""

    def __init__(self, dataset: Dataset, indices: NDArray[np.int64]) -> None:
        self.dataset, self.indices = dataset, indices
        self.labels, self.classes = dataset.labels[indices], dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Pixels:
        return self.dataset.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        return digest(self.dataset.fingerprint().encode(), self.indices.tobytes())


def open_dataset(
    path: str | Path,
    preprocessing: Preprocessing,
    *,
    classes: Sequence[str] | None = None,
    limits: Limits | None = None,
    labelled: bool = True,
) -> Dataset:
    """Open images in class folders or a flat folder, Parquet files, WebDataset tars, or an .npz.

    An .npz has `images` and, where known, `labels`; for Parquet and tars see `detector.archives`. A folder is what it
    holds: images, else Parquet files, else tars.

    Args:
        path: folder or file; all but an .npz may be a URI.
        preprocessing: how images become the network's input.
        classes: class names in the order of the network's outputs; the sorted names found where not given.
        limits: byte and pixel limits of one file.
        labelled: whether the names must be classes; if not, other names leave the images unlabelled.

    Raises:
        DataError: nothing there, wrong shapes, or a class that the class list does not name.
    """
    if str(path).endswith(".npz") and not is_uri(path) and Path(path).is_file():
        return _open_npz(Path(path), preprocessing, classes)
    files, limits = Files(path), limits or Limits()
    for kind in (FileDataset, ParquetDataset, TarDataset):
        if files.ending(kind.suffixes):
            return kind(files, preprocessing, classes, limits, labelled=labelled)
    raise DataError(
        f"{path} is neither an .npz nor a place that holds images ({', '.join(IMAGE_SUFFIXES)}), .parquet or .tar files"
    )


def _open_npz(path: Path, preprocessing: Preprocessing, classes: Sequence[str] | None) -> ArrayDataset:
    with np.load(path, allow_pickle=False) as archive:
        if "images" not in archive:
            raise DataError(f"{path} has no array `images`; it has {', '.join(archive.files)}")
        labels = archive.get("labels")
        return ArrayDataset(archive["images"], labels, preprocessing, classes=classes or (), source=str(path))


def batches(dataset: Dataset, batch_size: int, *, start: int = 0, workers: int | None = None) -> Iterator[Batch]:
    """Read a data set in order, a few batches ahead of the reader.

    Args:
        dataset: any.
        batch_size: images in each batch but the last.
        start: the first image to read.
        workers: decoding threads; as many as cores where not given.

    Raises:
        DataError: an image cannot be read; the message names it.
    """
    starts = range(start, len(dataset), batch_size)
    with ThreadPoolExecutor(workers or cores(), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[NDArray[np.int64], list[Future[Pixels]]]] = deque()
        for first in starts:
            indices = np.arange(first, min(first + batch_size, len(dataset)))
            waiting.append((indices, [pool.submit(dataset.read, int(index)) for index in indices]))
            if len(waiting) > AHEAD:
                yield _gather(dataset, *waiting.popleft())
        while waiting:
            yield _gather(dataset, *waiting.popleft())


def _gather(dataset: Dataset, indices: NDArray[np.int64], images: list[Future[Pixels]]) -> Batch:
    return Batch(np.stack([image.result() for image in images]), dataset.labels[indices], indices)
