# SPDX-License-Identifier: Apache-2.0
"""Make an artifact: fit scores on training images, calibrate on images the network has never seen, measure, write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detector import artifact as artifacts, golden
from detector.artifact import Artifact, CalibrationRecord, FitRecord, Manifest, sorted_ids
from detector.backbone import Backbone, Precision
from detector.calibration import (
    acceptance_interval,
    class_groups,
    clopper_pearson,
    exact,
    one_per_group,
    smallest_sample,
)
from detector.data import Dataset, Subset, batches
from detector.detector import Detector, calibration_scores
from detector.errors import ArtifactError, ClassOrderMismatch, DataError, SplitOverlap
from detector.features import Collected, Report, collect, fit_scores, silent
from detector.images import Preprocessing
from detector.networks import NetworkSpec, export_network
from detector.policy import DOUBT, CalibrationScores, Grouping, Policy, doubt
from detector.scores import FitOptions, Score

DEFAULT_SCORES = ("grood", "grood_norm")
LARGEST_OVERLAP = 0.01  # of a calibration set; more means that the sets were not held apart
ORDER_CHECK = 1_000  # images looked at before a fit


@dataclass(frozen=True)
class Network:
    """A network to fit: the module, what rebuilds it, its class names, and its input.

    Without `spec` the artifact carries the network itself, as backbone.pt2: `archive` where it came as one, else the
    module exported. No class names means the numbers of the outputs.
    """

    module: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    spec: NetworkSpec | None = None
    early: str | None = None
    archive: bytes | None = None


def fit(
    network: Network,
    train: Dataset,
    calibration: Dataset,
    out: Path,
    *,
    tune: Dataset | None = None,
    test: Dataset | None = None,
    options: FitOptions | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    policy: Policy | None = None,
    per_class: bool = False,
    precisions: Sequence[Precision] = ("fp32",),
    half_weights: bool = False,
    device: str = "cpu",
    source: str = "",
    report: Report = silent,
) -> Manifest:
    """Fit, calibrate, measure and write a model directory.

    Args:
        network: what to guard.
        train: labelled images the network was trained on.
        calibration: in-distribution images it was not trained on.
        out: the directory to write, `.../NAME/VERSION`.
        tune: more such images, for what is chosen before calibration; needed by `per_class`.
        test: more such images, to check the promise on.
        options: bank size and mix-up.
        scores: names of the registry; the policy's score among them.
        policy: target, guarantee and deciding score.
        per_class: one threshold for each predicted class.
        precisions: in which to calibrate.
        half_weights: round the weight matrices to float16 first and store them so; everything is fitted, calibrated and
            measured on the rounded network.
        device: where to compute.
        source: what to call the calibration images in the model card.
        report: told of images done.

    Returns:
        the manifest as written.

    Raises:
        ClassOrderMismatch: the labels do not follow the order of the network's outputs.
        DataError, BackboneError, ScoreError, TooFewSamples, SplitOverlap, ArtifactError
    """
    if out.exists():
        raise ArtifactError(f"{out} exists; choose another version")
    policy = policy or Policy()
    if half_weights:
        round_to_half(network.module)
    export = network.archive
    if network.spec is None and export is None:
        export = export_network(network.module, network.preprocessing)
    backbone = Backbone(network.module, network.preprocessing, early=network.early, device=device)
    class_names = network.class_names or tuple(str(index) for index in range(backbone.num_classes))
    if len(class_names) != backbone.num_classes:
        seen = f"{len(class_names)} class names, but the network has {backbone.num_classes} outputs"
        raise DataError(f"{seen}; give the names in the order of the outputs with --classes")
    accuracy = check_class_order(backbone, train, class_names)
    backbone.check_resume(torch.from_numpy(next(batches(train, 8)).images))
    options = replace(options or FitOptions(), num_classes=backbone.num_classes)
    workdir = out.with_name(f"{out.name}.fit.partial")
    fitted, fit_ids = fit_scores(scores, backbone, train, options, workdir=workdir, report=report)
    base = Manifest(
        name=out.parent.name,
        version=out.name,
        created=_now(),
        network=network.spec or NetworkSpec(kind="export"),
        head=backbone.head,
        early=backbone.early,
        preprocessing=network.preprocessing,
        class_names=class_names,
        scores=tuple(scores),
        shadow_scores=tuple(name for name in scores if name != policy.score_name),
        policy=policy,
        group_of_class=(0,) * backbone.num_classes,
        group_names=("all",),
        precisions=tuple(precisions),
        score_tolerance={},
        splits={},
        fit=FitRecord(
            n=len(train),
            accuracy=accuracy,
            bank_size=options.bank_size,
            mixup_images=options.mixup_images,
            mixup_coefficient=options.mixup_coefficient,
        ),
        calibration=CalibrationRecord(n=0, timestamp=0.0, source=source),
    )
    artifact = Artifact(
        manifest=base,
        weights=None if export else stored_weights(network.module, half=half_weights),
        export=export,
        scores={f"{name}.{key}": value.cpu() for name, score in fitted.items() for key, value in score.state().items()},
        calibration={},
        splits={"fit": sorted_ids(fit_ids)},
        golden={},
    )
    backbones = {precision: _in_precision(backbone, precision) for precision in precisions}
    if tune is not None:
        tuned = collect(backbone, tune, report=report)
        kept, _ = without_overlap(tuned.ids, artifact.splits, "tune")
        artifact.splits["tune"] = sorted_ids(tuned.ids[kept])
        if per_class:
            artifact.manifest = _grouped(artifact.manifest, tuned[kept])
    elif per_class:
        raise DataError("thresholds for each class need a tune set: the groups must be fixed before calibration")
    _calibrate(artifact, backbones, fitted, calibration, source, report)
    return _finish(artifact, backbones, fitted, test, out, report, workdir)


def round_to_half(module: nn.Module) -> None:
    """Round every weight matrix and kernel to what float16 can hold; vectors keep their precision."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())


