# SPDX-License-Identifier: Apache-2.0
"""The `oodgate` command."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor

from detector import artifact as artifacts, calibrating, fitting
from detector.backbone import Precision, resolve_device
from detector.calibration import Guarantee
from detector.card import card
from detector.cli_evaluate import evaluate
from detector.cli_options import DATA, DEVICE, EXISTING, FILE, progress
from detector.data import Dataset, Subset, batches, open_dataset
from detector.detector import Detector
from detector.errors import ImageError, OodgateError
from detector.features import Gather, gather
from detector.images import Preprocessing
from detector.networks import load_network, parse_spec
from detector.policy import Policy, Verdict
from detector.scores import FitOptions, registry
from detector.scores.grood import GENERATORS


class Commands(click.Group):
    """The commands of this file and those that other packages announce as entry points; errors as one clear line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *entry_points(group="oodgate.commands").names])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = entry_points(group="oodgate.commands", name=name)
        if not found:
            return super().get_command(ctx, name)
        command: click.Command = next(iter(found)).load()
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OodgateError as error:
            raise click.ClickException(f"{error} [{error.code}]") from error


OPEN_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
TARGET = click.option(
    "--target", type=OPEN_SHARE, default=None, help="Share of in-distribution images to accept.  [0.95]"
)
GUARANTEE = click.option(
    "--guarantee", type=click.Choice(["pac", "marginal", "simultaneous"]), default=None, help="The promise.  [pac]"
)
DELTA = click.option(
    "--delta",
    type=click.FloatRange(0, 0.5, min_open=True, max_open=True),
    default=None,
    help="Share of calibrations that may break it.  [0.05]",
)
ALPHA_CONF = click.option(
    "--alpha-conf",
    type=click.FloatRange(0, 1, max_open=True),
    default=None,
    help="Budget spent on low confidence.  [0]",
)


def _bank_size(_: click.Context, __: click.Parameter, text: str) -> int | None:
    if text != "all" and not (text.isdigit() and int(text)):
        raise click.UsageError(f"--bank-size {text!r} must be a number above 0, or `all`")
    return None if text == "all" else int(text)


@click.group(cls=Commands)
@click.version_option(package_name="oodgate")
def main() -> None:
    """Tells, image by image, whether a vision model may be trusted on this input."""


main.add_command(evaluate)


@main.command()
@click.argument("train", type=DATA)
@click.option("--calibration", type=DATA, required=True, help="Images the network was NOT trained on.")
@click.option("--tune", type=DATA, help="More such images, for choices made before calibration.")
@click.option("--test", type=DATA, help="More such images, to check the promise on.")
@click.option("--backbone", required=True, help="cifar_resnet18, torchvision:NAME, timm:NAME or export:FILE.pt2.")
@click.option("--weights", help=".safetensors or .pth file, or the name of a weight enum of torchvision.")
@click.option(
    "--classes", "classes_file", type=EXISTING, help="Class names, one a line, in the network's output order."
)
@click.option("--out", type=FILE, required=True, help="The directory to write: models/NAME/VERSION.")
@click.option("--resize", type=int, help="Shorter side in pixels before the crop.  [the library's]")
@click.option("--crop", type=int, help="Side of the centre crop in pixels.  [the library's]")
@click.option("--mean", type=float, nargs=3, help="Per channel, pixels scaled to 0-1.  [the library's]")
@click.option("--std", type=float, nargs=3, help="Per channel, pixels scaled to 0-1.  [the library's]")
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic", "nearest"]))
@click.option(
    "--bank-size", default="10000", show_default=True, callback=_bank_size, help="Training gradients kept, or `all`."
)
@click.option("--early-layer", help="Layer the mix-up resumes from.  [layer1 or the like]")
@click.option("--score", "score_name", help="The score that decides.  [fusion with --tune, else grood]")
@click.option(
    "--also", multiple=True, metavar="SCORE", help="Another score to fit beside it, or `all` without a backward pass."
)
@click.option(
    "--ood-prototype",
    type=click.Choice(GENERATORS),
    default="mixup",
    show_default=True,
    help="What GROOD's is made of.",
)
@click.option("--ood-images", type=DATA, help="Images for `--ood-prototype images`; the only use of OOD data.")
@click.option(
    "--lowdim-parameters",
    multiple=True,
    metavar="NAME",
    help="A parameter, or a module and all it holds, that `lowdim` looks at; repeat for more.  [all]",
)
@click.option("--index", is_flag=True, help="Search banks of 50,000 rows and more by an approximate index.")
@click.option("--per-class", is_flag=True, help="One threshold for each predicted class; needs --tune.")
@click.option("--precision", "precisions", type=click.Choice(["fp32", "bf16"]), multiple=True, default=("fp32",))
@click.option("--half-weights", is_flag=True, help="Round the weights to float16 first and store them so.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the training images are passed over; ray: the cluster that RAY_ADDRESS names, else this machine.",
)
@TARGET
@GUARANTEE
@DELTA
@ALPHA_CONF
@DEVICE
def fit(
    train: Path | str,
    calibration: Path | str,
    tune: Path | str | None,
    test: Path | str | None,
    backbone: str,
    weights: str | None,
    classes_file: Path | None,
    out: Path,
    bank_size: int | None,
    early_layer: str | None,
    score_name: str | None,
    also: tuple[str, ...],
    ood_prototype: str,
    ood_images: Path | str | None,
    lowdim_parameters: tuple[str, ...],
    index: bool,
    per_class: bool,
    precisions: tuple[Precision, ...],
    half_weights: bool,
    engine: Literal["local", "ray"],
    target: float | None,
    guarantee: Literal["pac", "marginal", "simultaneous"] | None,
    delta: float | None,
    alpha_conf: float | None,
    device: str,
    **preprocessing: Any,
) -> None:
    """Fit OOD scores to your own classifier and calibrate the one that decides.

    TRAIN holds the images it was trained on: one folder for each class, Parquet files with `image` and `label`,
    WebDataset tars, all of them also behind a URI such as s3://bucket/folder, or an .npz with `images` and `labels`.
    A fit keeps its progress every 5,000 images; one that was interrupted goes on from there.
    """
    module, spec, stated = load_network(parse_spec(backbone), weights)
    prepared = _preprocessing(stated, preprocessing)
    classes = _class_names(classes_file)
    training = open_dataset(train, prepared, classes=classes)
    names = classes or list(training.classes)
    archive = Path(backbone.partition(":")[2]).read_bytes() if spec.kind == "export" else None
    network = fitting.Network(
        module, prepared, tuple(names), spec=None if archive else spec, early=early_layer, archive=archive
    )
    held_out = {
        name: None if path is None else open_dataset(path, prepared, classes=names or None)
        for name, path in {"calibration": calibration, "tune": tune, "test": test}.items()
    }
    calibration_set = held_out["calibration"]
    assert calibration_set is not None
    total = len(training) + sum(len(part) for part in held_out.values() if part is not None)
    with progress(total, "fitting") as report:
        manifest = fitting.fit(
            network,
            training,
            calibration_set,
            out,
            tune=held_out["tune"],
            test=held_out["test"],
            options=FitOptions(
                bank_size=bank_size,
                generator=ood_prototype,
                ood_images=None if ood_images is None else _pixels(open_dataset(ood_images, prepared)),
                lowdim_parameters=lowdim_parameters,
                index=index,
            ),
            scores=_scores(also, tuned=tune is not None),
            policy=_policy(
                Policy(score_name=score_name or fitting.default_decider(tuned=tune is not None)),
                target,
                guarantee,
                delta,
                alpha_conf,
            ),
            per_class=per_class,
            precisions=precisions,
            half_weights=half_weights,
            device=_device(device),
            source=str(calibration),
            engine=_engine(engine),
            report=report,
            resumed=lambda done: click.echo(f"resuming at {done:,} of {len(training):,} images", err=True),
        )
    click.echo(card(manifest))


