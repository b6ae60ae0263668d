# SPDX-License-Identifier: Apache-2.0
"""What scores with a backward pass of their own share: the images, and the gradients of each image alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad, vmap

from detector.backbone import Backbone
from detector.errors import ScoreError
from detector.outputs import Outputs
from detector.scores.base import Score

IMAGES = 32  # in one graph: its activations are all held
GRADIENT_BYTES = 2**28  # of the gradients of single images held at a time

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [C], what belongs to the image) -> scalar


class BackwardScore(Score):
    """A score that runs the network again on the images, at most 32 in one graph."""

    backward: ClassVar[bool] = True
    _backbone: Backbone

    def _attach(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def _score(self, outputs: Outputs) -> Tensor:
        if outputs.inputs is None:
            raise ScoreError(f"{self.name} runs the network again and needs the images: pass Outputs(inputs=…)")
        with torch.inference_mode(False):
            return torch.cat([self._score_images(images) for images in torch.split(outputs.inputs, IMAGES)])

    @abstractmethod
    def _score_images(self, images: Tensor) -> Tensor:
        """Scores [N] of images uint8 [N, H, W, 3]."""


class SampleGradients:
    """Gradients of a loss of the logits with respect to parameters, for each image alone, by `torch.func`.

    At most 256 MB of them are held at a time, or one image's; the pass that makes them takes about twice as much again.

    Args:
        backbone: the network.
        names: parameters, by their names in the network.
    """

    def __init__(self, backbone: Backbone, names: list[str]) -> None:
        self.backbone = backbone
        # Plain strides, a copy of all weights: vmap is slow on channels-last pooling, and warns of it.
        own = {name: value.detach().contiguous() for name, value in backbone.module.named_parameters()}
        self.parameters = {name: own.pop(name) for name in names}
        self._fixed = own
        self.size = sum(value.numel() for value in self.parameters.values())
        self.block = max(1, min(IMAGES, GRADIENT_BYTES // (4 * self.size)))

    def blocks(self, images: Tensor, loss: Loss, context: Tensor | None = None) -> Iterator[list[Tensor]]:
        """The gradients, one tensor [b, ...] a parameter, of consecutive blocks of b images.

        Args:
            images: uint8 [N, H, W, 3].
            loss: what is differentiated.
            context: [N, ...], what the loss is told of each image.
        """

        def of_one(parameters: dict[str, Tensor], image: Tensor, told: Tensor) -> Tensor:
            return loss(self.backbone.functional(self._fixed | parameters, image[None])[0], told)

        images = images.to(self.backbone.device)
        context = images.new_zeros(len(images)) if context is None else context.to(self.backbone.device)
        of_each = vmap(grad(of_one), in_dims=(None, 0, 0))
        for start in range(0, len(images), self.block):
            part = slice(start, start + self.block)
            with torch.inference_mode(False):
                gradients = list(of_each(self.parameters, images[part], context[part]).values())
            yield [gradient.detach() for gradient in gradients]

    def rows(self, images: Tensor, loss: Loss) -> Iterator[Tensor]:
        """The same as one row an image, float32 [b, P]."""
        for gradients in self.blocks(images, loss):
            yield torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
