# SPDX-License-Identifier: Apache-2.0
"""The files below a path, in a folder of this machine or behind a URI such as s3://bucket/folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from detector.errors import DataError

_STAMPS = ("mtime", "last_modified", "created")  # what a driver may call the time of a change


def is_uri(where: str | Path) -> bool:
    """Whether this names a place that only a driver can open."""
    return "://" in str(where)


class Files:
    """All files below a path or URI, or the one that it names; in the order of their names.

    S3 is read by pyarrow, which takes its credentials and `AWS_ENDPOINT_URL` from the environment as every AWS tool
    does; other URIs by the driver of fsspec that is installed for them.

    Args:
        where: a path, or a URI.

    Raises:
        DataError: nothing is there, it cannot be reached, or no driver for it is installed.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)
        try:
            self.system, self.root = _opened(self.where)
            found = self.system.find(self.root, detail=True)
        except ImportError as error:
            raise DataError(f"{where}: no driver for this URI is installed: {error}") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{where} cannot be listed: {error}") from error
        self._info: dict[str, dict[str, Any]] = {path: found[path] or self.system.info(path) for path in sorted(found)}

    def ending(self, suffixes: Sequence[str]) -> list[str]:
        """Paths of the files with one of these endings, sorted."""
        return [path for path in self._info if path.lower().endswith(tuple(suffixes))]

    def folder(self, path: str) -> str | None:
        """The folder directly under the root that a file lies in; None where it lies in the root itself."""
        below = path.removeprefix(self.root.rstrip("/")).lstrip("/")
        return below.partition("/")[0] if "/" in below else None

    def read(self, path: str, start: int | None = None, length: int | None = None) -> bytes:
        """The bytes of a file, or some of them."""
        try:
            data: bytes = self.system.cat_file(path, start, None if length is None else (start or 0) + length)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return data

    def open(self, path: str) -> IO[bytes]:
        """A file to read from, seekable."""
        try:
            file: IO[bytes] = self.system.open(path, "rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return file

    def stamp(self, paths: Sequence[str]) -> bytes:
        """What changes when one of these files does: path, size and time."""
        lines = []
        for path in paths:
            info = self._info[path]
            changed = next((info[name] for name in _STAMPS if info.get(name) is not None), "")
            lines.append(f"{path} {info.get('size')} {changed}")
        return "\n".join(lines).encode()


def _opened(where: str) -> tuple[Any, str]:
    """A file system, and the root in its own words."""
    if not is_uri(where):
        return fsspec.filesystem("file"), str(Path(where).absolute())
    if urlsplit(where).scheme != "s3":
        system, root = fsspec.url_to_fs(where)
        return system, str(root)
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem

    bucket, root = FileSystem.from_uri(where)
    return ArrowFSWrapper(bucket), str(root)
