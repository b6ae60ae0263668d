# SPDX-License-Identifier: Apache-2.0
"""The drift tests on real scores: the embedded model on CIFAR-10 test images and OOD sets, without replacement.

    python -m benchmarks.drift.replay

The calibration is the model's own, the same in every order of the images, so orders are no independent runs: what a
test does on one order it tends to do on others. Writes benchmarks/drift/results/replay.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from benchmarks.datasets import FAR_OOD, NEAR_OOD
from benchmarks.drift.scores import MODEL, real_scores
from benchmarks.drift.watch import OURS, RIVALS, alarms_on, delays_on, summary
from detector import Detector
from detector.calibration import Scores
from service.drift import Reference

RESULT = Path("benchmarks/drift/results/replay.json")
BEFORE, SHARES = 1_000, (0.05, 0.2)  # in-distribution images before the change
ORDERS = 100


def main() -> None:
    detector = Detector.load(MODEL, device="cpu", precision="fp32")
    scores = real_scores(detector)
    calibration = reference(detector)
    known = scores["cifar10-test"]
    orders = [np.random.default_rng(order).permutation(known) for order in range(ORDERS)]
    counts = [alarms_on(order, calibration, seed) for seed, order in enumerate(orders)]
    result = {
        "model": detector.manifest.model_digest,
        "score": detector.manifest.policy.score_name,
        "orders": ORDERS,
        "images": len(known),
        "before": BEFORE,
        "alarmed_orders": {name: sum(count[name] > 0 for count in counts) for name in (*OURS, *RIVALS)},
        "delays": [
            found(name, scores[name], known, share, calibration) for name in (*NEAR_OOD, *FAR_OOD) for share in SHARES
        ],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def reference(detector: Detector) -> Reference:
    """The calibration of the deciding score, as the server would give it."""
    policy, cut = detector.decider.policy, detector.decider.thresholds[0]
    (calibration,) = detector.calibration.scores[policy.score_name]
    name, target = policy.score_name, policy.target_id_acceptance
    return Reference(calibration, cut.rank, detector.manifest.model_digest, name, target)


def found(name: str, strange: Scores, known: Scores, share: float, calibration: Reference) -> dict[str, Any]:
    """Delays over orders, and how many of the set's images are deferred."""
    runs = []
    for order in range(ORDERS):
        generator = np.random.default_rng([order, round(1000 * share)])
        before, rest = np.split(generator.permutation(known), [BEFORE])
        runs.append(delays_on(before, mixed(generator, rest, strange, share), calibration, order))
    deferred = float(np.mean(strange > calibration.scores[calibration.rank - 1]))
    return {"ood": name, "share": share, "deferred": deferred, "tests": summary(runs)}


def mixed(generator: Generator, known: Scores, strange: Scores, share: float) -> Scores:
    """All known images and so many of the strange ones that they are this share, each once, in random order."""
    count = round(len(known) * share / (1 - share))
    return generator.permutation(np.concatenate([known, generator.permutation(strange)[:count]]))


if __name__ == "__main__":
    main()
