# SPDX-License-Identifier: Apache-2.0
"""`fusion` and its other forms, ours: the mean of the members' normal scores, of one forward pass, without OOD data.

Each member's score s becomes z(s): on the tune split, z = Phi^-1 of the mid-rank of s, interpolated between the tune
scores and continued beyond both ends by straight lines of the slope found there. The map is strictly increasing and has
no end, so OOD images beyond every tune score keep their order and a fusion of one member ranks as the member does. What
makes the p-value valid is only the last step: the fused score is ranked on the calibration split like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detector.backbone import Backbone
from detector.errors import ScoreError
from detector.outputs import Outputs
from detector.scores.base import FitOptions, Score, State, register

TAIL = 0.1  # of the tune scores give the slope of each tail
STEEPEST = 1e200


def score_all(scores: Mapping[str, Score], names: Sequence[str], outputs: Outputs) -> dict[str, Tensor]:
    """The named scores, float64 [N] each; members of a fusion, and what scores share, are computed once."""
    known: dict[str, Tensor] = {}
    outputs = outputs.sharing()

    def value(name: str) -> Tensor:
        if name not in known:
            score = scores[name]
            if isinstance(score, Fusion):
                known[name] = score.combine({member: value(member) for member in score.maps})
            else:
                known[name] = score.score(outputs)
        return known[name]

    return {name: value(name) for name in names}


class NormalMap:
    """A strictly increasing map from one member's scores to normal scores.

    Args:
        scores: float64 [K], ascending, distinct.
        normal: float64 [K], ascending.
        slopes: float64 [2], below the first and above the last, positive.
    """

    def __init__(self, scores: Tensor, normal: Tensor, slopes: Tensor) -> None:
        self.scores, self.normal, self.slopes = scores, normal, slopes

    @classmethod
    def fit(cls, tune: NDArray[np.float64]) -> NormalMap:
        """The map that makes tune scores [n] standard normal."""
        scores, counts = np.unique(tune, return_counts=True)
        middle = counts.cumsum() - counts / 2
        normal = ndtri(middle / len(tune))
        slopes = [_slope(scores, normal, part) for part in _tails(len(scores))]
        return cls(*(torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (scores, normal, slopes)))

    def lines(self) -> Tensor:
        """Float64 [K + 1, 4]: line i, for values with i scores at or below them, starts, and rises over its run."""
        one = self.scores.new_ones(1)
        starts = torch.stack([torch.cat([part[:1], part]) for part in (self.scores, self.normal)], dim=1)
        runs = torch.cat([one, self.scores.diff(), one])
        rises = torch.cat([self.slopes[:1], self.normal.diff(), self.slopes[1:]])
        return torch.column_stack([starts, runs, rises])

    def state(self) -> State:
        return {"scores": self.scores, "normal": self.normal, "slopes": self.slopes}

    def to(self, device: torch.device) -> NormalMap:
        return NormalMap(self.scores.to(device), self.normal.to(device), self.slopes.to(device))


class NormalMaps:
    """Maps of several members, applied in one step: each small operation costs more than its arithmetic."""

    def __init__(self, maps: Sequence[NormalMap]) -> None:
        self._scores = pad_sequence([one.scores for one in maps], batch_first=True, padding_value=torch.inf)
        self._last = torch.tensor([[len(one.scores)] for one in maps], device=self._scores.device)
        lines = pad_sequence([one.lines() for one in maps], batch_first=True)
        self._lines = lines.flatten(0, 1)
        self._first = torch.arange(len(maps), device=lines.device)[:, None] * lines.shape[1]

    def __call__(self, values: Tensor) -> Tensor:
        """z of scores, float64 [members, N] both."""
        line = torch.searchsorted(self._scores, values, right=True).minimum(self._last)
        start, normal, run, rise = self._lines[self._first + line].unbind(dim=2)
        return normal + (values - start) / run * rise


@register
class Fusion(Score):
    """Mean normal score of the members.

    State, for each member M in order: `I.M.scores`, `I.M.normal` float64 [K], `I.M.slopes` float64 [2]. Float64: a
    member's scores may differ by less than float32 can tell.
    """

    name: ClassVar[str] = "fusion"
    tuned: ClassVar[bool] = True
    members: ClassVar[tuple[str, ...]] = ("knn", "fdbd", "nci", "grood", "grood_w", "grood_margin_w", "vim")

    def __init__(self, options: FitOptions) -> None:
        super().__init__(options)
        self.maps: dict[str, NormalMap] = {}
        self._together: NormalMaps | None = None
        self._scores: dict[str, Score] = {}
        self._device = torch.device("cpu")

    def bind(self, scores: Mapping[str, Score]) -> Self:
        names = tuple(self.maps) or self.members
        missing = [name for name in names if name not in scores]
        if missing:
            raise ScoreError(f"{self.name} is made of {', '.join(names)}; fit {', '.join(missing)} too")
        self._scores = {name: scores[name] for name in names}
        return self

    def tune(self, outputs: Outputs, labels: Tensor) -> Self:
        return self._use(
            {name: NormalMap.fit(score.score(outputs).cpu().numpy()) for name, score in self._scores.items()}
        )

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """The fused score, float64 [N], from the members' scores float64 [N]; ScoreError before `tune`."""
        if self._together is None:
            raise ScoreError(f"{self.name} needs a tune split: in-distribution images that nothing else was fitted on")
        return self._together(torch.stack([values[name] for name in self.maps])).mean(dim=0)

    def _score(self, outputs: Outputs) -> Tensor:
        return self.combine({name: score.score(outputs) for name, score in self._scores.items()})

    def _attach(self, backbone: Backbone) -> None:
        self._device = backbone.device

    def _use(self, maps: Mapping[str, NormalMap]) -> Self:
        self.maps = {name: one.to(self._device) for name, one in maps.items()}
        self._together = NormalMaps([*self.maps.values()])
        return self

    def state(self) -> State:
        return {
            f"{index}.{name}.{key}": value
            for index, (name, member) in enumerate(self.maps.items())
            for key, value in member.state().items()
        }

    @classmethod
    def from_state(cls, state: State, backbone: Backbone) -> Self:
        score = cls(FitOptions(num_classes=backbone.num_classes))
        score._attach(backbone)
        names = sorted({(int(key.split(".")[0]), key.split(".")[1]) for key in state})
        return score._use(
            {
                name: NormalMap(*(state[f"{index}.{name}.{key}"] for key in ("scores", "normal", "slopes")))
                for index, name in names
            }
        )


@register
class FusionLean(Fusion):
    """Mean normal score of five members, none of them whitened.

    State: that of `fusion`.
    """

    name: ClassVar[str] = "fusion_lean"
    members: ClassVar[tuple[str, ...]] = ("knn", "vim", "rg", "grood_noise", "grood_margin_noise")


@register
class FusionImage(Fusion):
    """`fusion_lean` and the image itself: mean normal score of six members.

    State: that of `fusion`.
    """

    name: ClassVar[str] = "fusion_image"
    members: ClassVar[tuple[str, ...]] = (*FusionLean.members, "image_statistics")


def _tails(distinct: int) -> tuple[slice, slice]:
    size = max(2, round(TAIL * distinct))
    return slice(0, size), slice(max(0, distinct - size), distinct)


def _slope(scores: NDArray[np.float64], normal: NDArray[np.float64], part: slice) -> float:
    rise, run = np.ptp(normal[part]), np.ptp(scores[part])
    if not (rise > 0 and run > 0):
        return 1.0
    return float(rise / max(run, rise / STEEPEST))  # scores that nearly underflow differ by almost nothing
