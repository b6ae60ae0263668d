# SPDX-License-Identifier: Apache-2.0
"""Scores of the logits f alone, p = softmax(f): MSP, max logit, energy, GEN. Nothing is fitted."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detector.outputs import Outputs
from detector.scores.base import Score, register

GEN_POWER, GEN_CLASSES = 0.1, 100


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p and 1 - p, float64 [N, C] each, with all digits of 1 - p where p is close to one."""
    p = torch.softmax(logits.double(), dim=1)
    largest = p.argmax(dim=1, keepdim=True)
    others = p.scatter(1, largest, 0.0).sum(dim=1, keepdim=True)
    return p, (1 - p).scatter(1, largest, others)


def energy(logits: Tensor) -> Tensor:
    """log sum exp f, float64 [N]: large for in-distribution images."""
    return torch.logsumexp(logits.double(), dim=1)


@register
class Msp(Score):
    """1 - max p (Hendrycks & Gimpel, arXiv 1610.02136)."""

    name: ClassVar[str] = "msp"

    def _score(self, outputs: Outputs) -> Tensor:
        return probabilities(outputs.logits)[1].amin(dim=1)


@register
class MaxLogit(Score):
    """-max f (Hendrycks et al., arXiv 1911.11132)."""

    name: ClassVar[str] = "max_logit"

    def _score(self, outputs: Outputs) -> Tensor:
        return -outputs.logits.double().amax(dim=1)


@register
class Energy(Score):
    """-log sum exp f, temperature 1 (Liu et al., arXiv 2010.03759)."""

    name: ClassVar[str] = "energy"

    def _score(self, outputs: Outputs) -> Tensor:
        return -energy(outputs.logits)


@register
class Gen(Score):
    """Generalised entropy of the 100 largest p: sum of (p (1 - p))^0.1 (Liu et al., CVPR 2023)."""

    name: ClassVar[str] = "gen"

    def _score(self, outputs: Outputs) -> Tensor:
        p, rest = probabilities(outputs.logits)
        top = p.topk(min(GEN_CLASSES, p.shape[1]), dim=1).indices
        return (p * rest).gather(1, top).pow(GEN_POWER).sum(dim=1)
