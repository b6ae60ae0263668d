# SPDX-License-Identifier: Apache-2.0
"""Golden inputs: drawn by a generator, never taken from anyone's images, so that an artifact can be shared."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detector.artifact import GOLDEN_TOLERANCE
from detector.detector import Detector
from detector.errors import CalibrationError
from detector.images import Pixels

POOL, STRETCH, KEPT = 512, 64, 4  # images drawn at most, judged at a time, kept of each decision
MARGIN = 10  # tolerances between a golden input and the threshold


def draw(height: int, width: int, count: int, seed: int) -> Pixels:
    """Coloured blobs, coarse to fine: uint8 [count, height, width, 3]."""
    return np.stack(list(islice(_blobs(height, width, seed), count)))


def _blobs(height: int, width: int, seed: int) -> Iterator[Pixels]:
    generator = np.random.default_rng(seed)
    while True:
        cells = int(generator.integers(2, 12))
        coarse = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        yield np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


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
    blobs = _blobs(height, width, seed=0)
    kept: dict[bool, list[Pixels]] = {False: [], True: []}  # by whether they are deferred
    for _ in range(0, POOL, STRETCH):
        images = np.stack(list(islice(blobs, STRETCH)))
        deferred, clear = zip(*(_judged(detector, images) for detector in detectors), strict=True)
        alike = np.all(clear, axis=0) & (np.ptp(np.array(deferred, dtype=int), axis=0) == 0)
        for side, chosen in kept.items():
            chosen.extend(images[alike & (deferred[0] == side)][: KEPT - len(chosen)])
        if all(len(chosen) == KEPT for chosen in kept.values()):
            break
    together = [*kept[False], *kept[True]]
    if not together:
        raise CalibrationError("no drawn image lies clear of the threshold; the scores hardly vary, check the network")
    return torch.from_numpy(np.stack(together))


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
