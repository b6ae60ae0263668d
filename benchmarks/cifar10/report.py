# SPDX-License-Identifier: Apache-2.0
"""Measure the embedded default model on CIFAR-10 test images and six OOD sets; write docs/results.md and report.json.

python -m benchmarks.cifar10.report
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.datasets import CIFAR10_CLASSES, FAR_OOD, NEAR_OOD, load
from detector import Detector, OodSet, artifact, evaluate
from detector.data import ArrayDataset
from detector.evaluation import table

MODEL = Path("models/cifar10/1")
RESULTS = Path("docs/results.md")


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
    result = evaluate(detector, known, ood)
    artifact.replace_report(MODEL, result, detector.manifest.report | {"id": result["id"]})
    sections = [f"## `{score}`\n\n{table(result, score)}\n" for score in result["scores"]]
    manifest = detector.manifest
    head = (
        "# Results\n\n"
        "Written by `make bench` (`benchmarks/cifar10/report.py`); nothing here is typed by hand.\n\n"
        f"Model `{manifest.name}` version {manifest.version}, `{manifest.model_digest}`: ResNet-18 of width "
        f"{manifest.network.width}, trained on {manifest.fit.n:,} CIFAR-10 images, float32 on the CPU. No OOD image "
        "was used to fit, tune or calibrate anything. Each set is a sample of its namesake (Textures: 10 of its 47 "
        "classes; scenes: a stand-in for Places365), so the figures are near the published protocol, not on it. "
        f"`deferred` is what the server would defer, by `{manifest.policy.score_name}`.\n\n"
    )
    RESULTS.write_text(head + "\n".join(sections))
    sys.stdout.write(head + "\n".join(sections))


if __name__ == "__main__":
    main()