def stored_weights(module: nn.Module, *, half: bool) -> dict[str, Tensor]:
    """The network's tensors as the artifact keeps them; with `half`, rounded matrices as float16."""
    state: dict[str, Tensor] = module.state_dict()
    return {name: value.half() if half and value.ndim > 1 else value for name, value in state.items()}


def calibrate(
    model: Path,
    dataset: Dataset,
    out: Path,
    *,
    groups: Sequence[str] | None = None,
    check: Dataset | None = None,
    policy: Policy | None = None,
    device: str = "cpu",
    source: str = "",
    report: Report = silent,
) -> Manifest:
    """Move the promise of a model to other in-distribution images: a new version, same network, same scores.

    Args:
        model: a model directory.
        dataset: in-distribution images, as production sees them.
        out: the directory to write.
        groups: a name for each image (its camera, patient or burst); one image of each is used, and n counts groups.
        check: more such images, to measure the acceptance on.
        policy: another target or guarantee; the model's own where not given.
        device, source, report: as for `fit`.

    Returns:
        the manifest as written.

    Raises:
        SplitOverlap: more than 1 % of the images are also in the fit or tune split.
        TooFewSamples: too few for the guarantee.
    """
    artifact = artifacts.load(model)
    manifest = artifact.manifest
    first = manifest.precisions[0]
    detectors = {p: Detector.from_artifact(artifact, torch.device(device), p) for p in manifest.precisions}
    artifact.manifest = manifest.model_copy(
        update={"name": out.parent.name, "version": out.name, "created": _now(), "policy": policy or manifest.policy}
    )
    artifact.splits = {name: ids for name, ids in artifact.splits.items() if name in ("fit", "tune")}
    backbones = {precision: detector.backbone for precision, detector in detectors.items()}
    fitted = {name: detectors[first]._scores[name] for name in manifest.scores}
    _calibrate(artifact, backbones, fitted, dataset, source, report, groups)
    return _finish(artifact, backbones, fitted, check, out, report, None)


