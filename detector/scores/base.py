# SPDX-License-Identifier: Apache-2.0
"""The contract of a score, and the registry of all scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.errors import NonFiniteFeatures, ScoreError
from detector.outputs import Outputs

State = dict[str, Tensor]


@dataclass(frozen=True)
class FitOptions:
    """What a fit is told, the same for every score.

    Args:
        num_classes: outputs of the network; `fit` fills it in.
        bank_size: training images whose features or gradients a nearest-neighbour score keeps, balanced over the
            classes; None keeps all.
        mixup_images: training images mixed into the synthetic OOD prototype, balanced over the classes.
        mixup_coefficient: share of the image in the mix; the rest is the prototype of the runner-up class.
        generator: what the OOD prototype of GROOD's forms is the mean of, but for those named for noise: `mixup`,
            `noise`, `prototype_mean`, or `images` that the caller passes by name.
        ood_images: uint8 [N, H, W, 3], those images.
        lowdim_parameters: names of parameters or of modules that hold them, whose gradients `lowdim` and its forms look
            at; none means all parameters.
        index: whether large banks are searched by the approximate index of `detector.scores.index`.
    """

    num_classes: int = 0
    bank_size: int | None = 10_000
    mixup_images: int = 1_000
    mixup_coefficient: float = 0.5
    generator: str = "mixup"
    ood_images: Tensor | None = field(default=None, compare=False, repr=False)
    lowdim_parameters: tuple[str, ...] = ()
    index: bool = False


class Gatherer(ABC):
    """What one streaming pass over the training images leaves behind; scores that need the same share one.

    The result is the same for any order of the batches and any sharding, up to the rounding of float64 sums.
    """

    needs_early: ClassVar[bool] = False  # the early layer's output

    @abstractmethod
    def __init__(self, options: FitOptions) -> None: ...

    @abstractmethod
    def add(self, outputs: Outputs, labels: Tensor) -> None:
        """Take in a batch: outputs with ids, labels int64 [N]."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another one has gathered."""

    @abstractmethod
    def progress(self) -> State:
        """All that was gathered, to go on from after an interruption."""

    @abstractmethod
    def restore(self, progress: State) -> None:
        """Take `progress` back."""


G = TypeVar("G", bound=Gatherer)


class Score(ABC):
    """A method that ranks images: larger = more OOD.

    Fitting streams: `partial_fit` any number of times, on any number of instances that are merged, then `finalize`,
    then, where there is a tune split, `tune`. Two instances that saw one half each and are merged equal one that saw
    all. A subclass names what it gathers and the tensors of its state, and implements `_fit` and `_score`.
    """

    name: ClassVar[str]
    gathers: ClassVar[tuple[type[Gatherer], ...]] = ()
    tensors: ClassVar[tuple[str, ...]] = ()  # attributes that are its state
    optional: ClassVar[tuple[str, ...]] = ()  # further ones, which only some fits leave; else None
    backward: ClassVar[bool] = False  # runs a backward pass of its own; such a score never decides by default
    tuned: ClassVar[bool] = False  # cannot be used before `tune`
    members: ClassVar[tuple[str, ...]] = ()  # scores it is made of

    def __init__(self, options: FitOptions) -> None:
        self.options = options
        self.gathered: dict[type[Gatherer], Gatherer] = {kind: kind(options) for kind in self.gathers}

    @classmethod  # noqa: B027 - most scores take every network
    def refuse(cls, backbone: Backbone, options: FitOptions) -> None:
        """ScoreError where the network or the options rule this score out, whatever the training images are."""

    def partial_fit(self, outputs: Outputs, labels: Tensor) -> Self:
        """Take in a batch: outputs with ids, labels int64 [N]."""
        for gatherer in self.gathered.values():
            gatherer.add(outputs, labels)
        return self

    def merge(self, other: Self) -> Self:
        """Take in what another instance has gathered."""
        for kind, gatherer in self.gathered.items():
            gatherer.merge(other.gathered[kind])
        return self

    def finalize(self, backbone: Backbone) -> Self:
        """Turn what was gathered into what scoring needs.

        Raises:
            EmptyClass: a class was never seen.
            ScoreError: the training images or the network do not allow this score.
        """
        self.refuse(backbone, self.options)
        return self._take(self._fit(backbone), backbone)

    def tune(self, outputs: Outputs, labels: Tensor) -> Self:
        """Fix what is chosen on held-out in-distribution images: outputs and labels int64 [N] of the tune split."""
        return self

    def bind(self, scores: Mapping[str, Score]) -> Self:
        """Take hold of the fitted scores that this one is made of; ScoreError where one is missing."""
        return self

    def score(self, outputs: Outputs) -> Tensor:
        """float64 [N] on the device of the outputs, larger = more OOD; no side effects.

        Raises:
            NonFiniteFeatures: NaN or infinity in the outputs, where they are `checked`.
        """
        if not len(outputs):
            return outputs.logits.new_zeros(0, dtype=torch.float64)
        if outputs.checked and (odd := outputs.once("non-finite", lambda: _non_finite(outputs))):
            raise NonFiniteFeatures(odd, f"{self.name} was given")
        return self._score(outputs).double()

    def state(self) -> State:
        """The fitted tensors by name, without the score's own name as prefix."""
        optional = {name: getattr(self, name) for name in self.optional}
        return {name: getattr(self, name) for name in self.tensors} | {
            name: value for name, value in optional.items() if value is not None
        }

    @classmethod
    def from_state(cls, state: State, backbone: Backbone) -> Self:
        """The fitted score, on the backbone's device; ScoreError where a tensor is missing."""
        missing = [name for name in cls.tensors if name not in state]
        if missing:
            raise ScoreError(f"the state of {cls.name} lacks {', '.join(missing)}; fit the model again")
        return cls(FitOptions(num_classes=backbone.num_classes))._take(state, backbone)

    def got(self, kind: type[G]) -> G:
        """What one of its gatherers has."""
        return cast(G, self.gathered[kind])

    def _fit(self, backbone: Backbone) -> State:
        return {}

    @abstractmethod
    def _score(self, outputs: Outputs) -> Tensor: ...

    def _attach(self, backbone: Backbone) -> None:  # noqa: B027 - most scores need nothing more than their state
        """Derive from the state and the network what scoring needs."""

    def _take(self, state: State, backbone: Backbone) -> Self:
        for name in self.tensors:
            setattr(self, name, state[name].to(backbone.device))
        for name in self.optional:
            setattr(self, name, state.get(name))
        self._attach(backbone)
        return self


def _non_finite(outputs: Outputs) -> list[int]:
    """The images, by their place, for which the network gave NaN or infinity."""
    finite = outputs.finite()
    return [] if bool(finite.all()) else cast(list[int], (~finite).nonzero().flatten().tolist())


S = TypeVar("S", bound=type[Score])
_REGISTRY: dict[str, type[Score]] = {}


def register(cls: S) -> S:
    """Class decorator: make a score known under its name."""
    _REGISTRY[cls.name] = cls
    return cls


def registry() -> dict[str, type[Score]]:
    """Every score's class by its name."""
    return dict(_REGISTRY)
