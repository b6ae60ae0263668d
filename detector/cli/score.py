# SPDX-License-Identifier: Apache-2.0
"""`oodgate score`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from detector.cli.options import (
    DEVICE,
    EXISTING,
)
from detector.detector import Detector
from detector.errors import ImageError
from detector.policy import Verdict


@click.command()
@click.argument("model", type=EXISTING)
@click.argument("files", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@DEVICE
def score(model: Path, files: tuple[Path, ...], as_json: bool, device: str) -> None:
    """Give the verdict on image FILES; exit status 1 where a file could not be judged."""
    detector = Detector.load(model, device=device)
    failed = False
    if not as_json:
        click.echo(f"{'decision':9}{'reason':16}{'p-value':>8}  {'score':>10}  {'confidence':>10}  label and file")
    for path in files:
        try:
            verdict = detector.verdicts([path.read_bytes()])[0]
        except ImageError as error:
            failed = True
            problem = {"file": str(path), "problem": {"code": error.code, "detail": str(error)}}
            click.echo(json.dumps(problem) if as_json else f"{'error':9}{error.code:16}  {path}: {error}")
            continue
        click.echo(json.dumps({"file": str(path)} | asdict(verdict)) if as_json else _verdict_line(verdict, path))
    sys.exit(1 if failed else 0)


def _verdict_line(verdict: Verdict, path: Path) -> str:
    ood, prediction = verdict.ood, verdict.prediction
    return (
        f"{verdict.decision:9}{verdict.reason:16}{ood.p_value:8.4f}  {ood.score:10.4g}  {prediction.confidence:10.1%}  "
        f"{prediction.label}  {path}"
    )
