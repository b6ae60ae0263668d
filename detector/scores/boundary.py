# SPDX-License-Identifier: Apache-2.0
"""Where features lie against the classifier: fDBD (arXiv 2312.11536) and NCI (arXiv 2311.01479)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.outputs import Outputs
from detector.scores.base import Gatherer, Score, State, register
from detector.scores.gather import ClassSums
from detector.scores.nearest import exact_distances

NCI_ALPHA = 1e-3
TINY = torch.finfo(torch.float32).tiny


class CentredScore(Score):
    """A score of h relative to the mean of all training features.

    State: mean float32 [D].
    """

    gathers: ClassVar[tuple[type[Gatherer], ...]] = (ClassSums,)
    tensors: ClassVar[tuple[str, ...]] = ("mean",)
    mean: Tensor

    def _fit(self, backbone: Backbone) -> State:
        return {"mean": self.got(ClassSums).mean().float()}

    def _attach(self, backbone: Backbone) -> None:
        self._mean = self.mean.double()

    def _distance(self, features: Tensor) -> tuple[Tensor, Tensor]:
        centred = features - self._mean
        return centred, torch.linalg.vector_norm(centred, dim=1).clamp_min(TINY)


@register
class Fdbd(CentredScore):
    """-mean over the other classes c of |f_c - f_y| / ||w_c - w_y||, over ||h - mean||: distance to the boundaries."""

    name: ClassVar[str] = "fdbd"

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        weight = backbone.weight.double()
        self._between = exact_distances(weight, weight).clamp_min(TINY)

    def _score(self, outputs: Outputs) -> Tensor:
        logits = outputs.logits.double()
        largest, predicted = logits.max(dim=1)
        margins = (largest[:, None] - logits) / self._between[predicted]  # zero for the predicted class itself
        _, distance = self._distance(outputs.features)
        return -margins.sum(dim=1) / max(1, logits.shape[1] - 1) / distance


@register
class Nci(CentredScore):
    """-(w_y . (h - mean) / ||h - mean|| + 0.001 ||h||_1): how well a feature aligns with its class weight."""

    name: ClassVar[str] = "nci"

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._weight = backbone.weight.double()

    def _score(self, outputs: Outputs) -> Tensor:
        predicted = outputs.logits.argmax(dim=1)
        centred, distance = self._distance(outputs.features)
        aligned = (self._weight[predicted] * centred).sum(dim=1) / distance
        return -(aligned + NCI_ALPHA * outputs.features.abs().sum(dim=1))
