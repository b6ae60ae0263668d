# SPDX-License-Identifier: Apache-2.0
"""`image_statistics`, ours: how unusual the image itself is, whatever the network makes of it."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.errors import EmptyClass
from detector.image_statistics import COUNT
from detector.outputs import Outputs
from detector.scores.base import FitOptions, Gatherer, Score, State, register
from detector.scores.gaussian import whitening


class ImageMoments(Gatherer):
    """Number, sum and sum of products of the training images' statistics."""

    def __init__(self, options: FitOptions) -> None:
        self.count = torch.zeros((), dtype=torch.int64)
        self.total = torch.zeros(COUNT, dtype=torch.float64)
        self.products = torch.zeros(COUNT, COUNT, dtype=torch.float64)

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        found = outputs.image_statistics.cpu()
        self.count += len(found)
        self.total += found.sum(dim=0)
        self.products += found.T @ found

    def merge(self, other: Self) -> None:
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def progress(self) -> State:
        return {"count": self.count, "total": self.total, "products": self.products}

    def restore(self, progress: State) -> None:
        self.count, self.total, self.products = (progress[name] for name in ("count", "total", "products"))

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean float64 [18] and covariance float64 [18, 18]; EmptyClass where there was no image."""
        if not int(self.count):
            raise EmptyClass("no training image was seen")
        mean = self.total / self.count
        return mean, self.products / self.count - torch.outer(mean, mean)


@register
class ImageStatistics(Score):
    """Mahalanobis distance of `detector.image_statistics` from those of all training images.

    State: mean float32 [18], whitening float32 [18, K], K their rank.
    """

    name: ClassVar[str] = "image_statistics"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (ImageMoments,)
    tensors: ClassVar[tuple[str, ...]] = ("mean", "whitening")
    mean: Tensor
    whitening: Tensor

    def _fit(self, backbone: Backbone) -> State:
        mean, covariance = self.got(ImageMoments).gaussian()
        return {"mean": mean.float(), "whitening": whitening(covariance).float()}

    def _score(self, outputs: Outputs) -> Tensor:
        centred = outputs.image_statistics - self.mean.double()
        distances: Tensor = torch.linalg.vector_norm(centred @ self.whitening.double(), dim=1)
        return distances
