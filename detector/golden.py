# SPDX-License-Identifier: Apache-2.0
"""Golden inputs: drawn by a generator, never taken from anyone's images, so that an artifact can be shared."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detector.artifact import GOLDEN_TOLERANCE
from detector.detector import Detector
from detector.errors import CalibrationError
from detector.images import Pixels

POOL, KEPT = 512, 4
MARGIN = 10  # tolerances between a golden input and the threshold


def draw(height: int, width: int, count: int = POOL, seed: int = 0) -> Pixels:
    """Coloured blobs, coarse to fine: uint8 [count, height, width, 3]."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        cells = int(generator.integers(2, 12))
        coarse = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        images.append(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))
    return np.stack(images)


def choose(detectors: list[Detector]) -> Tensor:
    """Golden inputs that every precision judges alike and far from the threshold: up to four accepted, four deferred.

    Args:
        detectors: the same model in each precision.

    Returns:
        uint8 [G, H, W, 3].

    Raises:
        CalibrationError: no drawn image lies clear of the threshold.
    """
    height, width, _ = detectors[0].backbone.input_shape
    images = draw(height, width)
    deferred, clear = zip(*(_judged(detector, images) for detector in detectors), strict=True)
    alike = np.all(clear, axis=0) & (np.ptp(np.array(deferred, dtype=int), axis=0) == 0)
    chosen = [np.flatnonzero(alike & (deferred[0] == side))[:KEPT] for side in (False, True)]
    kept = np.concatenate(chosen)
    if not len(kept):
        raise CalibrationError("no drawn image lies clear of the threshold; the scores hardly vary, check the network")
    return torch.from_numpy(images[kept])


def expected(detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """What the self-test compares with, named by the detector's precision."""
    outputs = detector.outputs(images)
    deferred = [verdict.decision == "defer" for verdict in detector.judge(outputs)]
    answers = {
        "logits": outputs.logits.cpu(),
        "labels": outputs.logits.argmax(1).cpu(),
        "deferred": torch.tensor(deferred),
    }
    return {f"{detector.backbone.precision}.{name}": value for name, value in answers.items()}


def _judged(detector: Detector, images: Pixels) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    outputs = detector.outputs(images)
    verdicts = detector.judge(outputs)
    best_two = outputs.logits.topk(2, dim=1).values.cpu()
    tolerance = GOLDEN_TOLERANCE[detector.backbone.precision]
    spread = np.std(np.concatenate(detector.calibration.scores[detector.decider.policy.score_name]))
    gap = np.array([abs(verdict.ood.score - verdict.ood.threshold) for verdict in verdicts])
    # Two logits may each move by one tolerance without changing their order.
    sure_label = (best_two[:, 0] - best_two[:, 1]).numpy() >= 2 * tolerance * float(best_two.abs().max())
    clear = (gap >= MARGIN * tolerance * spread) & sure_label
    return np.array([verdict.decision == "defer" for verdict in verdicts]), clear
