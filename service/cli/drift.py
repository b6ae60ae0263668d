# SPDX-License-Identifier: Apache-2.0
"""`oodgate drift`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from detector import artifact as artifacts
from detector.artifact import Artifact
from detector.detector import calibration_scores
from detector.policy import Decider
from service.drift import Drift, MergedStatus, Reference, merged
from service.errors import DriftStateMismatch
from service.watch import references

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("states", type=FOLDER, nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def drift(model: Path, states: tuple[Path, ...], as_json: bool) -> None:
    """Merge what replicas of MODEL know of drift, from the folders STATES where each keeps its state.

    A replica writes its state every 30 seconds and when it stops: the result is that stale at most. The policy is the
    manifest's.
    """
    artifact = artifacts.load(model)
    groups = _merged(artifact, [_stored(state / "drift" / f"{artifact.manifest.name}.json") for state in states])
    if as_json:
        click.echo(json.dumps({group: asdict(status) for group, status in groups.items()}))
        return
    for group, status in groups.items():
        click.echo("\n".join(_told(group, status)))


def _merged(artifact: Artifact, stored: list[dict[str, Any]]) -> dict[str, MergedStatus]:
    """By calibration group; in the precision whose calibration the replicas serve by."""
    manifest = artifact.manifest
    for last, precision in enumerate(manifest.precisions, start=1 - len(manifest.precisions)):
        decider = Decider(manifest.policy, calibration_scores(artifact, precision), manifest.class_names)
        try:
            return {
                reference.group: merged([_resumed(each, reference) for each in stored])
                for reference in references(manifest, decider)
            }
        except DriftStateMismatch:
            if not last:
                raise
    raise AssertionError("a manifest names a precision")


def _resumed(stored: dict[str, Any], reference: Reference) -> Drift:
    return Drift.from_state(stored.get(reference.group, {}), reference)


def _stored(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path} holds no drift state: {error}") from error
    if not isinstance(stored, dict):
        raise click.ClickException(f"{path} holds no drift state")
    return stored


def _told(group: str, status: MergedStatus) -> list[str]:
    lines = [f"{group}: {status.deferred:,} of {status.images:,} images deferred, {status.replicas} replicas"]
    lines += [
        f"  window_{window.size}: {window.ratio:.2%} of {window.images:,} images, limits {window.lower:.2%} to "
        f"{window.upper:.2%}{'  ALARM' if window.alarm else ''}; OOD share at least {window.ood_share_lower:.2%}"
        for window in status.windows
    ]
    evidence = f"  deferral_rate: evidence {status.evidence_log10:.2f} of {status.limit_log10:.2f}"
    return [*lines, f"{evidence}{'  ALARM' if status.alarm else ''}"]
