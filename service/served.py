# SPDX-License-Identifier: Apache-2.0
"""A model as it is served, its answers, and the batch sizes it is run in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from detector.detector import Detector
from detector.policy import Decider, Verdict
from service.errors import ScoringFailed


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model as the engine runs it.

    Args:
        detector: network and scores.
        decider: the policy now in force, with the shadows to report.
        shadow_ratio: share of the batches in which the shadows are computed.
    """

    detector: Detector
    decider: Decider
    shadow_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one image spent in the queue, and that its batch spent in the network and in the scores."""

    queue: float
    forward: float
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict and where its time went."""

    verdict: Verdict
    timing: Timing


def buckets(largest: int) -> tuple[int, ...]:
    """The batch sizes that are ever run: 1, 2, 4 … and the largest itself."""
    powers = takewhile(lambda size: size < largest, (1 << power for power in range(largest.bit_length())))
    return (*powers, largest)


def warm_up(model: ServedModel, sizes: Sequence[int]) -> None:
    """Judge black batches of these sizes, so that no caller waits for what is only done once.

    Raises:
        ScoringFailed: a score is no finite number; or whatever else keeps the model from judging.
    """
    for size in sizes:
        black = torch.zeros((size, *model.detector.backbone.input_shape), dtype=torch.uint8)
        verdicts = model.detector.judge(model.detector.backbone.outputs(black), model.decider)
        if not all(verdict.ood.sound for verdict in verdicts):
            raise ScoringFailed("a black image has no finite score")


def padded(images: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, 3] -> [size, H, W, 3]; what is added repeats the last image and nobody sees its result."""
    return torch.cat([images, images[-1:].expand(size - len(images), -1, -1, -1)])
