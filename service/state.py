# SPDX-License-Identifier: Apache-2.0
"""What must outlive a restart, on disk as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from service.errors import StateUnwritable


def write_whole(path: Path, content: str) -> None:
    """Replace a file; the new one is on disk, whole, when this returns, and until then the old one is.

    Raises:
        StateUnwritable: the state folder cannot be written; the old file is as it was.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StateUnwritable(path, error) from error
