# SPDX-License-Identifier: Apache-2.0
"""Fit scores on training images, then calibrate: from a classifier to a model directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detector.artifact import OOD_SPLIT, Artifact, CalibrationRecord, FitRecord, Manifest, sorted_ids, without_overlap
from detector.backbone import Backbone, Precision
from detector.calibrating import Calibrator, now
from detector.calibration import Guarantee, calibration_rank, class_groups, exact, smallest_sample
from detector.data import Dataset, Subset, batches
from detector.errors import (
    ArtifactError,
    CalibrationError,
    ClassOrderMismatch,
    DataError,
    ScoreError,
    SplitOverlap,
    TooFewSamples,
)
from detector.features import Collected, Gather, Report, collect, fit_scores, gather, silent, tune_scores
from detector.images import Preprocessing, image_ids
from detector.networks import NetworkSpec, export_network
from detector.policy import Grouping, Policy
from detector.scores import FitOptions, Fusion, registry
from detector.scores.index import require_faiss

PUBLISHED = ("grood", "grood_norm")
# All that need nothing beyond the forward pass, without the product family, whose members the others cover.
FORWARD_SCORES = tuple(
    name for name, score in registry().items() if not score.backward and not name.startswith("product_")
)
MOST_SHADOWS = 4
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
    scores: Sequence[str] | None = None,
    policy: Policy | None = None,
    per_class: bool = False,
    precisions: Sequence[Precision] = ("fp32",),
    half_weights: bool = False,
    device: str = "cpu",
    source: str = "",
    engine: Gather = gather,
    report: Report = silent,
    resumed: Report = silent,
) -> Manifest:
    """Fit, calibrate, measure and write a model directory.

    Args:
        network: what to guard.
        train: labelled images the network was trained on.
        calibration: in-distribution images it was not trained on.
        out: the directory to write, `.../NAME/VERSION`.
        tune: more such images, for what is chosen before calibration; needed by `per_class` and by a fusion.
        test: more such images, to check the promise on.
        options: bank size and mix-up.
        scores: names of the registry; `default_scores` where none are given. The policy's score and the members of a
            fusion are added.
        policy: target, guarantee and deciding score; `default_decider` under the PAC guarantee where none is given.
        per_class: one threshold for each predicted class.
        precisions: in which to calibrate.
        half_weights: round the weight matrices to float16 first and store them so; everything is fitted, calibrated and
            measured on the rounded network.
        device: where to compute.
        source: what to call the calibration images in the model card.
        engine: what passes over the training images; `detector.fit_ray.gather` does it on a Ray cluster.
        report: told of images done.
        resumed: told how many images an interrupted fit had done, where one goes on.

    Returns:
        the manifest as written.

    Raises:
        ClassOrderMismatch: the labels do not follow the order of the network's outputs.
        ScoreError: an unknown score, one that cannot decide, or one that this network does not allow.
        DataError, BackboneError, TooFewSamples, SplitOverlap, ArtifactError
    """
    policy = policy or Policy(score_name=default_decider(tuned=tune is not None))
    names = with_members(scores or default_scores(tuned=tune is not None), policy.score_name)
    _refuse_early(out, calibration, tune, policy, names, per_class=per_class)
    _refuse_same({"training": train, "calibration": calibration, "tune": tune})
    if half_weights:
        round_to_half(network.module)
    export = _export(network)
    backbone = Backbone(network.module, network.preprocessing, early=network.early, device=device)
    class_names = _class_names(network, backbone)
    group_size = _group_size(policy, len(class_names)) if per_class else 0
    if tune is not None and len(tune) < group_size:
        raise TooFewSamples(f"{len(tune)} tune images are too few to form one group; at least {group_size} are needed")
    options = replace(options or FitOptions(), num_classes=backbone.num_classes)
    _refuse_options(options, backbone, names)
    accuracy = check_class_order(backbone, train, class_names)
    backbone.check_resume(torch.from_numpy(next(batches(train, 8)).images))
    workdir = out.with_name(f"{out.name}.fit.partial")
    fitted, fit_ids = fit_scores(
        names, backbone, train, options, engine=engine, workdir=workdir, report=report, resumed=resumed
    )
    splits = {"fit": sorted_ids(fit_ids)}
    if options.generator == "images" and options.ood_images is not None:
        splits[OOD_SPLIT] = _ood_split(options.ood_images, splits)
    grouping = Grouping.single(backbone.num_classes)
    if tune is not None:
        tuned = _tune_split(backbone, tune, splits, report)
        tune_scores(fitted, tuned)
        grouping = _groups(group_size, class_names, tuned) if per_class else grouping
    artifact = Artifact(
        manifest=Manifest(
            name=out.parent.name,
            version=out.name,
            created=now(),
            network=network.spec or NetworkSpec(kind="export"),
            head=backbone.head,
            early=backbone.early,
            preprocessing=network.preprocessing,
            class_names=class_names,
            scores=names,
            shadow_scores=_shadows(names, policy.score_name),
            policy=policy,
            group_of_class=grouping.of_class,
            group_names=grouping.names,
            precisions=tuple(precisions),
            fit=_record(len(train), accuracy, options),
            calibration=CalibrationRecord(n=0, timestamp=0.0, source=source),
        ),
        weights=None if export else stored_weights(network.module, half=half_weights),
        export=export,
        scores={f"{name}.{key}": value.cpu() for name, score in fitted.items() for key, value in score.state().items()},
        splits=splits,
    )
    written = Calibrator(artifact, backbone, fitted, report).run(calibration, out, source=source, test=test)
    shutil.rmtree(workdir)
    return written


def _export(network: Network) -> bytes | None:
    """What the artifact carries where no spec rebuilds the network."""
    if network.archive is None and network.spec is None:
        return export_network(network.module, network.preprocessing)
    return network.archive


def _ood_split(images: Tensor, splits: Mapping[str, Tensor]) -> Tensor:
    """Ids of the OOD images that a fit was given, less those that it also trained on."""
    ids = torch.from_numpy(image_ids(images.cpu().numpy()))
    return sorted_ids(ids[without_overlap(ids, splits, "OOD")[0]])


def _tune_split(backbone: Backbone, tune: Dataset, splits: dict[str, Tensor], report: Report) -> Collected:
    """The tune images that nothing was fitted on, which become a split of their own."""
    tuned = collect(backbone, tune, report=report)
    tuned = tuned[without_overlap(tuned.ids, splits, "tune")[0]]
    splits["tune"] = sorted_ids(tuned.ids)
    return tuned


def default_scores(*, tuned: bool) -> tuple[str, ...]:
    """What a fit fits where nothing is asked for: the published GROOD, and `fusion` where there is a tune split."""
    return (*PUBLISHED, Fusion.name) if tuned else PUBLISHED


def default_decider(*, tuned: bool) -> str:
    """The score that decides where nothing is asked for: `fusion` where there is a tune split, else `grood`."""
    return Fusion.name if tuned else "grood"


def with_members(names: Sequence[str], deciding: str) -> tuple[str, ...]:
    """Names of scores, each once, with the one that decides and with the members of those that are made of others.

    Raises:
        ScoreError: there is no score of that name.
    """
    known = registry()
    unknown = [name for name in (*names, deciding) if name not in known]
    if unknown:
        raise ScoreError(f"there is no score {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    wanted = (*names, deciding)
    return tuple(dict.fromkeys(one for name in wanted for one in (*known[name].members, name)))


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
    wanted = min(len(dataset), max(ORDER_CHECK, 10 * backbone.num_classes))
    spread = np.unique(np.linspace(0, len(dataset) - 1, wanted).astype(np.int64))
    sample = collect(backbone, Subset(dataset, spread))
    predicted = sample.outputs.logits.argmax(1).cpu().numpy()
    confusion = np.zeros((backbone.num_classes, backbone.num_classes), dtype=np.int64)
    np.add.at(confusion, (sample.labels, predicted), 1)
    accuracy = sample.accuracy()
    _refuse_mixed_classes(confusion, class_names)
    chance = 1 / backbone.num_classes
    if accuracy < chance + 3 * (chance * (1 - chance) / len(spread)) ** 0.5:
        most = int(confusion.sum(axis=0).argmax())
        raise ClassOrderMismatch(
            f"the network gets {accuracy:.1%} of {len(spread)} training images right, no more than chance; its most "
            f"frequent answer is {class_names[most]!r}, to {confusion[:, most].sum() / len(spread):.0%} of them. "
            "Check the weights and the preprocessing, then the order of the classes (--classes FILE)"
        )
    return accuracy


def _refuse_mixed_classes(confusion: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Classes under each other's numbers: each mostly answered as another of them, in a ring.

    A class that is merely hard is answered as one that the network does know, and passes.
    """
    seen = confusion.sum(axis=1)
    answer = np.where((seen >= 5) & (2 * confusion.max(axis=1) > seen), confusion.argmax(axis=1), -1)
    mixed = [label for label, other in enumerate(answer) if other not in (-1, label)]
    while outside := [label for label in mixed if answer[label] not in mixed]:
        mixed = [label for label in mixed if label not in outside]
    if mixed:
        told = [
            f"{class_names[label]!r} (label {label}) is mostly answered {class_names[answer[label]]!r} "
            f"(output {answer[label]}, {confusion[label, answer[label]]} of {seen[label]})"
            for label in mixed
        ]
        raise ClassOrderMismatch(
            f"the labels do not follow the order of the network's outputs: {'; '.join(told[:5])}. "
            "Give the names in the order of the outputs with --classes FILE"
        )


