# SPDX-License-Identifier: Apache-2.0
"""The energy of reshaped features: ReAct clips them, SCALE stretches them. The network's own answer is untouched."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from detector.backbone import Backbone
from detector.outputs import Outputs
from detector.scores.base import Gatherer, Score, State, register
from detector.scores.gather import Features
from detector.scores.gradient_norm import clip_level
from detector.scores.logit import energy

SCALE_PERCENTILE = 85


class HeadScore(Score):
    """A score that runs the last linear layer again."""

    def _attach(self, backbone: Backbone) -> None:
        self._weight, self._bias = backbone.weight.double(), backbone.bias.double()

    def _energy(self, features: Tensor) -> Tensor:
        return energy(features @ self._weight.T + self._bias)


@register
class React(HeadScore):
    """-log sum exp (W min(h, c) + b), c the 0.9 quantile of training activations (Sun et al., arXiv 2111.12797).

    State: clip float32 [].
    """

    name: ClassVar[str] = "react"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (Features,)
    tensors: ClassVar[tuple[str, ...]] = ("clip",)
    clip: Tensor

    def _fit(self, backbone: Backbone) -> State:
        return {"clip": clip_level(self.got(Features).features()).float()}

    def _score(self, outputs: Outputs) -> Tensor:
        return -self._energy(outputs.features.clamp_max(self.clip.double()))


@register
class Scale(HeadScore):
    """-log sum exp (W h r + b), r = exp(sum of h / sum of its 15 % largest entries) (Xu et al., ICLR 2024)."""

    name: ClassVar[str] = "scale"

    def _score(self, outputs: Outputs) -> Tensor:
        h = outputs.features
        kept = max(1, h.shape[1] - round(h.shape[1] * SCALE_PERCENTILE / 100))
        total, largest = h.sum(dim=1), h.topk(kept, dim=1).values.sum(dim=1)
        # Features that are all zero have no ratio; features of both signs can have any, and exp must stay finite.
        ratio = (total / largest.where(largest.abs() > 0, 1.0)).clamp(-50, 50)
        return -self._energy(h * ratio.exp()[:, None])
