# SPDX-License-Identifier: Apache-2.0
"""The second and third freeze: GROOD with its OOD prototype from blurred noise, alone and in fusions, beside the first.

    python -m benchmarks.accuracy.second --network densenet_cifar10

Chosen on the development networks, after the first confirmation runs, and written into frozen.toml before they were run
on a confirmation network, but for what is said there. Writes benchmarks/accuracy/results/second-NETWORK.json, as `run`
does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.accuracy import subjects
from benchmarks.accuracy.marks import frozen
from benchmarks.accuracy.run import described, measure, write
from benchmarks.accuracy.sets import Sets
from detector.backbone import Backbone
from detector.features import collect, fit_scores, tune_scores
from detector.scores import FitOptions, Fusion, Score, registry

FIRST = ("grood_margin", "rg", "gen", "energy", *Fusion.members, "fusion")
OF_NOISE = {"grood_noise": "grood", "grood_margin_noise": "grood_margin"}
FUSIONS = {"fusion_noise": "second", "fusion_unwhitened": "second", "fusion_lean": "third"}
OURS = (*OF_NOISE, *FUSIONS)  # marked in every table
RIVALS = ("knn", "vim", "fdbd", "gen", "rg", "energy", "nci", "grood", "grood_margin_w", "fusion")


def main() -> None:
    parser = argparse.ArgumentParser(description="The second freeze on one network.")
    parser.add_argument("--network", choices=subjects.NAMES, required=True)
    name = parser.parse_args().network
    subject = subjects.subject(name)
    backbone, sets = subject.backbone, subject.sets
    options = FitOptions(num_classes=backbone.num_classes)
    result = described(name, subject, options)
    result |= measure(fitted(backbone, sets, options), backbone, sets, ours=OURS, rivals=RIVALS)
    write(result, f"second-{name}")


def fitted(backbone: Backbone, sets: Sets, options: FitOptions) -> dict[str, Score]:
    """The first freeze's scores and the second's, fitted in one pass and tuned."""
    scores, _ = fit_scores(FIRST, backbone, sets.train, options)
    noise = replace(options, generator="noise")
    scores |= {name: _again(scores[of], of, noise, backbone) for name, of in OF_NOISE.items()}
    scores |= {name: _fusion(frozen()[freeze][name], options) for name, freeze in FUSIONS.items()}
    tune_scores(scores, collect(backbone, sets.tune))
    return scores


def _again(score: Score, name: str, options: FitOptions, backbone: Backbone) -> Score:
    """The same score of the same images with another OOD prototype."""
    other = registry()[name](options)
    other.gathered = score.gathered
    return other.finalize(backbone)


def _fusion(of: Sequence[str], options: FitOptions) -> Score:
    class Other(Fusion):
        members = tuple(of)

    return Other(options)


if __name__ == "__main__":
    main()