def _refuse_options(options: FitOptions, backbone: Backbone, names: Sequence[str]) -> None:
    """What a score would say after the whole pass over the training images, said before it."""
    if options.index:
        require_faiss()
    for name in names:
        registry()[name].refuse(backbone, options)


def _refuse_early(
    out: Path,
    calibration: Dataset,
    tune: Dataset | None,
    policy: Policy,
    names: Sequence[str],
    *,
    per_class: bool,
) -> None:
    """What would make a fit fail at its end, found before hours are spent on it."""
    if out.exists():
        raise ArtifactError(f"{out} exists; choose another version")
    if per_class and tune is None:
        raise DataError("thresholds for each class need a tune set: the groups must be fixed before calibration")
    untuned = [name for name in names if registry()[name].tuned]
    if untuned and tune is None:
        raise DataError(f"{', '.join(untuned)} needs a tune set: in-distribution images that nothing else is fitted on")
    if registry()[policy.score_name].backward:
        raise ScoreError(f"{policy.score_name} runs a backward pass and cannot decide; fit it beside another score")
    alpha = 1 - exact(policy.target_id_acceptance)
    if exact(policy.alpha_conf) >= alpha:
        raise CalibrationError(
            f"alpha_conf {policy.alpha_conf} leaves nothing of the budget {float(alpha):.4g} for OOD"
        )
    budgets, share = _promises(policy, groups=1)
    for budget in budgets:
        calibration_rank(len(calibration), budget, share)


