# SPDX-License-Identifier: Apache-2.0
"""Why an image got its score: the nearest class prototypes, and which part of the image raises the deciding score.

The heat of a place is how far the score falls when a window over it shows another part of the same image instead:
occlusion (Zeiler & Fergus, arXiv 1311.2901, section 4.2), with fills that are no odd objects themselves. It needs no
gradient, so any score has one. Gradients, Grad-CAM and a plain fill were measured beside it and pointed worse
(docs/console.md).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detector.detector import Detector
from detector.images import Pixels
from detector.scores.grood import GroodFamily, grood_gradient
from detector.scores.nearest import exact_distances

WINDOW = 1 / 2  # of the image's side
STEPS = 3  # windows along each side
BATCH = 4  # images at a time: verdicts of others go in between
NEAREST = 3
_COOL, _HOT, _OPACITY = np.array([196, 0, 96]), np.array([255, 224, 0]), 0.8


@dataclass(frozen=True)
class ClassDistance:
    """A class, and the Euclidean distance of the image's penultimate features from its prototype."""

    index: int
    label: str
    distance: float


@dataclass(frozen=True)
class OodPrototype:
    """The synthetic OOD prototype of `grood`: its distance, and pi, its share of the softmax over all prototypes."""

    distance: float
    pi: float


@dataclass(frozen=True)
class Explanation:
    """What stands behind the score of one image.

    Args:
        nearest: class prototypes, the nearest first; empty where `grood` is not fitted.
        ood_prototype: None where `grood` is not fitted.
        heat: float32 [H, W] of the network's input, 0-1: 1 where hiding a part lowers the score most; all 0 where
            hiding no part lowers it.
        score_without: the lowest score with one window hidden.
    """

    nearest: tuple[ClassDistance, ...]
    ood_prototype: OodPrototype | None
    heat: NDArray[np.float32]
    score_without: float


def explain(detector: Detector, image: Pixels, score_name: str) -> Explanation:
    """Explain a score of one image, with 29 passes forward.

    Args:
        detector: the model.
        image: uint8 [H, W, 3], the network's input.
        score_name: a fitted score.
    """
    heat, score_without = occlusion(detector, image, elsewhere(image), score_name)
    nearest, ood_prototype = _prototypes(detector, detector.outputs(image[None]).penultimate)
    return Explanation(nearest, ood_prototype, heat, score_without)


def elsewhere(image: Pixels) -> tuple[Pixels, ...]:
    """What windows are filled with: the image mirrored, and shifted by half its height and by half its width."""
    height, width, _ = image.shape
    return image[:, ::-1], np.roll(image, height // 2, axis=0), np.roll(image, width // 2, axis=1)


def occlusion(
    detector: Detector, image: Pixels, fills: Sequence[Pixels], score_name: str
) -> tuple[NDArray[np.float32], float]:
    """How far a score falls, on average over the fills, where the image is hidden.

    Args:
        detector: the model.
        image: uint8 [H, W, 3], the network's input.
        fills: uint8 [H, W, 3] each, what is seen in a window instead.
        score_name: a fitted score.

    Returns:
        heat and score_without, as in an Explanation.
    """
    height, width, _ = image.shape
    hidden = list(product(fills, product(_spans(height), _spans(width))))
    pictures = np.repeat(image[None], 1 + len(hidden), axis=0)
    for picture, (fill, window) in zip(pictures[1:], hidden, strict=True):
        picture[window] = fill[window]
    parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    scored = [detector.scores(detector.outputs(part), [score_name])[score_name] for part in parts]
    whole, *without = np.concatenate(scored)
    fall, covered = np.zeros((2, height, width))
    for (_, window), score in zip(hidden, without, strict=True):
        fall[window] += whole - score
        covered[window] += 1
    rounding = detector.manifest.score_tolerance[detector.backbone.precision].get(score_name, 0.0)
    fall = np.maximum(fall / covered - rounding, 0)
    heat = fall / max(fall.max(), np.finfo(np.float64).tiny)
    return heat.astype(np.float32), float(min(without))


def _spans(side: int) -> list[slice]:
    """The windows along one side: together they cover it."""
    length = max(1, round(WINDOW * side))
    return [slice(start, start + length) for start in np.linspace(0, side - length, STEPS).round().astype(int)]


def heat_png(heat: NDArray[np.float32]) -> bytes:
    """Heat [H, W] as a PNG with transparency, to be laid over the image: clear where it is 0, yellow where it is 1."""
    share = heat[..., None]
    colour = (1 - share) * _COOL + share * _HOT
    return png(np.concatenate([colour, 255 * _OPACITY * share], axis=2).round().astype(np.uint8))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels [H, W, 3 or 4] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _prototypes(detector: Detector, features: Tensor) -> tuple[tuple[ClassDistance, ...], OodPrototype | None]:
    grood = detector.fitted.get("grood")
    if not isinstance(grood, GroodFamily):
        return (), None
    anchors = torch.vstack([grood.prototypes, grood.ood_prototype]).double()
    *classes, ood = exact_distances(features.double(), anchors)[0].tolist()
    _, log_pi = grood_gradient(features, grood.prototypes, grood.ood_prototype)
    order = sorted(range(len(classes)), key=lambda index: classes[index])[:NEAREST]
    names = detector.manifest.class_names
    nearest = tuple(ClassDistance(index, names[index], classes[index]) for index in order)
    return nearest, OodPrototype(ood, float(log_pi.exp()))
