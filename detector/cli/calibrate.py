# SPDX-License-Identifier: Apache-2.0
"""`oodgate calibrate`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import click
import numpy as np

from detector import artifact as artifacts, calibrating
from detector.card import card
from detector.cli.options import DATA, DEVICE, EXISTING, FILE, AskedPolicy, on_device, policy_options, progress
from detector.data import Dataset, Subset, open_dataset


@click.command()
@click.argument("model", type=EXISTING)
@click.option("--id", "images", type=DATA, required=True, help="In-distribution images, as production sees them.")
@click.option("--out", type=FILE, help="The directory to write.  [MODEL's next version]")
@click.option("--groups", type=EXISTING, help="CSV `file,group`: one image of each camera, patient or burst is used.")
@click.option(
    "--check-share",
    type=click.FloatRange(0, 0.9),
    default=0.0,
    help="Share of the images (or groups) kept to check the promise.",
)
@policy_options
@DEVICE
def calibrate(
    model: Path,
    images: Path | str,
    out: Path | None,
    groups: Path | None,
    check_share: float,
    asked: AskedPolicy,
    device: str,
) -> None:
    """Move the promise of MODEL to your own images: a new version beside it."""
    manifest = artifacts.read_manifest(model)
    dataset = open_dataset(images, manifest.preprocessing, classes=manifest.class_names, labelled=False)
    names = _groups(groups, dataset) if groups else None
    used, checked = _held_out(dataset, names, check_share)
    with progress(len(used) * len(manifest.precisions) + len(checked), "calibrating") as report:
        written = calibrating.calibrate(
            model,
            Subset(dataset, used),
            out or _next_version(model),
            groups=None if names is None else [names[index] for index in used],
            check=Subset(dataset, checked) if len(checked) else None,
            check_groups=None if names is None else [names[index] for index in checked],
            policy=asked.over(manifest.policy),
            device=on_device(device),
            source=str(images),
            report=report,
        )
    click.echo(card(written))


def _groups(path: Path, dataset: Dataset) -> list[str]:
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if not {"file", "group"} <= set(rows.fieldnames or ()):
            raise click.UsageError(f"{path} must begin with the line `file,group`; it has {rows.fieldnames}")
        group_of = {row["file"]: row["group"] for row in rows}
    names = [Path(dataset.name(index)) for index in range(len(dataset))]
    found = [group_of.get(str(name), group_of.get(name.name)) for name in names]
    missing = [str(name) for name, group in zip(names, found, strict=True) if group is None]
    if missing:
        raise click.UsageError(f"{path} names no group for {len(missing)} images, the first of them {missing[0]}")
    return [group for group in found if group is not None]


def _held_out(dataset: Dataset, groups: list[str] | None, share: float) -> tuple[Any, Any]:
    """Indices to calibrate on and indices to check on; a group falls whole on one side."""
    units = np.array(groups if groups is not None else [str(index) for index in range(len(dataset))])
    unique = np.unique(units)
    checked = np.random.default_rng(0).permutation(unique)[: round(share * len(unique))]
    is_checked = np.isin(units, checked)
    return np.flatnonzero(~is_checked), np.flatnonzero(is_checked)


def _next_version(model: Path) -> Path:
    versions = [int(path.name) for path in model.parent.iterdir() if path.name.isdigit()]
    return model.parent / str(max(versions, default=0) + 1)
