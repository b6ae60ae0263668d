# SPDX-License-Identifier: Apache-2.0
"""Make the embedded default model from trained weights: fit, calibrate, measure, write; time and memory are recorded.

python -m benchmarks.cifar10.fit --weights build/cifar10/weights.safetensors --out models/cifar10/1
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import tomllib
from pathlib import Path

import torch

from benchmarks.cifar10.splits import split
from benchmarks.datasets import CIFAR10_CLASSES, load
from benchmarks.serving.results import processor
from detector import Network, fit
from detector.card import card
from detector.data import ArrayDataset
from detector.fitting import FORWARD_SCORES
from detector.networks import load_network, parse_spec
from detector.policy import Policy
from detector.scores import FitOptions

RESULT = Path("benchmarks/results/fit.json")
FROZEN = Path("benchmarks/accuracy/frozen.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded default model from trained weights.")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("models/cifar10/1"))
    args = parser.parse_args()
    started = time.monotonic()
    frozen = tomllib.loads(FROZEN.read_text())["changed"]["default_model"]
    module, spec, preprocessing = load_network(parse_spec("cifar_resnet18"), str(args.weights))
    sets = {
        name: ArrayDataset(images, labels, preprocessing, classes=CIFAR10_CLASSES, source=name)
        for name, (images, labels) in (split() | {"test": load("cifar10-test")}).items()
    }
    manifest = fit(
        Network(module, preprocessing, CIFAR10_CLASSES, spec=spec),
        sets["fit"],
        sets["calibration"],
        args.out,
        tune=sets["tune"],
        test=sets["test"],
        options=FitOptions(bank_size=frozen["bank_size"]),
        scores=FORWARD_SCORES,
        policy=Policy(score_name=frozen["decider"]),
        precisions=("fp32", "bf16"),
        half_weights=True,
        source="5,000 CIFAR-10 training images held out of training",
    )
    sys.stdout.write(card(manifest) + "\n")
    measured = {
        "model": manifest.model_digest,
        "images": sum(manifest.splits.values()),
        "scores": len(manifest.scores),
        "seconds": round(time.monotonic() - started),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULT.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
