# SPDX-License-Identifier: Apache-2.0
"""What is measured: a network with a gradient bank of any size, and the engine's steps on it.

Weights, bank and calibration are made at random: they change what comes out, not what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models

from detector.backbone import Backbone, Precision
from detector.forward import Forward
from detector.images import Preprocessing
from detector.outputs import Outputs
from detector.policy import DOUBT, CalibrationScores, Decider, Grouping, Policy, Verdict
from detector.scores import Grood, score_all
from detector.staging import Download

CALIBRATION = 1_000


@dataclass(frozen=True)
class Subject:
    """A backbone in one precision, GROOD with a bank, and a decider; the engine's own steps on them."""

    backbone: Backbone
    grood: Grood
    decider: Decider

    def start(self, images: Tensor) -> Download:
        """Host uint8 images up, forward and score started: logits and scores, on their way back."""
        return Download(self.score(self.backbone.outputs(images, checked=False)))

    def score(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Logits, and the score of each image, on the device."""
        return outputs.logits, score_all({"grood": self.grood}, ("grood",), outputs)["grood"]

    def finish(self, started: Download) -> list[Verdict]:
        """Verdicts of what was started."""
        logits, scores = started.tensors()
        return self.decider.decide(logits, {"grood": scores.numpy()})


def subject(network: str, size: int, bank: int, classes: int, device: str, precision: Precision) -> Subject:
    """A torchvision network with random weights, and a bank of so many rows."""
    torch.manual_seed(0)
    module: nn.Module = getattr(models, network)(num_classes=classes)
    preprocessing = Preprocessing(resize=size, crop=(size, size))
    backbone = Backbone(module, preprocessing, device=device, precision=precision)
    generator = torch.Generator().manual_seed(0)
    width = backbone.weight.shape[1]
    made = {"prototypes": classes, "bank": bank}
    state = {name: torch.randn(rows, width, generator=generator) for name, rows in made.items()}
    state["bank"] /= state["bank"].norm(dim=1, keepdim=True)
    state["ood_prototype"] = state["prototypes"].mean(dim=0)
    scores = np.random.default_rng(0).random(CALIBRATION)
    grouping = Grouping.single(classes)
    calibration = CalibrationScores.build(
        grouping, {"grood": scores, DOUBT: scores}, np.zeros(CALIBRATION, dtype=np.int64)
    )
    decider = Decider(Policy(score_name="grood"), calibration, [str(index) for index in range(classes)])
    return Subject(backbone, Grood.from_state(state, backbone), decider)


def bare(backbone: Backbone, *, channels_last: bool = True) -> Forward:
    """The forward with nothing around it, its weights in the order of memory asked for."""
    forward = Forward(
        backbone.module, backbone.head, backbone.weight, backbone.bias, backbone.preprocessing, backbone.precision
    )
    order = torch.channels_last if channels_last else torch.contiguous_format
    forward.to(memory_format=order)  # type: ignore[call-overload] # missing from torch's stubs
    return forward
