# SPDX-License-Identifier: Apache-2.0
"""The deciding score of the embedded model on test images and OOD sets, computed once and kept under build/drift/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.datasets import FAR_OOD, NEAR_OOD, load
from detector import Detector

MODEL, CACHE = Path("models/cifar10/1"), Path("build/drift")
IMAGES = 5_000  # of each set at most


def real_scores(detector: Detector) -> dict[str, NDArray[np.float64]]:
    """Scores float64 [N] of each set, larger = more OOD; `cifar10-test` is the in-distribution one."""
    digest = detector.manifest.model_digest.removeprefix("sha256:")
    cache = CACHE / f"scores-{digest[:16]}.npz"
    if not cache.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        name = detector.decider.policy.score_name
        found = {}
        for part in ("cifar10-test", *NEAR_OOD, *FAR_OOD):
            images = torch.from_numpy(load(part)[0][:IMAGES])
            found[part] = detector.scores(detector.outputs(images), [name])[name]
        np.savez(cache, **found)  # type: ignore[arg-type]
    with np.load(cache, allow_pickle=False) as stored:
        return {part: stored[part] for part in stored.files}
