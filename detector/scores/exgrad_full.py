# SPDX-License-Identifier: Apache-2.0
"""ExGrad (Igoe et al., arXiv 2205.10439) over all parameters of the network; `exgrad` has the last layer alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.scores.backward import BackwardScore, SampleGradients
from detector.scores.base import register
from detector.scores.logit import probabilities


@register
class ExGradAll(BackwardScore):
    """sum_y p_y ||grad_theta log p_y||_2, theta all parameters of the network.

    One backward pass a class and image. The gradient of log p_y is that of (e_y - p) . f with p held fixed, which
    keeps the digits of 1 - p_y that a float32 softmax loses on confident images.
    """

    name: ClassVar[str] = "exgrad_all"

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._gradients = SampleGradients(backbone, [name for name, _ in backbone.module.named_parameters()])

    def _score_images(self, images: Tensor) -> Tensor:
        # Not the logits of the outputs: those may come from a bf16 pass.
        with torch.no_grad():
            logits = self._backbone.functional({}, images)
        p, rest = probabilities(logits)
        total = torch.zeros_like(p[:, 0])
        for label in range(p.shape[1]):
            direction = -p
            direction[:, label] = rest[:, label]
            # Unit length: the direction of a certain image may be too short for float32.
            length = torch.linalg.vector_norm(direction, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
            total += p[:, label] * length * self._norms(images, (direction / length[:, None]).float())
        return total

    def _norms(self, images: Tensor, directions: Tensor) -> Tensor:
        """||grad_theta (direction . f)||_2, float64 [N]."""
        norms = []
        for gradients in self._gradients.blocks(images, _along, directions):
            lengths = [torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float64) for part in gradients]
            norms.append(torch.linalg.vector_norm(torch.stack(lengths), dim=0))
        return torch.cat(norms)


def _along(logits: Tensor, direction: Tensor) -> Tensor:
    return logits @ direction