def _promises(policy: Policy, groups: int) -> tuple[list[Fraction], Guarantee]:
    """The budgets that every group must keep, and the guarantee of each, as `Decider` shares delta out."""
    alpha, alpha_conf = 1 - exact(policy.target_id_acceptance), exact(policy.alpha_conf)
    budgets = [alpha - alpha_conf, alpha_conf] if alpha_conf else [alpha]
    delta = policy.guarantee.delta / (groups * len(budgets))
    return budgets, policy.guarantee.model_copy(update={"delta": delta})


def _refuse_same(sets: Mapping[str, Dataset | None]) -> None:
    """Two splits that are one and the same; single images that two of them share show when all have been read."""
    known: dict[str, str] = {}
    for name, dataset in sets.items():
        if dataset is not None:
            first = known.setdefault(dataset.fingerprint(), name)
            if first != name:
                raise SplitOverlap(f"the {first} images and the {name} images are the same; they must be disjoint")


def _class_names(network: Network, backbone: Backbone) -> tuple[str, ...]:
    names = network.class_names or tuple(str(index) for index in range(backbone.num_classes))
    if len(names) != backbone.num_classes:
        seen = f"{len(names)} class names, but the network has {backbone.num_classes} outputs"
        raise DataError(f"{seen}; give the names in the order of the outputs with --classes")
    return names


def _shadows(names: Sequence[str], deciding: str) -> tuple[str, ...]:
    """The members of a fusion where one decides, else `fusion` and others, four at most."""
    if members := registry()[deciding].members:
        return members
    others = [name for name in names if name != deciding and not registry()[name].backward]
    return tuple(sorted(others, key=lambda name: name != Fusion.name)[:MOST_SHADOWS])


def _record(images: int, accuracy: float, options: FitOptions) -> FitRecord:
    return FitRecord(
        n=images,
        accuracy=accuracy,
        bank_size=options.bank_size,
        mixup_images=options.mixup_images,
        mixup_coefficient=options.mixup_coefficient,
        generator=options.generator,
    )


def _group_size(policy: Policy, num_classes: int) -> int:
    # Sized for the worst case, every class a group of its own; twice over, because calibration counts vary.
    budgets, share = _promises(policy, num_classes)
    return 2 * max(smallest_sample(budget, share) for budget in budgets)


def _groups(minimum: int, class_names: Sequence[str], tuned: Collected) -> Grouping:
    predicted = tuned.outputs.logits.argmax(1).cpu().numpy()
    return Grouping.by_class(class_groups(predicted, len(class_names), minimum), class_names)
