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

THRESHOLDS = 50  # M: 49 bins
FULL_POOLED, FULL_STAGE = 10, 1  # O, training images in a bin that is covered in full
STAGES = 3


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
    both summed over positions; alpha is 1 / mean |z g| of the layer over the training images. A histogram of the states
    of 1,000 class-balanced training images is kept for each channel. Layers: the pooled features and up to three stages
    `layerN` before the last (`layer3`, `layer2`, `layer1` of a ResNet); the pooled features alone where no children
    have these names.

    State: coverage float32 [channels of all layers, 49], min(count / O, 1), layer below layer; steepness float32
    [layers], alpha.
    """

    name: ClassVar[str] = "nac"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (SomeImages,)
    tensors: ClassVar[tuple[str, ...]] = ("coverage", "steepness")
    coverage: Tensor
    steepness: Tensor

    def _fit(self, backbone: Backbone) -> State:
        self._attach(backbone)
        images, _ = self.got(SomeImages).images()
        parts = [self._products(part) for part in torch.split(images, IMAGES)]
        layers = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        # Without a unit of the layer's own, a narrow network fills the two end bins alone: z g adds up to the margin
        # of the logits over all channels. A layer that is off everywhere keeps a finite alpha.
        means = torch.stack([layer.abs().mean() for layer in layers])
        steepness = (1 / means.clamp_min(torch.finfo(torch.float32).tiny)).float()
        covered = []
        for index, (layer, alpha) in enumerate(zip(layers, steepness, strict=True)):
            bins = self._bins(layer, alpha)
            count = torch.zeros(len(bins), THRESHOLDS - 1, device=bins.device)
            count.scatter_add_(1, bins, torch.ones_like(bins, dtype=count.dtype))
            covered.append((count / (FULL_STAGE if index else FULL_POOLED)).clamp_max(1))
        return {"coverage": torch.cat(covered), "steepness": steepness}

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._stages = stages(backbone.module)[:-1][::-1][:STAGES]
        self._edges = thresholds(THRESHOLDS).to(backbone.device)

    def _score_images(self, images: Tensor) -> Tensor:
        means, first = [], 0
        for layer, alpha in zip(self._products(images), self.steepness, strict=True):
            bins = self._bins(layer, alpha)
            rows = self.coverage[first : first + len(bins)]
            means.append(rows.gather(1, bins).double().mean(dim=0))
            first += len(bins)
        return -torch.stack(means).mean(dim=0)

    def _products(self, images: Tensor) -> list[Tensor]:
        """z g of each channel, float64 [N, channels], layer by layer."""
        outputs, taps = self._backbone.differentiable(images, self._stages)
        loss = -torch.log_softmax(outputs.logits, dim=1).mean(dim=1).sum()
        layers = [outputs.penultimate, *(taps[name] for name in self._stages if name in taps)]
        gradients = torch.autograd.grad(loss, layers)
        return [_summed(z.detach()) * _summed(g) for z, g in zip(layers, gradients, strict=True)]

    def _bins(self, products: Tensor, alpha: Tensor) -> Tensor:
        """The bin of each channel's state, int64 [channels, N]."""
        states = torch.sigmoid(alpha * products).T.contiguous()
        return torch.searchsorted(self._edges, states, right=True) - 1


def _summed(maps: Tensor) -> Tensor:
    return maps.double().flatten(2).sum(dim=2) if maps.ndim > 2 else maps.double()
