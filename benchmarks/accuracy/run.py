# SPDX-License-Identifier: Apache-2.0
"""Every score on one network: fitted, tuned and measured the way the product does it.

    python -m benchmarks.accuracy.run --network densenet_cifar10
    python -m benchmarks.accuracy.run --network resnet20 --backward --limit 500 --train 20000 --out resnet20-backward

Writes benchmarks/accuracy/results/NETWORK.json: AUROC and both error rates of each score by OOD set, near and far means
with bootstrap intervals, and paired differences between our forms and each rival.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import subjects
from benchmarks.accuracy.sets import Sets
from detector.backbone import Backbone
from detector.data import Subset
from detector.errors import ScoreError
from detector.features import Collected, collect, fit_scores, tune_scores
from detector.fitting import FORWARD_SCORES
from detector.metrics import bootstrap_auroc, measures, paired_bootstrap
from detector.scores import FitOptions, Score, registry

RESULTS = Path("benchmarks/accuracy/results")
OURS = ("grood_margin_w", "fusion")
RIVALS = ("knn", "rmds", "vim", "fdbd", "nac", "gen", "rg", "msp", "energy", "nci", "grood")
ONE_PASS = ("gaia_a", "gaia_z", "nac")
REPLICATES = 1_000

Values = dict[str, dict[str, NDArray[np.float64]]]  # score -> set -> [N]


def main() -> None:
    parser = argparse.ArgumentParser(description="Every score on one network.")
    parser.add_argument("--network", choices=subjects.NAMES, required=True)
    parser.add_argument("--scores", nargs="*", default=FORWARD_SCORES, help="names of the registry")
    parser.add_argument("--backward", action="store_true", help="also those of one backward pass an image; use --limit")
    parser.add_argument("--limit", type=int, help="images of each set, for a trial or for scores of many passes")
    parser.add_argument("--train", type=int, help="training images; default: as --limit, or all there are to be")
    parser.add_argument("--lowdim-parameters", nargs="*", default=(), help="prefixes; default: all parameters")
    parser.add_argument("--early-layer", help="where the mix-up resumes from; default: the first stage")
    parser.add_argument("--out", help="name of the result; default: the network's")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the embedded network")
    args = parser.parse_args()
    if args.early_layer and not args.out:
        parser.error("--early-layer needs --out: the network's own result has the frozen layer")
    subject = subjects.subject(args.network, args.limit, args.train or args.limit, args.precision)
    backbone, sets = subject.backbone, subject.sets
    backbone.early = args.early_layer or backbone.early
    names = (*args.scores, *(ONE_PASS if args.backward else ()))
    started = time.monotonic()
    options = FitOptions(num_classes=backbone.num_classes, lowdim_parameters=tuple(args.lowdim_parameters))
    scores, refused = _fitted(names, backbone, sets, options)
    result = described(args.network, subject, options, refused)
    result |= {"early_layer": backbone.early} if args.early_layer else {}
    ours, rivals = (("grood",), (*RIVALS, "grood_norm")) if args.early_layer else (OURS, RIVALS)
    result |= measure(scores, backbone, sets, ours=ours, rivals=rivals)
    result["seconds"] = round(time.monotonic() - started)
    write(result, args.out or args.network)


def described(
    network: str, subject: subjects.Subject, options: FitOptions, refused: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """What a result says of the network, of the images, and of the scores that refused it."""
    return subjects.provenance(network) | {
        "known": subject.known,
        "precision": subject.backbone.precision,
        "features": subject.backbone.weight.shape[1],
        "images": {part: len(getattr(subject.sets, part)) for part in ("train", "tune", "test")},
        "lowdim_parameters": list(options.lowdim_parameters),
        "refused": dict(refused),
    }


def write(result: Mapping[str, Any], name: str) -> None:
    """Keep a result, and tell the means of each score, the best near first."""
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for score, row in sorted(result["scores"].items(), key=lambda item: -item[1]["near"].get("auroc", 0)):
        print(f"{score:20} {row['near'].get('auroc', float('nan')):.4f} {row['far']['auroc']:.4f}")


def measure(
    scores: Mapping[str, Score],
    backbone: Backbone,
    sets: Sets,
    *,
    ours: Sequence[str] = OURS,
    rivals: Sequence[str] = RIVALS,
) -> dict[str, Any]:
    """Accuracy, the tables of each score, and the paired differences of ours and the rivals."""
    test = collect(backbone, sets.test, scores=scores)
    values: Values = {name: {"test": value} for name, value in _values(test).items()}
    for name, dataset in (dict(sets.near) | dict(sets.far)).items():
        for score, value in _values(collect(backbone, dataset, scores=scores)).items():
            values[score][name] = value
    groups = {"near": tuple(sets.near), "far": tuple(sets.far)}
    return {
        "accuracy": test.accuracy(),
        "ood_images": {name: len(dataset) for name, dataset in (dict(sets.near) | dict(sets.far)).items()},
        "scores": {name: _row(by_set, groups) for name, by_set in values.items()},
        "differences": _differences(values, groups, ours, rivals),
    }


def _fitted(
    names: Sequence[str], backbone: Backbone, sets: Sets, options: FitOptions
) -> tuple[dict[str, Score], dict[str, str]]:
    """The fitted scores, and why others refused this network."""
    usable, refused = [], {}
    for name in names:
        reason = _refusal(name, backbone, sets, options)
        if reason is None:
            usable.append(name)
        else:
            refused[name] = reason
    scores, _ = fit_scores(usable, backbone, sets.train, options)
    tune_scores(scores, collect(backbone, sets.tune))
    return scores, refused


def _refusal(name: str, backbone: Backbone, sets: Sets, options: FitOptions) -> str | None:
    """A score that refuses a network says so in a fit on a handful of images; nothing else is asked."""
    if not registry()[name].backward and not name.startswith("lowdim"):
        return None
    few = Subset(sets.train, np.arange(0, len(sets.train), max(1, len(sets.train) // (20 * backbone.num_classes))))
    try:
        fit_scores([name], backbone, few, options)
    except ScoreError as error:
        return str(error)
    return None


def _values(collected: Collected) -> dict[str, NDArray[np.float64]]:
    return {name: value.cpu().numpy() for name, value in collected.values.items()}


def _row(by_set: Mapping[str, NDArray[np.float64]], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    known = by_set["test"]
    row: dict[str, Any] = {"ood": {name: measures(known, value) for name, value in by_set.items() if name != "test"}}
    for group, members in groups.items():
        row[group] = (
            {key: float(np.mean([row["ood"][name][key] for name in members])) for key in row["ood"][members[0]]}
            if members
            else {}
        )
        if members:
            low, high = bootstrap_auroc(known, {name: by_set[name] for name in members}, n=REPLICATES)
            row[f"{group}_interval"] = [low, high]
    return row


def _differences(
    values: Values, groups: Mapping[str, Sequence[str]], ours: Sequence[str], rivals: Sequence[str]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """For each of our forms, each rival and group: the difference of the mean AUROC and its paired 95 % interval."""
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for form in (name for name in ours if name in values):
        table[form] = {rival: {} for rival in rivals if rival in values}
        for rival, row in table[form].items():
            for group in (group for group, members in groups.items() if members):
                sides = [
                    ({name: values[one][name] for name in groups[group]}, values[one]["test"]) for one in (form, rival)
                ]
                row[group] = list(paired_bootstrap(sides[0][1], sides[0][0], sides[1][1], sides[1][0], n=REPLICATES))
    return table


if __name__ == "__main__":
    main()