def check_class_order(backbone: Backbone, dataset: Dataset, class_names: Sequence[str]) -> float:
    """Accuracy on a spread of the training images.

    Raises:
        ClassOrderMismatch: the network knows these classes under other numbers; the message says what was seen.
        DataError: a label is missing or no output of the network.
    """
    labels = dataset.labels
    if not len(labels) or labels.min() < 0 or labels.max() >= backbone.num_classes:
        raise DataError(
            f"training images need labels from 0 to {backbone.num_classes - 1}: one folder for each class, or `labels`"
        )
    spread = np.unique(np.linspace(0, len(dataset) - 1, min(ORDER_CHECK, len(dataset))).astype(np.int64))
    sample = collect(backbone, Subset(dataset, spread))
    predicted = sample.outputs.logits.argmax(1).cpu().numpy()
    accuracy = sample.accuracy()
    confusion = np.zeros((backbone.num_classes, backbone.num_classes), dtype=np.int64)
    np.add.at(confusion, (sample.labels, predicted), 1)
    relabelled = confusion.max(axis=1).sum() / confusion.sum()  # accuracy if each label meant its most frequent answer
    if accuracy < 2 / backbone.num_classes or (accuracy < 0.5 and relabelled > accuracy + 0.2):
        seen = [
            f"{class_names[label]!r} (label {label}) is mostly answered {class_names[int(row.argmax())]!r} "
            f"(output {int(row.argmax())}, {int(row.max())} of {int(row.sum())})"
            for label, row in enumerate(confusion)
            if row.sum() and row.argmax() != label
        ]
        raise ClassOrderMismatch(
            f"the network gets only {accuracy:.1%} of {len(spread)} training images right: {'; '.join(seen[:5])}. "
            "If the classes are in another order than the network's outputs, give the right order with --classes FILE; "
            "if not, check the weights and the preprocessing"
        )
    return accuracy


def without_overlap(ids: Tensor, splits: dict[str, Tensor], name: str) -> tuple[Tensor, int]:
    """Which images are new to all splits, and how many are not.

    Raises:
        SplitOverlap: more than 1 % are in another split.
    """
    taken = torch.cat(list(splits.values())) if splits else torch.zeros(0, dtype=torch.int64)
    new = ~torch.isin(ids, taken)
    dropped = int((~new).sum())
    if dropped > LARGEST_OVERLAP * len(ids):
        raise SplitOverlap(
            f"{dropped} of {len(ids)} {name} images are also in the {' or '.join(splits)} split; "
            "the promise needs images that nothing was fitted on"
        )
    return new.nonzero().flatten(), dropped


def _grouped(manifest: Manifest, tuned: Collected) -> Manifest:
    policy = manifest.policy
    alpha = 1 - exact(policy.target_id_acceptance)
    # Sized for the worst case, every class a group of its own; twice over, because calibration counts vary.
    delta = policy.guarantee.delta / len(manifest.class_names)
    minimum = 2 * smallest_sample(alpha, policy.guarantee.model_copy(update={"delta": delta}))
    predicted = tuned.outputs.logits.argmax(1).cpu().numpy()
    of_class = class_groups(predicted, len(manifest.class_names), minimum)
    grouping = Grouping.by_class(of_class, manifest.class_names)
    return manifest.model_copy(update={"group_of_class": grouping.of_class, "group_names": grouping.names})


