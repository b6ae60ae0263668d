# SPDX-License-Identifier: Apache-2.0
"""`oodgate inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from detector import artifact as artifacts
from detector.card import card
from detector.cli.options import (
    EXISTING,
)


@click.command()
@click.argument("model", type=EXISTING)
@click.option("--json", "as_json", is_flag=True, help="The manifest.")
def inspect(model: Path, as_json: bool) -> None:
    """Verify MODEL and show its card."""
    manifest = artifacts.load(model).manifest
    click.echo(manifest.model_dump_json(indent=1) if as_json else card(manifest))
