# SPDX-License-Identifier: Apache-2.0
"""What several commands of `oodgate` share: types of arguments, the device, the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from detector.features import Report

FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True)
DEVICE = click.option("--device", default="auto", help="cpu, cuda, cuda:N or auto.")


@contextmanager
def progress(total: int, label: str) -> Iterator[Report]:
    """A bar on the standard error that is told how many more images are done."""
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update
