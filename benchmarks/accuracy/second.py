# SPDX-License-Identifier: Apache-2.0
"""The freezes after the first: GROOD with its OOD prototype from blurred noise, and what the image itself looks like.

    python -m benchmarks.accuracy.second --network densenet_cifar10

What was chosen, and what had been seen by then, stands in frozen.toml. Writes
benchmarks/accuracy/results/second-NETWORK.json, as `run` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.accuracy import subjects
from benchmarks.accuracy.marks import frozen
from benchmarks.accuracy.run import described, measure, write
from benchmarks.accuracy.sets import Sets
from detector.backbone import Backbone
from detector.features import collect, fit_scores, tune_scores
from detector.scores import FitOptions, Fusion, FusionImage, Score

FITTED = (
    "grood_margin",
    "gen",
    "energy",
    *Fusion.members,
    "fusion",
    *FusionImage.members,
    "fusion_lean",
    "fusion_image",
)
UNREGISTERED = ("fusion_noise", "fusion_unwhitened")
OURS = ("grood_noise", "grood_margin_noise", "image_statistics", "fusion_lean", "fusion_image", *UNREGISTERED)  # marked
RIVALS = ("knn", "vim", "fdbd", "gen", "rg", "energy", "nci", "grood", "grood_w", "grood_margin", "grood_margin_w")
BESIDE = ("fusion", "fusion_lean")  # of our own


def main() -> None:
    parser = argparse.ArgumentParser(description="The later freezes on one network.")
    parser.add_argument("--network", choices=subjects.NAMES, required=True)
    name = parser.parse_args().network
    subject = subjects.subject(name)
    backbone, sets = subject.backbone, subject.sets
    options = FitOptions(num_classes=backbone.num_classes)
    result = described(name, subject, options)
    result |= measure(fitted(backbone, sets, options), backbone, sets, ours=OURS, rivals=(*RIVALS, *BESIDE))
    write(result, f"second-{name}")


def fitted(backbone: Backbone, sets: Sets, options: FitOptions) -> dict[str, Score]:
    """The scores of the first freeze and of those after it, fitted in one pass and tuned."""
    scores, _ = fit_scores(tuple(dict.fromkeys(FITTED)), backbone, sets.train, options)
    scores |= {name: _fusion(frozen()["second"][name], options) for name in UNREGISTERED}
    tune_scores(scores, collect(backbone, sets.tune))
    return scores


def _fusion(of: Sequence[str], options: FitOptions) -> Score:
    class Other(Fusion):
        members = tuple(of)

    return Other(options)


if __name__ == "__main__":
    main()
