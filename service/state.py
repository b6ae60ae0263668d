# SPDX-License-Identifier: Apache-2.0
"""What must outlive a restart, on disk as a whole or not at all, for the eyes of the server's own user alone."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from service.errors import StateUnwritable

log = logging.getLogger(__name__)

Kept = TypeVar("Kept", bound=BaseModel)

_one_at_a_time = threading.Lock()  # two writers of one file share its partial


PRIVATE = 0o600  # of a file; it may name callers


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it, for their owner alone; one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def read_whole(path: Path, kind: type[Kept], instead: str) -> Kept | None:
    """What a file keeps; None where there is none, and where it cannot be read, with an error line.

    Args:
        path: the file.
        kind: of what it keeps.
        instead: what is done where it cannot be read, for the line.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        log.error("%s cannot be read; %s", path.name, instead, exc_info=error)
        return None


def write_whole(path: Path, content: str) -> None:
    """Replace a file; the new one is on disk, whole, when this returns, and until then the old one is.

    Raises:
        StateUnwritable: the state folder cannot be written; the old file is as it was.
    """
    partial = path.with_suffix(".partial")
    with _one_at_a_time:
        try:
            make_folder(path.parent)
            partial.touch(PRIVATE)
            with partial.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise StateUnwritable(path, error) from error


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        StateUnwritable: it is there, and stays.
    """
    with _one_at_a_time:
        try:
            if path.exists():
                path.unlink()
        except OSError as error:
            raise StateUnwritable(path, error) from error
