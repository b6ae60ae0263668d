# SPDX-License-Identifier: Apache-2.0
"""`oodgate fit`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor

from detector import fitting
from detector.backbone import Backbone, Precision
from detector.card import card
from detector.cli.options import DATA, DEVICE, EXISTING, FILE, AskedPolicy, on_device, policy_options, progress
from detector.data import Dataset, batches, open_dataset
from detector.errors import ScoreError
from detector.features import Gather, gather
from detector.images import Preprocessing
from detector.networks import load_network, parse_spec
from detector.policy import Policy
from detector.scores import FitOptions, registry
from detector.scores.grood import GENERATORS
from detector.scores.lowdim_full import LowDim


def _bank_size(_: click.Context, __: click.Parameter, text: str) -> int | None:
    if text != "all" and not (text.isdigit() and int(text)):
        raise click.UsageError(f"--bank-size {text!r} must be a number above 0, or `all`")
    return None if text == "all" else int(text)


@click.command()
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
    "--also",
    multiple=True,
    metavar="SCORE",
    help="Another score to fit beside it, or `all` without a backward pass that the network allows.",
)
@click.option(
    "--ood-prototype",
    type=click.Choice(GENERATORS),
    default="mixup",
    show_default=True,
    help="What GROOD's is made of, but for forms of noise.",
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
@policy_options
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
    asked: AskedPolicy,
    device: str,
    **preprocessing: Any,
) -> None:
    """Fit OOD scores to your own classifier and calibrate the one that decides.

    TRAIN holds the images it was trained on: one folder for each class, Parquet files with `image` and `label`,
    WebDataset tars, all of them also behind a URI such as s3://bucket/folder, or an .npz with `images` and `labels`.
    A fit keeps its progress every 5,000 images; one that was interrupted goes on from there.
    """
    _refuse_ignored(ood_prototype, ood_images, lowdim_parameters, also)
    module, spec, stated = load_network(parse_spec(backbone), weights)
    prepared = _preprocessing(stated, preprocessing)
    classes = _class_names(classes_file)
    training = open_dataset(train, prepared, classes=classes)
    names = classes or list(training.classes)
    archive = Path(backbone.partition(":")[2]).read_bytes() if spec.kind == "export" else None
    network = fitting.Network(
        module, prepared, tuple(names), spec=None if archive else spec, early=early_layer, archive=archive
    )
    opened = partial(open_dataset, preprocessing=prepared, classes=names or None)
    calibration_set = opened(calibration)
    tune_set, test_set = (None if path is None else opened(path) for path in (tune, test))
    options = FitOptions(
        bank_size=bank_size,
        generator=ood_prototype,
        ood_images=None if ood_images is None else _pixels(open_dataset(ood_images, prepared)),
        lowdim_parameters=lowdim_parameters,
        index=index,
    )
    scores = [*fitting.default_scores(tuned=tune is not None), *(name for name in also if name != "all")]
    if "all" in also:
        scores += _allowed(Backbone(module, prepared, early=early_layer), options, tuned=tune is not None)
    total = sum(len(part) for part in (training, calibration_set, tune_set, test_set) if part is not None)
    with progress(total, "fitting") as report:
        manifest = fitting.fit(
            network,
            training,
            calibration_set,
            out,
            tune=tune_set,
            test=test_set,
            options=options,
            scores=scores,
            policy=asked.over(Policy(score_name=score_name or fitting.default_decider(tuned=tune is not None))),
            per_class=per_class,
            precisions=precisions,
            half_weights=half_weights,
            device=on_device(device),
            source=str(calibration),
            engine=_engine(engine),
            report=report,
            resumed=lambda done: click.echo(f"resuming at {done:,} of {len(training):,} images", err=True),
        )
    click.echo(card(manifest))


def _refuse_ignored(
    ood_prototype: str, ood_images: Path | str | None, lowdim_parameters: Sequence[str], also: Sequence[str]
) -> None:
    """UsageError where an option is given that nothing would read."""
    if ood_images is not None and ood_prototype != "images":
        raise click.UsageError("--ood-images is read with `--ood-prototype images` alone; add that, or drop the images")
    readers = [name for name, score in registry().items() if issubclass(score, LowDim)]
    if lowdim_parameters and not set(readers) & set(also):
        raise click.UsageError(
            f"--lowdim-parameters is read by {', '.join(readers)} alone; add one with --also, or drop the option"
        )


def _preprocessing(stated: Preprocessing, flags: dict[str, Any]) -> Preprocessing:
    given = {name: value for name, value in flags.items() if value is not None}
    if "crop" in given:
        given["crop"] = (given["crop"], given["crop"])
    return Preprocessing(**(stated.model_dump() | given))


def _allowed(backbone: Backbone, options: FitOptions, *, tuned: bool) -> list[str]:
    """All forward scores but those that refuse this network, which are named."""
    names = []
    for name in fitting.FORWARD_SCORES:
        score = registry()[name]
        if score.tuned and not tuned:
            continue
        try:
            score.refuse(backbone, options)
        except ScoreError as error:
            click.echo(f"{name} is left out: {error}", err=True)
        else:
            names.append(name)
    return names


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
