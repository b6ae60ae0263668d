# SPDX-License-Identifier: Apache-2.0
"""Golden inputs: drawn by a generator, never taken from anyone's images, so that an artifact can be shared."""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)

STRETCH, KEPT = 64, 4  # images judged at a time, kept of each decision
DRAWN, BRED, PARENTS = 8, 16, 16  # stretches of blobs, then of children of those nearest to being accepted
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

    Blobs are drawn; where too few of them look in-distribution, those that come nearest are bred.

    Args:
        detectors: the same model in each precision.

    Returns:
        uint8 [G, H, W, 3].

    Raises:
        CalibrationError: no image lies clear of the threshold.
    """
    first, *others = detectors
    height, width, _ = first.backbone.input_shape
    blobs, generator = _blobs(height, width, seed=0), np.random.default_rng(0)
    kept: dict[bool, list[Pixels]] = {False: [], True: []}  # by whether they are deferred
    nearest, excess = np.zeros((0, height, width, 3), dtype=np.uint8), np.zeros(0)
    for turn in range(DRAWN + BRED):
        if turn >= DRAWN and len(kept[False]) == KEPT:
            break
        images = np.stack(list(islice(blobs, STRETCH))) if turn < DRAWN else _children(nearest, generator)
        deferred, clear, above = _judged(first, images)
        for side, chosen in kept.items():
            if missing := KEPT - len(chosen):
                chosen.extend(_judged_alike(others, images[clear & (deferred == side)], side)[:missing])
        if all(len(chosen) == KEPT for chosen in kept.values()):
            break
        together, excess = np.concatenate([nearest, images]), np.concatenate([excess, above])
        best = np.argsort(excess, kind="stable")[:PARENTS]
        nearest, excess = together[best], excess[best]
    for side, chosen in kept.items():
        if not chosen:
            which = "deferred" if side else "accepted"
            log.warning("no golden input is %s: the self-test cannot tell a form that judges them otherwise", which)
    chosen_images = [*kept[False], *kept[True]]
    if not chosen_images:
        raise CalibrationError("no drawn image lies clear of the threshold; the scores hardly vary, check the network")
    return torch.from_numpy(np.stack(chosen_images))


def _children(parents: Pixels, generator: np.random.Generator) -> Pixels:
    """A parent, or a blend of two, with a few more colours laid over it."""
    height, width = parents.shape[1:3]
    one, other = (parents[generator.integers(0, len(parents), STRETCH)].astype(np.float64) for _ in range(2))
    share = generator.choice([0.0, 0.5], (STRETCH, 1, 1, 1))
    over = np.stack(list(islice(_blobs(height, width, int(generator.integers(2**32))), STRETCH))).astype(np.float64)
    strength = generator.choice([0.05, 0.15, 0.3], (STRETCH, 1, 1, 1))
    return np.clip(one + share * (other - one) + strength * (over - 127.5), 0, 255).round().astype(np.uint8)


def _judged_alike(detectors: list[Detector], images: Pixels, deferred: bool) -> Pixels:
    """Those of the images that every detector judges so, far from its threshold."""
    for detector in detectors:
        if len(images):
            found, clear, _ = _judged(detector, images)
            images = images[clear & (found == deferred)]
    return images


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


def _judged(detector: Detector, images: Pixels) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Which are deferred, which lie clear of the threshold, and how far above it."""
    outputs = detector.outputs(images)
    verdicts = detector.judge(outputs)
    best_two = outputs.logits.topk(2, dim=1).values.cpu()
    tolerance = GOLDEN_TOLERANCE[detector.backbone.precision]
    spread = np.std(np.concatenate(detector.calibration.scores[detector.decider.policy.score_name]))
    above = np.array([verdict.ood.score - verdict.ood.threshold for verdict in verdicts])
    # Two logits may each move by one tolerance without changing their order.
    sure_label = (best_two[:, 0] - best_two[:, 1]).numpy() >= 2 * tolerance * float(best_two.abs().max())
    clear = (np.abs(above) >= MARGIN * tolerance * spread) & sure_label
    return np.array([verdict.decision == "defer" for verdict in verdicts]), clear, above
