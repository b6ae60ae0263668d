# SPDX-License-Identifier: Apache-2.0
"""Two of our scores under the conventions of pytorch-ood: what a difference to that library comes from.

gen   p and 1 - p are clipped to [1e-7, 1 - 1e-7]; ours takes them as they are.
mds   the scatter within classes with 1e-6 on its diagonal is inverted, all of it; ours leaves out eigenvalues under
      1e-7 of the largest.

The rest is ours: float64 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.rivals import Values
from detector.outputs import Outputs
from detector.scores.logit import GEN_CLASSES, GEN_POWER, probabilities
from detector.scores.nearest import exact_distances

CLIP, RIDGE = 1e-7, 1e-6


def our_scores_their_way(
    train: Outputs, labels: Tensor, measured: Mapping[str, Outputs], names: tuple[str, ...]
) -> dict[str, dict[str, Values]]:
    """`gen` and `mds`, where they are among the names: float64 [M] by score and set.

    Args:
        train: outputs of the training images.
        labels: int64 [N], theirs, every class at least once.
        measured: outputs of the images to score, by set.
        names: the scores wanted; others are left out.
    """
    result: dict[str, dict[str, Values]] = {}
    if "gen" in names:
        result["gen"] = {key: np.asarray(clipped_gen(outputs.logits).cpu()) for key, outputs in measured.items()}
    if "mds" in names:
        means, whitening = _ridged(train.penultimate.double().cpu(), labels)
        result["mds"] = {
            key: np.asarray(_nearest_mean(outputs.penultimate.double().cpu(), means, whitening))
            for key, outputs in measured.items()
        }
    return result


def clipped_gen(logits: Tensor) -> Tensor:
    """Generalised entropy, float64 [N], of clipped probabilities."""
    p, rest = (part.clamp(CLIP, 1 - CLIP) for part in probabilities(logits))
    top = p.topk(min(GEN_CLASSES, p.shape[1]), dim=1).indices
    return (p * rest).gather(1, top).pow(GEN_POWER).sum(dim=1)


def _ridged(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class means, and A with A A^T the inverse of the scatter with the ridge."""
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(int(labels.max()) + 1)])
    centred = features - means[labels]
    values, vectors = torch.linalg.eigh(centred.T @ centred + RIDGE * torch.eye(features.shape[1]).double())
    return means, vectors / values.sqrt()


def _nearest_mean(features: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
    return exact_distances(features @ whitening, means @ whitening).amin(dim=1).square()
