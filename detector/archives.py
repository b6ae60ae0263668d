# SPDX-License-Identifier: Apache-2.0
"""Data sets of many images in few files: Parquet, which needs the extra `data`, and WebDataset tars."""

from __future__ import annotations

import json
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import PurePosixPath
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from detector.encoded import EncodedDataset, Label
from detector.errors import DataError
from detector.files import Files
from detector.images import IMAGE_SUFFIXES

ROW_GROUPS = 3  # of a Parquet file, held by one reader
CHUNK = 2**20  # bytes of a tar read at once


class ParquetDataset(EncodedDataset):
    """Parquet files with the columns `image`, encoded bytes, and `label`, a number or the name of a class.

    `image` may also be a struct with a field `bytes`, as the library `datasets` writes it. Files are taken in the order
    of their names, rows in theirs; one without the column `label` is unlabelled.

    Raises:
        DataError: pyarrow is not installed, a file is damaged, or a column is missing.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def name(self, index: int) -> str:
        group, row = self._place(index)
        path, number = self._groups[group]
        return f"{path}, row {row} of row group {number}"

    def _find(self) -> list[Label]:
        self._groups: list[tuple[str, int]] = []
        labels: list[Label] = []
        ends: list[int] = []
        for path in self.paths:
            for group, found in enumerate(self._labels(path)):
                self._groups.append((path, group))
                labels += found
                ends.append(len(labels))
        self._ends = np.array(ends, dtype=np.int64)
        self._forget()
        return labels

    def _bytes(self, index: int) -> bytes:
        group, row = self._place(index)
        with self._lock:  # threads decode side by side; one reads what all of them wait for
            if group not in self._held:
                self._held[group] = self._images(*self._groups[group])
                while len(self._held) > ROW_GROUPS:
                    self._held.popitem(last=False)
            value = self._held[group][row]
        data = value.as_py()
        data = data.get("bytes") if isinstance(data, dict) else data
        if not isinstance(data, bytes):
            raise DataError(f"{self.name(index)}: the column `image` holds no bytes there, but {type(data).__name__}")
        return data

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _labels(self, path: str) -> Iterator[list[Label]]:
        """The labels of each row group."""
        with self.files.open(path) as file:
            table = _parquet(path, file)
            columns = table.schema_arrow.names
            if "image" not in columns:
                raise DataError(f"{path} has no column `image`; it has {', '.join(columns)}")
            for group in range(table.num_row_groups):
                if "label" in columns:
                    yield table.read_row_group(group, columns=["label"])["label"].to_pylist()
                else:
                    yield [None] * table.metadata.row_group(group).num_rows

    def _images(self, path: str, group: int) -> Any:
        with self.files.open(path) as file:
            return _parquet(path, file).read_row_group(group, columns=["image"])["image"]

    def _forget(self) -> None:
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_held", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


class TarDataset(EncodedDataset):
    """WebDataset tars: KEY.jpg, and beside it KEY.cls, or KEY.json with `label`: a number or the name of a class.

    Tars are taken in the order of their names, images in that of the archive. Each tar is passed over once, to note
    where its images lie; then an image is read by itself. An image with neither file is unlabelled.

    Raises:
        DataError: a tar is damaged, a label cannot be read, or two images have one key.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".tar",)

    def name(self, index: int) -> str:
        path, name, _, _ = self._members[index]
        return f"{path}/{name}"

    def _find(self) -> list[Label]:
        self._members: list[tuple[str, str, int, int]] = []  # tar, name, offset and length
        labels: list[Label] = []
        for path in self.paths:
            members, found = _members(self.files, path)
            self._members += members
            labels += found
        if not self._members:
            raise DataError(f"{self.files.where}: the tars hold no image ({', '.join(IMAGE_SUFFIXES)})")
        return labels

    def _bytes(self, index: int) -> bytes:
        path, _, offset, length = self._members[index]
        return self.files.read(path, offset, length)


def _parquet(path: str, file: Any) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'oodgate[data]'") from error
    try:
        return parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file, or damaged: {error}") from error


def _members(files: Files, path: str) -> tuple[list[tuple[str, str, int, int]], list[Label]]:
    """Where the images of a tar lie, and their labels."""
    images: dict[str, tuple[str, str, int, int]] = {}
    labels: dict[str, Label] = {}
    try:
        # As a stream: over a network, one long read is quicker than a seek to every header.
        with files.open(path) as file, tarfile.open(fileobj=file, mode="r|", bufsize=CHUNK) as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.partition('.')[0]}"
                suffix = PurePosixPath(base).suffix.lower()
                if not member.isfile():
                    continue
                if suffix in IMAGE_SUFFIXES:
                    if key in images:
                        raise DataError(f"{path}: {member.name} and {images[key][1]} have one key; keep one of them")
                    images[key] = (path, member.name, member.offset_data, member.size)
                elif suffix in (".cls", ".json"):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    labels[key] = _label(f"{path}/{member.name}", content.read(), suffix)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is no tar, or damaged: {error}") from error
    return list(images.values()), [labels.get(key) for key in images]


def _label(name: str, content: bytes, suffix: str) -> Label:
    """A class by its number or name. DataError where it is neither."""
    try:
        label = json.loads(content)["label"] if suffix == ".json" else content.decode().strip()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} holds no label: {error!r}") from error
    if isinstance(label, str):
        return int(label) if label.isdecimal() else label
    if isinstance(label, int):
        return label
    raise DataError(f"{name}: `label` must be a number or the name of a class, and is {label!r}")
