# SPDX-License-Identifier: Apache-2.0
"""NAC-UE (Liu et al., ICLR 2024): how well training images cover an image's neuron states."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.scores.backward import IMAGES, BackwardScore
from detector.scores.base import Gatherer, State, register
from detector.scores.gaia import stages
from detector.scores.gather import Images

# (full coverage O, thresholds M, steepness alpha) of the pooled features, then of the stages before the last, nearest
# first: the authors' choice for CIFAR-10 and a ResNet-18.
PARAMETERS = ((50, 50, 100.0), (100, 500, 1000.0), (5, 50, 0.001), (100, 500, 0.001))


class SomeImages(Images):
    """The thousand images of the paper."""

    limit: ClassVar[int | None] = 1_000


def thresholds(count: int) -> Tensor:
    """M edges of M - 1 bins, float64: dense at 1/2 and mirrored there, the last two beyond 1."""
    half = torch.linspace(1, math.sqrt(1000), count // 2, dtype=torch.float64).log() / math.log(1000)
    half[-1] = 0.5  # exactly: the state of a channel that is off
    edges = torch.cat([half, (1 - half).flip(0)[1:], torch.tensor([1.2], dtype=torch.float64)])
    edges[-2] += 0.01
    return edges


@register
class Nac(BackwardScore):
    """-(mean over layers of the mean over channels of min(count / O, 1)), the count of training images in its bin.

    A channel's state is sigmoid(alpha z g), z its activation and g the gradient of the cross-entropy to the uniform,
    both summed over positions; a histogram of the states of 1,000 class-balanced training images is kept for each
    channel. Layers: the pooled features and up to three stages `layerN` before the last (`layer3`, `layer2`, `layer1`
    of a ResNet); the pooled features alone where no children have these names.

    State: coverage float32 [channels of all layers, 499], min(count / O, 1), layer below layer; a layer with fewer
    bins leaves zeros.
    """

    name: ClassVar[str] = "nac"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (SomeImages,)
    tensors: ClassVar[tuple[str, ...]] = ("coverage",)
    coverage: Tensor

    def _fit(self, backbone: Backbone) -> State:
        self._attach(backbone)
        images, _ = self.got(SomeImages).images()
        counts: list[Tensor] = []
        for part in torch.split(images, IMAGES):
            bins = self._bins(part)
            counts = counts or [torch.zeros(layer.shape[1], self._widest, device=layer.device) for layer in bins]
            for count, layer in zip(counts, bins, strict=True):
                count.scatter_add_(1, layer.T, torch.ones_like(layer.T, dtype=count.dtype))
        covered = [(count / full).clamp_max(1) for count, (full, _, _) in zip(counts, PARAMETERS, strict=False)]
        return {"coverage": torch.cat(covered)}

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._stages = stages(backbone.module)[:-1][::-1][: len(PARAMETERS) - 1]
        self._edges = [thresholds(count).to(backbone.device) for _, count, _ in PARAMETERS]
        self._widest = max(len(edges) for edges in self._edges) - 1

    def _score_images(self, images: Tensor) -> Tensor:
        means, first = [], 0
        for layer in self._bins(images):
            rows = self.coverage[first : first + layer.shape[1]]
            means.append(rows.gather(1, layer.T).double().mean(dim=0))
            first += layer.shape[1]
        return -torch.stack(means).mean(dim=0)

    def _bins(self, images: Tensor) -> list[Tensor]:
        """The bin of each channel's state, int64 [N, channels], layer by layer."""
        outputs, taps = self._backbone.differentiable(images, self._stages)
        loss = -torch.log_softmax(outputs.logits, dim=1).mean(dim=1).sum()
        layers = [outputs.penultimate, *(taps[name] for name in self._stages if name in taps)]
        gradients = torch.autograd.grad(loss, layers)
        bins = []
        for z, g, edges, (_, _, steepness) in zip(layers, gradients, self._edges, PARAMETERS, strict=False):
            state = torch.sigmoid(steepness * _summed(z.detach()) * _summed(g))
            bins.append(torch.searchsorted(edges, state, right=True) - 1)
        return bins


def _summed(maps: Tensor) -> Tensor:
    return maps.double().flatten(2).sum(dim=2) if maps.ndim > 2 else maps.double()
