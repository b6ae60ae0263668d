# SPDX-License-Identifier: Apache-2.0
"""GAIA (Chen et al., arXiv 2311.09620): abnormal gradients at the batch norms, none of them zero or all of them large.

The layers are chosen by one rule for each architecture, never by a test set. Losses are sums over the batch, so that
no image's gradient depends on its batch-mates.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from detector.backbone import Backbone
from detector.errors import ScoreError
from detector.outputs import Outputs
from detector.scores.backward import IMAGES, BackwardScore
from detector.scores.base import FitOptions, Gatherer, State, register
from detector.scores.gather import Images

FEWEST_ZEROS = 1e-3  # of all gradient entries; a ReLU network has tens of per cent


def stages(module: nn.Module) -> list[str]:
    """The children named layer1, layer2, ..., in order; empty where there are none."""
    found = [name for name, _ in module.named_children() if re.fullmatch(r"layer\d+", name)]
    return sorted(found, key=lambda name: int(name.removeprefix("layer")))


def batch_norms(module: nn.Module, score: str) -> list[str]:
    """Paths of all BatchNorm2d in the order of the modules; ScoreError where there is none."""
    found = [name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)]
    if not found:
        raise ScoreError(f"{score} looks at batch norms and the network has no BatchNorm2d; use another score")
    return found


def late_batch_norms(module: nn.Module, score: str) -> list[str]:
    """Those of the last two stages; without named stages, or batch norms in them, the last half of all."""
    every = batch_norms(module, score)
    last = tuple(f"{name}." for name in stages(module)[-2:])
    return [name for name in every if name.startswith(last)] or every[len(every) // 2 :]


class FewImages(Images):
    """Images enough to tell whether gradients hold exact zeros, whatever their classes."""

    limit: ClassVar[int | None] = IMAGES

    def __init__(self, options: FitOptions) -> None:
        super().__init__(replace(options, num_classes=1))

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        super().add(outputs, torch.zeros_like(labels))


@register
class GaiaZ(BackwardScore):
    """mean_k r_k^2, r_k the share of positions in channel k where the gradient of max f at a batch norm is not zero.

    All BatchNorm2d of the network that run. A network whose gradients hold no exact zeros (GELU, SiLU) is refused at
    the fit, which looks at a few training images; nothing else is fitted.
    """

    name: ClassVar[str] = "gaia_z"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (FewImages,)

    @classmethod
    def refuse(cls, backbone: Backbone, options: FitOptions) -> None:
        batch_norms(backbone.module, cls.name)

    def _fit(self, backbone: Backbone) -> State:
        self._attach(backbone)
        images, _ = self.got(FewImages).images()
        zeros = 1 - float(self._shares(images).mean())
        if zeros < FEWEST_ZEROS:
            raise ScoreError(
                f"{self.name} counts zero gradients and this network has next to none ({zeros:.2%} of them): "
                "it needs ReLUs; use gaia_a"
            )
        return {}

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._layers = batch_norms(backbone.module, self.name)

    def _score_images(self, images: Tensor) -> Tensor:
        return self._shares(images).square().mean(dim=1)

    def _shares(self, images: Tensor) -> Tensor:
        """r, float64 [N, channels of all layers]."""
        outputs, taps = self._backbone.differentiable(images, self._layers)
        loss = outputs.logits.amax(dim=1).sum()
        gradients = torch.autograd.grad(loss, list(taps.values()), materialize_grads=True)
        return torch.cat([(gradient != 0).double().mean(dim=(2, 3)) for gradient in gradients], dim=1)


@register
class GaiaA(BackwardScore):
    """mean_k v_k^2 / mean_j |w_j|: gradients of the pooled features over those of the log probabilities.

    v are the spatial means of d(sum h) / d(output) at the batch norms of the last two stages (`layer3` and `layer4` of
    a ResNet), or at the last half of all batch norms. w = (1 - C p)^T W / (H W) is the spatial mean of
    d(sum_c log p_c) / d(last stage) in closed form, H W the size of the map that is pooled to h; H W = 1 where no
    stage ends in a map of D channels.
    """

    name: ClassVar[str] = "gaia_a"

    @classmethod
    def refuse(cls, backbone: Backbone, options: FitOptions) -> None:
        batch_norms(backbone.module, cls.name)

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._layers = late_batch_norms(backbone.module, self.name)
        self._last = stages(backbone.module)[-1:]

    def _score_images(self, images: Tensor) -> Tensor:
        outputs, taps = self._backbone.differentiable(images, [*self._layers, *self._last])
        last = [taps.pop(name) for name in self._last if name in taps]
        loss = outputs.penultimate.sum()
        gradients = torch.autograd.grad(loss, list(taps.values()), materialize_grads=True)
        inner = torch.cat([gradient.double().mean(dim=(2, 3)) for gradient in gradients], dim=1)
        outer = output_gradient(outputs.logits.detach(), self._backbone.weight) / _pooled(last, outputs.penultimate)
        scale = outer.abs().mean(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        return inner.square().mean(dim=1) / scale


def output_gradient(logits: Tensor, weight: Tensor) -> Tensor:
    """d(sum_c log p_c) / dh = (1 - C p)^T W, float64 [N, D], of logits [N, C] and weight [C, D]."""
    p = torch.softmax(logits.double(), dim=1)
    return (1 - p.shape[1] * p) @ weight.double()


def _pooled(last: list[Tensor], penultimate: Tensor) -> int:
    """How many positions of the last stage are averaged to one feature."""
    maps = [output for output in last if output.ndim == 4 and output.shape[1] == penultimate.shape[1]]
    return maps[0].shape[2] * maps[0].shape[3] if maps else 1
