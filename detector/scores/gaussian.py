# SPDX-License-Identifier: Apache-2.0
"""Scores of Gaussians fitted to the features: Mahalanobis (MDS), relative Mahalanobis (RMDS), and ViM's subspace.

MDS: Lee et al., arXiv 1807.03888. RMDS: Ren et al., arXiv 2106.09022. ViM: Wang et al., arXiv 2203.10807.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.outputs import Outputs
from detector.scores.base import Gatherer, Score, State, register
from detector.scores.gather import ClassSums, Features, Scatter
from detector.scores.logit import energy
from detector.scores.nearest import exact_distances

SMALLEST_SINGULAR = 1e-5  # of W, relative to the largest; weight decay leaves the mean of its rows near zero
SMALLEST_EIGENVALUE = 1e-7  # relative to the largest; float32 features carry no direction below it


def whitening(covariance: Tensor) -> Tensor:
    """A with A A^T the pseudo-inverse of a covariance, float64 [D, K], K its rank (at least one column, of zeros)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    kept = values > SMALLEST_EIGENVALUE * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    if not bool(kept.any()):
        return torch.zeros(len(values), 1, dtype=torch.float64)
    transform: Tensor = vectors[:, kept] / values[kept].sqrt()
    return transform


@register
class Mds(Score):
    """min_c (h - mu_c)^T S^-1 (h - mu_c), S the covariance within classes.

    S is inverted where the training features vary at all, see `_whitening`.

    State: whitening float32 [D, K], prototypes float32 [C, D].
    """

    name: ClassVar[str] = "mds"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (ClassSums, Scatter)
    tensors: ClassVar[tuple[str, ...]] = ("whitening", "prototypes")
    whitening: Tensor
    prototypes: Tensor

    def _fit(self, backbone: Backbone) -> State:
        return {"whitening": self._whitening().float(), "prototypes": self.got(ClassSums).means().float()}

    def _background(self) -> Tensor:
        sums = self.got(ClassSums)
        return whitening(self.got(Scatter).about(sums, sums.mean()))

    def _whitening(self) -> Tensor:
        """Whitening within classes, inside the subspace that all training features together span.

        A cut of the covariance within classes alone would keep other directions than a cut of the background, and the
        difference of the two distances would be left with one of them there.
        """
        background = self._background()
        within = self.got(Scatter).within_classes(self.got(ClassSums))
        return background @ whitening(background.T @ within @ background)

    def _attach(self, backbone: Backbone) -> None:
        self._transform = self.whitening.double()
        self._centres = self.prototypes.double() @ self._transform

    def _score(self, outputs: Outputs) -> Tensor:
        return exact_distances(outputs.features @ self._transform, self._centres).amin(dim=1).square()


@register
class Rmds(Mds):
    """MDS minus the Mahalanobis distance to one Gaussian over all training features.

    State: that of MDS, background float32 [D, K'], mean float32 [D].
    """

    name: ClassVar[str] = "rmds"
    tensors: ClassVar[tuple[str, ...]] = ("whitening", "prototypes", "background", "mean")
    background: Tensor
    mean: Tensor

    def _fit(self, backbone: Backbone) -> State:
        mean = self.got(ClassSums).mean()
        return super()._fit(backbone) | {"background": self._background().float(), "mean": mean.float()}

    def _score(self, outputs: Outputs) -> Tensor:
        centred = outputs.features - self.mean.double()
        return super()._score(outputs) - (centred @ self.background.double()).square().sum(dim=1)


@register
class Vim(Score):
    """alpha ||h - u outside the principal subspace|| - log sum exp f, u = -W^+ b.

    The subspace has `vim_dimensions`. alpha makes the mean residual of training features as large as their mean largest
    logit.

    State: origin float32 [D], residual float32 [D, R], alpha float32 [].
    """

    name: ClassVar[str] = "vim"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (ClassSums, Scatter, Features)
    tensors: ClassVar[tuple[str, ...]] = ("origin", "residual", "alpha")
    origin: Tensor
    residual: Tensor
    alpha: Tensor

    def _fit(self, backbone: Backbone) -> State:
        weight, bias = backbone.weight.double().cpu(), backbone.bias.double().cpu()
        origin = -torch.linalg.pinv(weight, rtol=SMALLEST_SINGULAR) @ bias
        _, vectors = torch.linalg.eigh(self.got(Scatter).about(self.got(ClassSums), origin))
        residual = vectors[:, : len(origin) - vim_dimensions(len(origin))]
        features = self.got(Features).features().double()
        length = torch.linalg.vector_norm((features - origin) @ residual, dim=1).mean()
        largest = (features @ weight.T + bias).amax(dim=1).mean()
        alpha = largest / length.clamp_min(torch.finfo(torch.float32).tiny)
        return {"origin": origin.float(), "residual": residual.contiguous().float(), "alpha": alpha.float()}

    def _attach(self, backbone: Backbone) -> None:
        self._origin, self._residual = self.origin.double(), self.residual.double()

    def _score(self, outputs: Outputs) -> Tensor:
        outside: Tensor = torch.linalg.vector_norm((outputs.features - self._origin) @ self._residual, dim=1)
        return self.alpha.double() * outside - energy(outputs.logits)


def vim_dimensions(features: int) -> int:
    """Dimensions of ViM's principal subspace, as in the paper's code."""
    return 1000 if features >= 2048 else 512 if features >= 768 else features // 2
