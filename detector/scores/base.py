# SPDX-License-Identifier: Apache-2.0
"""The contract of a score, and the registry of all scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar

from torch import Tensor

from detector.backbone import Backbone, Outputs

State = dict[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """What a score asks of the forward pass.

    Args:
        early: the early layer's output, while fitting.
        backward: a backward pass of its own, while scoring; such a score never decides by default.
    """

    early: bool = False
    backward: bool = False


@dataclass(frozen=True)
class FitOptions:
    """What a fit is told, the same for every score.

    Args:
        num_classes: outputs of the network; `fit` fills it in.
        bank_size: training images whose features or gradients a nearest-neighbour score keeps, balanced over the
            classes; None keeps all.
        mixup_images: training images mixed into the synthetic OOD prototype, balanced over the classes.
        mixup_coefficient: share of the image in the mix; the rest is the prototype of the runner-up class.
    """

    num_classes: int = 0
    bank_size: int | None = 10_000
    mixup_images: int = 1_000
    mixup_coefficient: float = 0.5


class Score(Protocol):
    """A method that ranks images: larger = more OOD.

    Fitting streams: `partial_fit` any number of times, on any number of instances that are merged, then `finalize`.
    Two instances that saw one half each and are merged equal one that saw all.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    shares_fit_with: ClassVar[str | None]  # fitted from the state of that score, where both are asked for

    def __init__(self, options: FitOptions) -> None: ...

    def partial_fit(self, outputs: Outputs, labels: Tensor) -> Self:
        """Take in a batch: outputs with ids, labels int64 [N]."""
        ...

    def merge(self, other: Self) -> Self:
        """Take in what another instance has gathered."""
        ...

    def progress(self) -> State:
        """What `partial_fit` has gathered, to go on from after an interruption."""
        ...

    def restore(self, progress: State) -> Self:
        """Take `progress` back."""
        ...

    def finalize(self, backbone: Backbone) -> Self:
        """Turn what was gathered into what scoring needs; EmptyClass where a class was never seen."""
        ...

    def score(self, outputs: Outputs) -> Tensor:
        """float64 [N], larger = more OOD; no side effects."""
        ...

    def state(self) -> State:
        """The fitted tensors by name, without the score's own name as prefix."""
        ...

    @classmethod
    def from_state(cls, state: State, backbone: Backbone) -> Self:
        """The fitted score, on the backbone's device."""
        ...


S = TypeVar("S", bound=Score)
_REGISTRY: dict[str, type[Score]] = {}


def register(cls: type[S]) -> type[S]:
    """Class decorator: make a score known under its name."""
    _REGISTRY[cls.name] = cls
    return cls


def registry() -> dict[str, type[Score]]:
    """Every score's class by its name."""
    return dict(_REGISTRY)
