# SPDX-License-Identifier: Apache-2.0
"""Norms of gradients at the last layer in closed form: GradNorm, ExGrad, RG, and the product family around them.

The gradient of -log p_y at W is the rank-one matrix (p - e_y) h^T, so every entry-wise norm of it is the product of
one norm of h and one of p - e_y: no backward pass is ever needed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.outputs import Outputs
from detector.scores.base import Gatherer, Score, State, register
from detector.scores.gather import Features
from detector.scores.logit import energy, probabilities

CLIP_QUANTILE = 0.9  # of all training activations


def clip_level(features: Tensor) -> Tensor:
    """The 0.9 quantile over all entries of training features [N, D], float64 scalar."""
    values = features.flatten().double()
    # torch.quantile refuses more than 2^24 values.
    rank = max(1, round(CLIP_QUANTILE * len(values)))
    return values.kthvalue(rank).values


@register
class GradNorm(Score):
    """-||h||_1 ||C p - 1||_1, the gradient of the cross-entropy to the uniform (Huang et al., arXiv 2110.00218)."""

    name: ClassVar[str] = "gradnorm"

    def _score(self, outputs: Outputs) -> Tensor:
        p, _ = probabilities(outputs.logits)
        return -_l1(outputs.penultimate) * (p.shape[1] * p - 1).abs().sum(dim=1)


@register
class ExGrad(Score):
    """sum_y p_y ||grad log p_y||_1 = 2 ||h||_1 (1 - ||p||^2), Igoe et al., arXiv 2205.10439, at the last layer."""

    name: ClassVar[str] = "exgrad"

    def _score(self, outputs: Outputs) -> Tensor:
        p, rest = probabilities(outputs.logits)
        return 2 * _l1(outputs.penultimate) * (p * rest).sum(dim=1)


@register
class ExGradL2(Score):
    """The same in the Euclidean norm: ||h||_2 sum_y p_y sqrt(||p||^2 - 2 p_y + 1)."""

    name: ClassVar[str] = "exgrad_l2"

    def _score(self, outputs: Outputs) -> Tensor:
        p, rest = probabilities(outputs.logits)
        # ||p - e_y||^2 = (1 - p_y)^2 + the squares of all other p, without the cancellation of the textbook form.
        squares = p.square()
        others = (squares.sum(dim=1, keepdim=True) - squares).clamp_min(0)
        return _l2(outputs.penultimate) * (p * (rest.square() + others).sqrt()).sum(dim=1)


@register
class Rg(Score):
    """-||min(h, c)||_1 log sum exp f: Reactivate GradNorm (ICLR 2023 submission -hMNEMgT8Wd).

    c is the 0.9 quantile of all training activations. Where the free energy is not positive a larger norm would make
    an image look more OOD; there the norm divides instead, scaled to meet the product where the energy is zero.

    State: clip float32 [], norm float32 []: the mean clipped norm over the training images.
    """

    name: ClassVar[str] = "rg"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (Features,)
    tensors: ClassVar[tuple[str, ...]] = ("clip", "norm")
    clip: Tensor
    norm: Tensor

    def _fit(self, backbone: Backbone) -> State:
        features = self.got(Features).features()
        clip = clip_level(features)
        return {"clip": clip.float(), "norm": _l1(features.double().clamp_max(clip)).mean().float()}

    def _score(self, outputs: Outputs) -> Tensor:
        strength = _l1(outputs.features.clamp_max(self.clip.double()))
        free_energy = energy(outputs.logits)
        inverse = self.norm.double().square() / strength.clamp_min(torch.finfo(torch.float32).tiny)
        return -free_energy * torch.where(free_energy > 0, strength, inverse)


def _l1(rows: Tensor) -> Tensor:
    return rows.double().abs().sum(dim=1)


def _l2(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norm


def _from_uniform(logits: Tensor) -> Tensor:
    p, _ = probabilities(logits)
    return (p - 1 / p.shape[1]).abs().sum(dim=1)


STRENGTHS = ("one", "l1", "l2", "clipped")
CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_prob": lambda logits: 1 - probabilities(logits)[1].amin(dim=1),
    "from_uniform": _from_uniform,
    "energy": energy,
    "max_logit": lambda logits: logits.double().amax(dim=1),
    "square_prob": lambda logits: probabilities(logits)[0].square().sum(dim=1),
}


class ProductScore(Score):
    """-V(h) U(p), the non-gradient family of Igoe et al.: V of `STRENGTHS`, U of `CONFIDENCES`.

    Which pair the paper recommends could not be found, so no member is called theirs. `product_l1_from_uniform` is
    GradNorm up to a constant, `product_clipped_energy` is RG where the energy is positive, and `product_one_*` leave
    the features out.

    State: clip float32 [], used by the clipped members.
    """

    gathers: ClassVar[tuple[type[Gatherer], ...]] = (Features,)
    tensors: ClassVar[tuple[str, ...]] = ("clip",)
    strength: ClassVar[str]
    confidence: ClassVar[str]
    clip: Tensor

    def _fit(self, backbone: Backbone) -> State:
        return {"clip": clip_level(self.got(Features).features()).float()}

    def _score(self, outputs: Outputs) -> Tensor:
        return -self._strength(outputs.penultimate) * CONFIDENCES[self.confidence](outputs.logits)

    def _strength(self, features: Tensor) -> Tensor:
        if self.strength == "one":
            return torch.ones(len(features), dtype=torch.float64, device=features.device)
        if self.strength == "clipped":
            features = features.double().clamp_max(self.clip.double())
        return _l2(features) if self.strength == "l2" else _l1(features)


for _strength, _confidence in product(STRENGTHS, CONFIDENCES):
    _name = f"product_{_strength}_{_confidence}"
    register(type(_name, (ProductScore,), {"name": _name, "strength": _strength, "confidence": _confidence}))
