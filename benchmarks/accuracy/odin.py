# SPDX-License-Identifier: Apache-2.0
"""ODIN of pytorch-ood on the images of one network, beside our MSP, which it is without its temperature and step.

python -m benchmarks.accuracy.odin --network densenet_cifar10 --limit 500

Writes results/odin-NETWORK.json: AUROC in 0-1 by OOD set and the unweighted near and far means, of `msp`, of ODIN with
the step of its authors (`aligned`) and with that of the library (`defaults`). Each form takes two forward passes and a
backward pass an image.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import subjects
from benchmarks.accuracy.rivals import ODIN, odin_scores
from benchmarks.accuracy.sets import Sets
from detector.backbone import Backbone
from detector.evaluation import auroc
from detector.features import collect
from detector.scores import FitOptions, registry

RESULTS = Path(__file__).parent / "results"
TEST = "test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=subjects.NAMES, required=True)
    parser.add_argument("--limit", type=int, help="images of each set; all where not given")
    args = parser.parse_args()
    subject = subjects.subject(args.network, args.limit, train=1_000)  # nothing is fitted
    result = subjects.provenance(args.network, "pytorch-ood") | {"known": subject.known, "parameters": ODIN}
    result |= measure(subject.backbone, subject.sets)
    (RESULTS / f"odin-{args.network}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(backbone: Backbone, sets: Sets) -> dict[str, Any]:
    """Accuracy, images by set, and the AUROC of each form by OOD set and group, in 0-1."""
    images = {TEST: sets.test, **sets.near, **sets.far}
    seen = {name: collect(backbone, dataset) for name, dataset in images.items()}
    msp = registry()["msp"](FitOptions(num_classes=backbone.num_classes))
    per_pixel = ODIN | {"norm_std": list(backbone.preprocessing.std)}
    forms = {
        ("msp", "ours"): {name: np.asarray(msp.score(found.outputs).cpu()) for name, found in seen.items()},
        ("odin", "aligned"): odin_scores(backbone, images, per_pixel),
        ("odin", "defaults"): odin_scores(backbone, images),
    }
    scores: dict[str, dict[str, dict[str, Any]]] = {"msp": {}, "odin": {}}
    for (score, side), values in forms.items():
        by_set = {name: auroc(values[TEST], value) for name, value in values.items() if name != TEST}
        scores[score].setdefault("sets", {})[side] = by_set
        for group, members in {"near": sets.near, "far": sets.far}.items():
            if members:
                scores[score].setdefault(group, {})[side] = float(np.mean([by_set[name] for name in members]))
    return {
        "accuracy": seen[TEST].accuracy(),
        "images": {name: len(dataset) for name, dataset in images.items()},
        "scores": scores,
    }


if __name__ == "__main__":
    main()
