# SPDX-License-Identifier: Apache-2.0
"""What must outlive a restart, on disk as a whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from service.errors import StateUnwritable

_one_at_a_time = threading.Lock()  # two writers of one file share its partial


def write_whole(path: Path, content: str) -> None:
    """Replace a file; the new one is on disk, whole, when this returns, and until then the old one is.

    Raises:
        StateUnwritable: the state folder cannot be written; the old file is as it was.
    """
    partial = path.with_suffix(".partial")
    with _one_at_a_time:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise StateUnwritable(path, error) from error
