# SPDX-License-Identifier: Apache-2.0
"""Measure the embedded default model on CIFAR-10 test images and six OOD sets, and store the report in the model.

python -m benchmarks.cifar10.report
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.accuracy import table
from benchmarks.cifar10.shifts import shifted
from benchmarks.datasets import CIFAR10_CLASSES, FAR_OOD, NEAR_OOD, load
from detector import Detector, OodSet, artifact, evaluate
from detector.data import ArrayDataset
from detector.evaluation import summary

MODEL = Path("models/cifar10/1")
SHIFTED = 2_000  # test images under each change


def main() -> None:
    detector = Detector.load(MODEL)
    preprocessing = detector.manifest.preprocessing
    images, labels = load("cifar10-test")

    known = ArrayDataset(images, labels, preprocessing, classes=CIFAR10_CLASSES)
    ood = {
        name: OodSet(ArrayDataset(load(name)[0], None, preprocessing), group)
        for group, names in (("near", NEAR_OOD), ("far", FAR_OOD))
        for name in names
    }
    others = {
        name: ArrayDataset(changed, labels[: len(changed)], preprocessing, classes=CIFAR10_CLASSES)
        for name, changed in shifted(images[:SHIFTED]).items()
    }
    result = evaluate(detector, known, ood, shifted=others)
    artifact.replace_report(MODEL, result, detector.manifest.report | {"id": result["id"]})
    sys.stdout.write(summary(result, detector.manifest.policy.score_name) + "\n")
    table.main()


if __name__ == "__main__":
    main()
