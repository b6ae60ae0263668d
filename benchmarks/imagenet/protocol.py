# SPDX-License-Identifier: Apache-2.0
"""Fit, calibrate and evaluate on ImageNet-1K as OpenOOD v1.5 splits it.

Fitted on training images; tuned and calibrated on validation images held out; measured on the rest of them and on the
OOD sets. No OOD image is used before the measurement, where OpenOOD's parameter search uses some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.sets import Indices, balanced
from detector import Detector, Network, OodSet, evaluate, fit
from detector.artifact import replace_report
from detector.data import Dataset, Subset, open_dataset
from detector.errors import DataError
from detector.images import Preprocessing
from detector.machine import resolve_device
from detector.networks import load_network, parse_spec
from detector.scores import FitOptions

# The published ones that need no backward pass, and ours.
SCORES = (
    "msp", "max_logit", "energy", "gen", "react", "scale", "knn", "mds", "rmds", "vim", "fdbd", "nci", "gradnorm",
    "grood", "grood_norm", "image_statistics", "fusion", "fusion_lean", "fusion_image",
)  # fmt: skip
TUNE_SHARE = 0.4  # of the held-out images; the others calibrate
VALIDATION = "val"

Progress = Callable[[int, int], None]  # images done, of how many


@dataclass(frozen=True)
class Plan:
    """What to run, and on what.

    Args:
        imagenet: holds train/ and val/, one folder for each class in both.
        near, far: OOD sets by name, any folder of images.
        lists: by the name of a set, a file that names the images to use of it; `val` names the held-out ones.
        out: the model directory to write.
        backbone, weights: as `load_network` takes them.
        early: the layer that the mix-up resumes from.
        size: side of the input; the library's where not given.
        train_images: images to fit on, balanced over the classes; None takes all.
        bank_size: training features and gradients kept.
        held_out: validation images for tuning and calibration, where no list names them.
        scores: names of the registry.
        device: cpu, cuda, cuda:N or auto.
    """

    imagenet: Path
    near: Mapping[str, Path]
    far: Mapping[str, Path]
    out: Path
    lists: Mapping[str, Path] = field(default_factory=dict)
    backbone: str = "torchvision:resnet50"
    weights: str = "IMAGENET1K_V1"
    early: str = "layer3"
    size: int | None = None
    train_images: int | None = 50_000
    bank_size: int = 10_000
    held_out: int = 5_000
    scores: tuple[str, ...] = SCORES
    device: str = "auto"


def run(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Fit the model, store it with its report, and return the report, as `detector.evaluate` gives it.

    Raises:
        DataError: a set is missing, empty, or lacks an image of its list.
        BackboneError: as `load_network` raises it.
        ClassOrderMismatch, ScoreError, ArtifactError, TooFewSamples, SplitOverlap: as `detector.fit` raises them.
    """
    _refuse_missing(plan)
    module, spec, stated = load_network(parse_spec(plan.backbone), plan.weights)
    preprocessing = _sized(stated, plan.size)
    train = open_dataset(plan.imagenet / "train", preprocessing)
    if plan.train_images is not None:
        train = Subset(train, balanced(train.labels, plan.train_images))
    validation = open_dataset(plan.imagenet / "val", preprocessing, classes=train.classes)
    # All sets are opened before the fit: a folder that is not there shall not cost hours.
    ood = {
        name: OodSet(listed(open_dataset(path, preprocessing), plan.lists.get(name)), group)
        for group, sets in (("near", plan.near), ("far", plan.far))
        for name, path in sets.items()
    }
    tune, calibration, test = _validation_parts(validation, plan)
    device = str(resolve_device(plan.device))
    measured = len(test) + sum(len(one.dataset) for one in ood.values())
    report = _counter(len(train) + len(tune) + len(calibration) + measured, progress)
    manifest = fit(
        Network(module, preprocessing, tuple(train.classes), spec=spec, early=plan.early),
        train,
        calibration,
        plan.out,
        tune=tune,
        options=FitOptions(bank_size=plan.bank_size),
        scores=plan.scores,
        device=device,
        source=f"{len(calibration):,} ImageNet-1K validation images",
        report=report,
    )
    result = evaluate(Detector.load(plan.out, device=device), test, ood, report=report)
    replace_report(plan.out, result, manifest.report | {"id": result["id"]})
    return result


def _refuse_missing(plan: Plan) -> None:
    """What is not there, named before any weights are fetched."""
    parts = (plan.imagenet / "train", plan.imagenet / "val")
    for path in (*parts, *plan.near.values(), *plan.far.values(), *plan.lists.values()):
        if not path.exists():
            raise DataError(f"there is no {path}; --imagenet must hold train/ and val/, and every set must be there")


def listed(dataset: Dataset, file: Path | None) -> Dataset:
    """The images of a set that a list names; all where there is no list."""
    return dataset if file is None else Subset(dataset, _listed(dataset, file))


def _listed(dataset: Dataset, file: Path) -> Indices:
    """One image a line, its path first and perhaps a label behind it, as in OpenOOD's lists.

    Only the name of the file counts: those lists know the validation images without class folders.

    Raises:
        DataError: the set lacks some of them, or has several of one name.
    """
    wanted = {Path(line.split()[0]).name for line in file.read_text().splitlines() if line.strip()}
    names = [Path(dataset.name(index)).name for index in range(len(dataset))]
    missing = sorted(wanted - set(names))
    if missing:
        raise DataError(f"{file} names {len(missing)} images that its set lacks, the first of them {missing[0]}")
    chosen = np.array([index for index, name in enumerate(names) if name in wanted], dtype=np.int64)
    if len(chosen) > len(wanted):
        raise DataError(f"the set of {file} has several images of one name; a list cannot tell them apart")
    return chosen


def _validation_parts(validation: Dataset, plan: Plan) -> tuple[Dataset, Dataset, Dataset]:
    """Tune, calibration and test, disjoint."""
    everything = np.arange(len(validation))
    if VALIDATION in plan.lists:
        held_out = _listed(validation, plan.lists[VALIDATION])
    else:
        held_out = np.sort(np.random.default_rng(0).permutation(everything)[: plan.held_out])
    tune = np.sort(np.random.default_rng(1).permutation(held_out)[: round(TUNE_SHARE * len(held_out))])
    calibration, test = np.setdiff1d(held_out, tune), np.setdiff1d(everything, held_out)
    if not len(test):
        raise DataError(f"all {len(validation):,} validation images are held out; none is left to test on")
    return Subset(validation, tune), Subset(validation, calibration), Subset(validation, test)


def _sized(stated: Preprocessing, size: int | None) -> Preprocessing:
    if size is None:
        return stated
    scaled = round(size * stated.resize / stated.crop[0])  # the border that the crop cuts off keeps its share
    return stated.model_copy(update={"resize": scaled, "crop": (size, size)})


def _counter(total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def more(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    return more
