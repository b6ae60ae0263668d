# SPDX-License-Identifier: Apache-2.0
"""Our scores against those of pytorch-ood on the same features of one network.

python -m benchmarks.accuracy.compare --network resnet20

Writes results/rivals-NETWORK.json: AUROC in 0-1 by score and OOD set, of ours, of theirs with our parameters
(`aligned`), of theirs with their own (`defaults`), and of `gen` and `mds` of ours under their convention
(`ours_their_way`); the unweighted means of the near and far sets, and our AUROC minus theirs there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import subjects
from benchmarks.accuracy.conventions import our_scores_their_way
from benchmarks.accuracy.rivals import ALIGNED, DEFAULTS, Values, installed, rival_scores
from benchmarks.accuracy.sets import Sets
from detector.backbone import Backbone
from detector.evaluation import auroc
from detector.features import Collected, collect
from detector.scores import FitOptions, registry
from detector.scores.nearest import neighbours

RESULTS = Path(__file__).parent / "results"
OURS = ("msp", "max_logit", "energy", "gen", "react", "scale", "knn", "mds", "rmds", "vim", "fdbd", "nci")
THEIRS_ONLY = ("klm", "ash", "dice", "she", "nnguide", "vra", "lts", "pnml")
# Means and covariances within classes cannot be had from one photo of each class.
NEED_MANY = {"mds", "rmds", "she", "gmm"}
TEST = "test"

Rows = dict[str, dict[str, float]]  # AUROC by score and OOD set


def compare(backbone: Backbone, sets: Sets, names: tuple[str, ...], theirs_only: tuple[str, ...]) -> dict[str, Any]:
    """AUROC of our scores and of theirs on the same features.

    Args:
        backbone: the network.
        sets: its images; tune and calibration images are left alone.
        names: scores that both have.
        theirs_only: scores that they alone have.

    Returns:
        accuracy, images by set, and by score the AUROC of each side, in 0-1.
    """
    train = collect(backbone, sets.train)
    others = {TEST: sets.test, **sets.near, **sets.far}
    measured = {name: collect(backbone, dataset) for name, dataset in others.items()}
    features = {name: found.outputs.penultimate.cpu() for name, found in measured.items()}
    fitted_on = train.outputs.penultimate.cpu(), torch.from_numpy(train.labels)
    last = backbone.weight.cpu(), backbone.bias.cpu()
    outputs = {name: found.outputs for name, found in measured.items()}
    sides = {
        "ours": _rows(our_scores(backbone, train, measured, names)),
        "ours_their_way": _rows(our_scores_their_way(train.outputs, fitted_on[1], outputs, names)),
    }
    bank = min(len(sets.train), FitOptions(num_classes=backbone.num_classes).bank_size or len(sets.train))
    aligned = ALIGNED | {"knn": {"k": neighbours(bank, backbone.num_classes)}}
    for side, parameters in (("aligned", aligned), ("defaults", DEFAULTS)):
        wanted = (*names, *theirs_only)
        sides[side] = _rows(rival_scores(*fitted_on, *last, features, parameters=parameters, names=wanted))
    groups = {"near": tuple(sets.near), "far": tuple(sets.far)}
    return {
        "accuracy": measured[TEST].accuracy(),
        "images": {"train": len(sets.train)} | {name: len(dataset) for name, dataset in others.items()},
        "scores": {name: _summary(name, sides, groups) for name in (*names, *theirs_only)},
    }


def our_scores(
    backbone: Backbone, train: Collected, measured: Mapping[str, Collected], names: tuple[str, ...]
) -> dict[str, dict[str, Values]]:
    """Our scores, fitted on collected outputs with the bank size of a fit: float64 [M] by score and set."""
    options = FitOptions(num_classes=backbone.num_classes)
    labels = torch.from_numpy(train.labels)
    result = {}
    for name in names:
        score = registry()[name](options).partial_fit(train.outputs, labels).finalize(backbone)
        result[name] = {key: np.asarray(score.score(found.outputs).cpu()) for key, found in measured.items()}
    return result


def table(result: Mapping[str, Any]) -> str:
    """The means as lines of text in per cent, and differences in points."""
    lines = [f"{'score':10} {'group':5} {'ours':>7} {'aligned':>8} {'defaults':>9}   ours - aligned, - defaults"]
    for name, row in result["scores"].items():
        for group in ("near", "far"):
            cell = row.get(group)
            if cell is None:
                continue
            ours = f"{cell['ours']:7.2%}" if "ours" in cell else f"{'':7}"
            gaps = [f"{100 * cell[key]:+.2f}" for key in ("ours_minus_aligned", "ours_minus_defaults") if key in cell]
            theirs = f"{cell['aligned']:8.2%} {cell['defaults']:9.2%}"
            lines.append(f"{name:10} {group:5} {ours} {theirs}   {', '.join(gaps)}".rstrip())
    return "\n".join(lines)


def _rows(scores: Mapping[str, Mapping[str, Values]]) -> Rows:
    return {
        name: {key: auroc(values[TEST], values[key]) for key in values if key != TEST}
        for name, values in scores.items()
    }


def _summary(name: str, sides: Mapping[str, Rows], groups: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    rows = {side: found[name] for side, found in sides.items() if name in found}
    result: dict[str, Any] = {"sets": rows}
    for group, members in groups.items():
        if not members:
            continue
        means = {side: float(np.mean([row[member] for member in members])) for side, row in rows.items()}
        if "ours" in means:
            means |= {f"ours_minus_{side}": means["ours"] - means[side] for side in ("aligned", "defaults")}
        result[group] = means
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=subjects.NAMES, required=True)
    # As many as the bank of a fit holds: both sides then look for neighbours among the same images.
    parser.add_argument("--train", type=int, default=10_000, help="training images, balanced over the classes")
    parser.add_argument("--limit", type=int, help="images of each other set; all where not given")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    installed()  # or say so now, not after the forward passes
    subject = subjects.subject(args.network, args.limit, args.train)
    barred = NEED_MANY if subject.known == "imagenet" else set()
    names, theirs_only = (tuple(name for name in some if name not in barred) for some in (OURS, THEIRS_ONLY))
    result = subjects.provenance(args.network, "pytorch-ood")
    result |= compare(subject.backbone, subject.sets, names, theirs_only)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"rivals-{args.network}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
