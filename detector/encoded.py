# SPDX-License-Identifier: Apache-2.0
"""Data sets of encoded images, wherever their files are: what all of them share, and image files in folders."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from detector.errors import DataError, ImageError
from detector.files import Files
from detector.images import IMAGE_SUFFIXES, Limits, Pixels, Preprocessing, decode

UNLABELLED = -1
Label = str | int | None


def digest(*parts: bytes | memoryview) -> str:
    """SHA-256 of all parts together."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


class EncodedDataset(ABC):
    """Images as encoded files, wherever their bytes are; labels by number, or by names that the class list orders."""

    suffixes: ClassVar[tuple[str, ...]]  # of the files that hold the images

    def __init__(
        self,
        files: Files,
        preprocessing: Preprocessing,
        classes: Sequence[str] | None,
        limits: Limits,
        *,
        labelled: bool = True,
    ) -> None:
        self.files, self.paths = files, files.ending(self.suffixes)
        self.preprocessing, self.limits = preprocessing, limits
        labels = self._find()
        named = sorted({label for label in labels if isinstance(label, str)})
        self.classes: Sequence[str] = list(classes) if classes is not None else named
        number: dict[str | int | None, int] = {name: index for index, name in enumerate(self.classes)}
        unknown = [name for name in named if name not in number]
        if unknown and not labelled:
            labels, unknown = [None] * len(labels), []  # cameras or days, not classes
        if unknown:
            raise DataError(
                f"{files.where}: the class list has no {', '.join(unknown[:5])}; it has {', '.join(self.classes[:20])}"
            )
        numbers = [label if isinstance(label, int) else number.get(label, UNLABELLED) for label in labels]
        self.labels = np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Pixels:
        try:
            return decode(self._bytes(index), self.preprocessing, self.limits)
        except ImageError as error:
            raise DataError(f"{self.name(index)}: {error}. Remove the image from the data set.") from error

    def fingerprint(self) -> str:
        return digest(self.labels.tobytes(), self.files.stamp(self.paths))

    @abstractmethod
    def name(self, index: int) -> str: ...

    @abstractmethod
    def _find(self) -> list[Label]:
        """Note where each image lies, and give the labels: a number, the name of a class, or none."""

    @abstractmethod
    def _bytes(self, index: int) -> bytes: ...


class FileDataset(EncodedDataset):
    """Image files; the folder directly under the root is the class, where there are such folders."""

    suffixes: ClassVar[tuple[str, ...]] = IMAGE_SUFFIXES

    def name(self, index: int) -> str:
        return self.paths[index]

    def _find(self) -> list[Label]:
        return [self.files.folder(path) for path in self.paths]

    def _bytes(self, index: int) -> bytes:
        return self.files.read(self.paths[index])
