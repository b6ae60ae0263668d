# SPDX-License-Identifier: Apache-2.0
"""Class folders written as Parquet files and as WebDataset tars, with the images in the same order."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow
from pyarrow import parquet

PARTS = 3


def write_parquet(folder: Path, out: Path, *, rows: int = 100) -> None:
    """Three files with row groups of so many images; labels by name."""
    for number, paths in enumerate(_parts(folder)):
        columns = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
        parquet.write_table(pyarrow.table(columns), out / f"{number}.parquet", row_group_size=rows)


def write_tars(folder: Path, out: Path) -> None:
    """Three tars; the label of every other image is in a .json, that of the rest in a .cls."""
    for number, paths in enumerate(_parts(folder)):
        with tarfile.open(out / f"{number}.tar", "w") as tar:
            for index, path in enumerate(paths):
                label = path.parent.name
                sidecar = ("json", json.dumps({"label": label})) if index % 2 else ("cls", label)
                for suffix, content in (("png", path.read_bytes()), (sidecar[0], sidecar[1].encode())):
                    add(tar, f"{index:06}.{suffix}", content)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """One file of a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def _parts(folder: Path) -> list[list[Path]]:
    paths = sorted(folder.rglob("*.png"))
    size = -(-len(paths) // PARTS)
    return [paths[first : first + size] for first in range(0, len(paths), size)]
