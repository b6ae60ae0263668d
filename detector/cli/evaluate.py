# SPDX-License-Identifier: Apache-2.0
"""The command `oodgate evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import click

from detector import artifact as artifacts
from detector.cli.options import DATA, DEVICE, EXISTING, progress
from detector.data import Dataset, open_dataset
from detector.detector import Detector
from detector.evaluation import OodSet, measure, summarise, summary
from detector.files import is_uri

Command = TypeVar("Command", bound=Callable[..., None])


def _named_paths(_: click.Context, parameter: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    """NAME=PATH arguments by name; UsageError for another form, no such path, or a name given twice."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, path = text.partition("=")
        if not equals or not name or not (is_uri(path) or Path(path).exists()):
            raise click.UsageError(f"{text!r} must be NAME=PATH, and the path must exist")
        if name in found:
            raise click.UsageError(f"--{parameter.name} names {name!r} twice; give each set a name of its own")
        found[name] = path
    return found


def _sets(name: str, text: str) -> Callable[[Command], Command]:
    return click.option(name, multiple=True, metavar="NAME=PATH", callback=_named_paths, help=text)


@click.command()
@click.argument("model", type=EXISTING)
@click.option("--id", "id_images", type=DATA, required=True, help="In-distribution test images of no split.")
@_sets("--near", "An OOD set close to the training data.")
@_sets("--far", "An OOD set far from the training data.")
@_sets("--ood", "An OOD set of no group.")
@_sets("--shifted", "The same classes under other imaging: blur, JPEG, light. Never counted as OOD.")
@click.option("--backward", is_flag=True, help="Include the scores that run a backward pass; they take longer.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="A folder for figures, SVG and PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report for machines.")
@click.option("--store/--no-store", default=True, help="Write the report into the model directory.  [store]")
@DEVICE
def evaluate(
    model: Path,
    id_images: Path | str,
    near: dict[str, str],
    far: dict[str, str],
    ood: dict[str, str],
    shifted: dict[str, str],
    backward: bool,
    plots: Path | None,
    as_json: bool,
    store: bool,
    device: str,
) -> None:
    """Measure MODEL on in-distribution test images and named OOD sets."""
    if plots and not find_spec("matplotlib"):
        raise click.UsageError(
            "--plots draws with matplotlib, which is not installed: add the extra `plots`, in a clone with "
            ".venv/bin/python -m pip install -c constraints.txt -e '.[plots]'"
        )
    detector = Detector.load(model, device=device)
    id_test = _same_classes(id_images, detector)
    ood_sets = _ood_sets({"near": near, "far": far, "other": ood}, detector)
    shifted_sets = {name: _same_classes(path, detector) for name, path in shifted.items()}
    everything = [id_test, *(part.dataset for part in ood_sets.values()), *shifted_sets.values()]
    with progress(sum(map(len, everything)), "evaluating") as report:
        measured = measure(detector, id_test, ood_sets, shifted=shifted_sets, backward=backward, report=report)
    result = summarise(measured)
    if store:
        artifacts.replace_report(model, result, detector.manifest.report | {"id": result["id"]})
    if plots:
        from detector.plots import write  # matplotlib is an extra

        write(measured, plots)
    click.echo(json.dumps(result) if as_json else summary(result, measured.score_name))


def _same_classes(path: Path | str, detector: Detector) -> Dataset:
    manifest = detector.manifest
    return open_dataset(path, manifest.preprocessing, classes=manifest.class_names, labelled=False)


def _ood_sets(groups: dict[str, dict[str, str]], detector: Detector) -> dict[str, OodSet]:
    sets: dict[str, OodSet] = {}
    for group, paths in groups.items():
        for name, path in paths.items():
            if name in sets:
                raise click.UsageError(f"two OOD sets are called {name!r}; give each a name of its own")
            sets[name] = OodSet(open_dataset(path, detector.manifest.preprocessing), group)
    return sets