def _calibrate(
    artifact: Artifact,
    backbones: dict[Precision, Backbone],
    fitted: dict[str, Score],
    dataset: Dataset,
    source: str,
    report: Report,
    groups: Sequence[str] | None = None,
) -> None:
    manifest = artifact.manifest
    grouping = Grouping(manifest.group_of_class, manifest.group_names)
    tolerance: dict[str, dict[str, float]] = {}
    kept, dropped = torch.zeros(0, dtype=torch.int64), 0
    earlier = dict(artifact.splits)
    for precision, backbone in backbones.items():
        collected = collect(backbone, dataset, report=report)
        kept, dropped = without_overlap(collected.ids, earlier, "calibration")
        if groups is not None:
            drawn = one_per_group(collected.ids[kept].numpy(), [groups[index] for index in kept.tolist()])
            kept = kept[torch.from_numpy(drawn)]
        used = collected[kept]
        values = _all_scores(fitted, used)
        predicted = used.outputs.logits.argmax(1).cpu().numpy()
        ordered = CalibrationScores.build(grouping, values, predicted)
        for name, by_group in ordered.scores.items():
            for group, scores in enumerate(by_group):
                artifact.calibration[f"{precision}.{name}.{group}"] = torch.from_numpy(scores)
        artifact.splits["calibration"] = sorted_ids(used.ids)
        tolerance[precision] = _tolerance(backbone, fitted, Subset(dataset, kept[:256].numpy()))
    record = CalibrationRecord(
        n=len(kept), timestamp=time.time(), source=source, grouped=groups is not None, dropped=dropped
    )
    artifact.manifest = manifest.model_copy(update={"calibration": record, "score_tolerance": tolerance})


def _all_scores(fitted: dict[str, Score], collected: Collected) -> dict[str, NDArray[np.float64]]:
    values = {name: score.score(collected.outputs).cpu().numpy() for name, score in fitted.items()}
    return values | {DOUBT: doubt(collected.outputs.logits).cpu().numpy()}


def _tolerance(backbone: Backbone, fitted: dict[str, Score], dataset: Dataset) -> dict[str, float]:
    """How far a score moves with its batch-mates: four times the largest move seen between batches of 64, 7 and 1."""
    views = [_all_scores(fitted, collect(backbone, dataset, batch_size=size)) for size in (64, 7, 1)]
    return {name: 4 * float(np.ptp([view[name] for view in views], axis=0).max()) for name in fitted}


def _finish(
    artifact: Artifact,
    backbones: dict[Precision, Backbone],
    fitted: dict[str, Score],
    test: Dataset | None,
    out: Path,
    report: Report,
    workdir: Path | None,
) -> Manifest:
    artifact.manifest = artifact.manifest.model_copy(
        update={"splits": {name: len(ids) for name, ids in artifact.splits.items()}}
    )
    detectors = [
        Detector(artifact.manifest, backbone, fitted, calibration_scores(artifact, precision))
        for precision, backbone in backbones.items()
    ]
    images = golden.choose(detectors)
    artifact.golden = {"images": images}
    for detector in detectors:
        artifact.golden |= golden.expected(detector, images)
    summary = _summary(detectors[0], test, artifact, report)
    artifact.report = summary
    artifact.manifest = artifact.manifest.model_copy(update={"report": summary})
    manifest = artifacts.save(artifact, out)
    if workdir is not None:
        for path in workdir.iterdir():
            path.unlink()
        workdir.rmdir()
    return manifest


def _summary(detector: Detector, test: Dataset | None, artifact: Artifact, report: Report) -> dict[str, Any]:
    cut = detector.decider.thresholds[0]
    summary: dict[str, Any] = {"expected_acceptance_interval": list(acceptance_interval(cut.rank, cut.n))}
    if test is None:
        return summary
    collected = collect(detector.backbone, test, report=report)
    kept, _ = without_overlap(collected.ids, artifact.splits, "test")
    used = collected[kept]
    accepted = sum(verdict.decision == "accept" for verdict in detector.judge(used.outputs))
    accuracy = used.accuracy()
    return summary | {
        "id": {
            "n": len(kept),
            "accuracy": None if np.isnan(accuracy) else accuracy,
            "acceptance": accepted / len(kept),
            "acceptance_interval": list(clopper_pearson(accepted, len(kept))),
        }
    }


def _in_precision(backbone: Backbone, precision: Precision) -> Backbone:
    if precision == backbone.precision:
        return backbone
    return Backbone(
        backbone.module,
        backbone.preprocessing,
        head=backbone.head,
        early=backbone.early,
        device=backbone.device,
        precision=precision,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
