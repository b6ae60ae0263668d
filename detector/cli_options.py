# SPDX-License-Identifier: Apache-2.0
"""What several commands of `oodgate` share: types of arguments, the device, the progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from detector.features import Report
from detector.files import is_uri

LINES = 50  # of progress
FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True)


class _Images(click.Path):
    """An existing path, or a URI as it stands."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_uri(value) else super().convert(value, param, ctx)


DATA = _Images(path_type=Path, exists=True)
DEVICE = click.option("--device", default="auto", help="cpu, cuda, cuda:N or auto.")


@contextmanager
def progress(total: int, label: str) -> Iterator[Report]:
    """A bar on the standard error, or a line each 2 % where that is no terminal; told how many more images are done."""
    if sys.stderr.isatty():
        with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
            yield bar.update
    else:
        yield _lines(total, label)


def _lines(total: int, label: str) -> Report:
    done = 0

    def report(images: int) -> None:
        nonlocal done
        before, done = done, done + images
        if LINES * done // max(1, total) > LINES * before // max(1, total):
            click.echo(f"{label} {done / total:4.0%}  {done:,} of {total:,} images", err=True)

    return report
