# SPDX-License-Identifier: Apache-2.0
"""An image as callers have it -> its bytes and content type."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

Image = bytes | str | os.PathLike[str] | BinaryIO  # a str is a path

_UNKNOWN = "application/octet-stream"


def read(image: Image) -> bytes:
    """The encoded image.

    Args:
        image: its bytes, the path of its file, or a file open for reading bytes. A file is read from where it stands
            and put back there where it can seek, so that the model behind a gate can read it again.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is none of these.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if not hasattr(image, "read"):
        raise TypeError(f"an image is bytes, a path or a binary file; got {type(image).__name__}")
    start = image.tell() if image.seekable() else None
    data: object = image.read()
    if start is not None:
        image.seek(start)
    if not isinstance(data, bytes):
        raise TypeError("the file gives text; open it in binary mode")
    return data


def content_type(data: bytes) -> str:
    """What the first bytes say: JPEG, PNG, WebP, or unknown."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return _UNKNOWN
