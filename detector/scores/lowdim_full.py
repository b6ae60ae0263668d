# SPDX-License-Identifier: Apache-2.0
"""LowDimGrad over all parameters of the network, or over those named in `FitOptions.lowdim_parameters`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.errors import ScoreError
from detector.scores.backward import BackwardScore, SampleGradients
from detector.scores.base import FitOptions, Gatherer, State, register
from detector.scores.gather import Images
from detector.scores.lowdim import COLUMNS, LowDimScore, Neighbours, need_all_classes
from detector.scores.subspace import Subspace, WhitenedRows, class_averages, principal, refuse_large


class LowDimImages(Images):
    """Every pass of the fit takes their gradients anew."""

    limit: ClassVar[int | None] = 5_000


@register
class LowDim(BackwardScore, LowDimScore):
    """The energy of a linear probe on per-image gradients in their first 200 principal directions.

    The fit makes the gradients of at most 5,000 images five times, `SampleGradients` at a time, and holds three bases
    of 4 P K bytes; a basis of more than 2 GB is refused. Scoring is one backward pass and P K multiplications.

    State: that of `LowDimScore`, and parameters int64 [M]: which parameters of the network, by position.
    """

    name: ClassVar[str] = "lowdim"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (LowDimImages,)
    tensors: ClassVar[tuple[str, ...]] = ("parameters", *LowDimScore.tensors)
    advice: ClassVar[str] = (
        "Choose parameter groups with --lowdim-parameters (FitOptions.lowdim_parameters), or fit lowdim_average, "
        "a smaller basis."
    )
    parameters: Tensor

    @classmethod
    def refuse(cls, backbone: Backbone, options: FitOptions) -> None:
        values = list(backbone.module.parameters())
        size = sum(values[index].numel() for index in chosen_parameters(backbone, options.lowdim_parameters).tolist())
        refuse_large(size, cls._columns(backbone), cls.advice)

    def _fit(self, backbone: Backbone) -> State:
        images, labels = self.got(LowDimImages).images()
        need_all_classes(labels, self.options.num_classes)
        chosen = chosen_parameters(backbone, self.options.lowdim_parameters)
        gradients = _gradients(backbone, chosen)

        def blocks() -> Iterator[Tensor]:
            return gradients.rows(images, _free_energy)

        return {"parameters": chosen} | self._finish(self._subspace(WhitenedRows(blocks), labels), labels)

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._gradients = _gradients(backbone, self.parameters)

    def _score_images(self, images: Tensor) -> Tensor:
        rows = torch.cat([block @ self.basis for block in self._gradients.rows(images, _free_energy)])
        return self._rank(rows.double() - self.offset.double())

    @classmethod
    def _columns(cls, backbone: Backbone) -> int:
        return COLUMNS

    def _subspace(self, rows: WhitenedRows, labels: Tensor) -> Subspace:
        return principal(rows, COLUMNS)


@register
class LowDimKnn(Neighbours, LowDim):
    """Distance to the 5th nearest training image in the same subspace, without a probe."""

    name: ClassVar[str] = "lowdim_knn"
    tensors: ClassVar[tuple[str, ...]] = ("parameters", *Neighbours.tensors)


@register
class LowDimAverage(LowDim):
    """The energy of a linear probe on per-image gradients, projected on the average gradient of each class."""

    name: ClassVar[str] = "lowdim_average"
    advice: ClassVar[str] = "Choose parameter groups with --lowdim-parameters (FitOptions.lowdim_parameters)."

    @classmethod
    def _columns(cls, backbone: Backbone) -> int:
        return backbone.num_classes

    def _subspace(self, rows: WhitenedRows, labels: Tensor) -> Subspace:
        return class_averages(rows, labels, self.options.num_classes)


@register
class LowDimAverageKnn(Neighbours, LowDimAverage):
    """Distance to the 5th nearest training image in that space, without a probe."""

    name: ClassVar[str] = "lowdim_average_knn"
    tensors: ClassVar[tuple[str, ...]] = ("parameters", *Neighbours.tensors)


def chosen_parameters(backbone: Backbone, groups: Sequence[str]) -> Tensor:
    """Positions int64 [M] of the parameters that these names stand for; ScoreError where a name stands for none."""
    names = [name for name, _ in backbone.module.named_parameters()]
    chosen: set[int] = set()
    for group in groups:
        found = {index for index, name in enumerate(names) if f"{name}.".startswith(f"{group}.")}
        if not found:
            raise ScoreError(f"the network has no parameter {group!r}; it has {', '.join(names)}")
        chosen |= found
    return torch.tensor(sorted(chosen) if groups else range(len(names)))


def _gradients(backbone: Backbone, chosen: Tensor) -> SampleGradients:
    names = [name for name, _ in backbone.module.named_parameters()]
    return SampleGradients(backbone, [names[index] for index in chosen.tolist()])


def _free_energy(logits: Tensor, unused: Tensor) -> Tensor:
    return logits.logsumexp(dim=0)