@main.command()
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
@TARGET
@GUARANTEE
@DELTA
@ALPHA_CONF
@DEVICE
def calibrate(
    model: Path,
    images: Path | str,
    out: Path | None,
    groups: Path | None,
    check_share: float,
    target: float | None,
    guarantee: Literal["pac", "marginal", "simultaneous"] | None,
    delta: float | None,
    alpha_conf: float | None,
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
            policy=_policy(manifest.policy, target, guarantee, delta, alpha_conf),
            device=_device(device),
            source=str(images),
            report=report,
        )
    click.echo(card(written))


@main.command()
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


@main.command()
@click.argument("model", type=EXISTING)
@click.option("--json", "as_json", is_flag=True, help="The manifest.")
def inspect(model: Path, as_json: bool) -> None:
    """Verify MODEL and show its card."""
    manifest = artifacts.load(model).manifest
    click.echo(manifest.model_dump_json(indent=1) if as_json else card(manifest))


def _verdict_line(verdict: Verdict, path: Path) -> str:
    ood, prediction = verdict.ood, verdict.prediction
    return (
        f"{verdict.decision:9}{verdict.reason:16}{ood.p_value:8.4f}  {ood.score:10.4g}  {prediction.confidence:10.1%}  "
        f"{prediction.label}  {path}"
    )


def _policy(
    base: Policy,
    target: float | None,
    kind: Literal["pac", "marginal", "simultaneous"] | None,
    delta: float | None,
    alpha_conf: float | None,
) -> Policy:
    guarantee = Guarantee(kind=kind or base.guarantee.kind, delta=base.guarantee.delta if delta is None else delta)
    return Policy(
        target_id_acceptance=base.target_id_acceptance if target is None else target,
        guarantee=guarantee,
        score_name=base.score_name,
        alpha_conf=base.alpha_conf if alpha_conf is None else alpha_conf,
    )


def _preprocessing(stated: Preprocessing, flags: dict[str, Any]) -> Preprocessing:
    given = {name: value for name, value in flags.items() if value is not None}
    if "crop" in given:
        given["crop"] = (given["crop"], given["crop"])
    return Preprocessing(**(stated.model_dump() | given))


def _scores(also: tuple[str, ...], *, tuned: bool) -> list[str]:
    everything = [name for name in fitting.FORWARD_SCORES if tuned or not registry()[name].tuned]
    asked = [name for each in also for name in (everything if each == "all" else [each])]
    return [*fitting.default_scores(tuned=tuned), *asked]


def _engine(name: Literal["local", "ray"]) -> Gather:
    if name == "local":
        return gather
    try:
        from detector import fit_ray
    except ImportError as error:
        raise click.UsageError("--engine ray needs Ray: pip install 'oodgate[ray]'") from error
    return fit_ray.gather


def _pixels(dataset: Dataset) -> Tensor:
    return torch.from_numpy(np.concatenate([batch.images for batch in batches(dataset, 64)]))


def _class_names(path: Path | None) -> list[str] | None:
    return None if path is None else [line.strip() for line in path.read_text().splitlines() if line.strip()]


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


def _device(name: str) -> str:
    return str(resolve_device(name))
