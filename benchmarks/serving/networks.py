# SPDX-License-Identifier: Apache-2.0
"""The models that are served: random weights of a fixed seed, fitted and calibrated as any other.

Speed does not depend on the weights. So that answers can still be compared, batch-norm statistics are those of real
photos, the last layer is the nearest of ten clusters of its features, and an image's class is its cluster.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.datasets import load
from benchmarks.serving.workloads import Workload, squares
from detector import Network, fit
from detector.artifact import read_manifest
from detector.data import ArrayDataset
from detector.images import Pixels, Preprocessing
from detector.machine import fast_in_bfloat16
from detector.networks import CIFAR_PREPROCESSING, IMAGENET_PREPROCESSING, NetworkSpec, build
from detector.policy import Policy
from detector.scores import FusionImage

CLASSES, SEED, ROUNDS, BATCH = 10, 0, 5, 50
SAMPLES = "imagenet-samples-1000.zip"


class Null(nn.Module):
    """Next to no work: one strided convolution, global average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 16, 8, 8, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.layer1(x)).flatten(1))
        return logits


@dataclass(frozen=True)
class _Recipe:
    make: Callable[[], nn.Module]
    preprocessing: Preprocessing
    spec: NetworkSpec | None
    images: Callable[[], Pixels]
    score: str = FusionImage.name  # the one that decides, its members beside it; the embedded model's where not given


def _torchvision(name: str) -> _Recipe:
    spec = NetworkSpec(kind="torchvision", name=name, num_classes=CLASSES)
    return _Recipe(lambda: build(spec), IMAGENET_PREPROCESSING, spec, lambda: squares(SAMPLES))


_RECIPES = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "null": _Recipe(Null, CIFAR_PREPROCESSING, None, lambda: load("cifar10-test")[0][:2000], "energy"),
}


def ensure(workload: Workload) -> None:
    """Fit the workload's model where it does not lie in the build folder yet, or decides by another score there."""
    recipe = _RECIPES.get(workload.network)
    if recipe is None:
        return  # the embedded model
    if workload.artifact.exists():
        if read_manifest(workload.artifact).policy.score_name == recipe.score:
            return
        shutil.rmtree(workload.artifact)
    images = recipe.images()
    everything = ArrayDataset(images, None, recipe.preprocessing)
    pixels = np.stack([everything.read(index) for index in range(len(images))])
    torch.manual_seed(SEED)
    module = recipe.make()
    labels = _clustered(module, pixels, recipe.preprocessing)
    names = tuple(f"cluster {index}" for index in range(CLASSES))

    def part(first: float, last: float) -> ArrayDataset:
        where = slice(int(first * len(images)), int(last * len(images)))
        return ArrayDataset(images[where], labels[where], recipe.preprocessing, classes=names)

    fit(
        Network(module, recipe.preprocessing, names, spec=recipe.spec),
        part(0, 0.4),
        part(0.6, 1),
        workload.artifact,
        tune=part(0.4, 0.6),
        scores=(recipe.score,),
        policy=Policy(score_name=recipe.score),
        # Emulated, bf16 takes ten minutes, and `auto` would not choose it.
        precisions=("fp32", "bf16") if fast_in_bfloat16(torch.device("cpu")) else ("fp32",),
        source="sample photos, for speed alone",
    )


def _clustered(module: nn.Module, pixels: Pixels, preprocessing: Preprocessing) -> NDArray[np.int64]:
    """Give the network statistics and a last layer that tell images apart; the class of each image."""
    mean, std = torch.tensor([preprocessing.mean, preprocessing.std]).view(2, 1, 3, 1, 1)
    batches = torch.split(torch.from_numpy(pixels).permute(0, 3, 1, 2), BATCH)
    head, module.fc = module.fc, nn.Identity()
    assert isinstance(head, nn.Linear)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain average of the batches seen
    with torch.no_grad():
        module.train()
        module((batches[0] / 255 - mean[0]) / std[0])
        module.eval()
        features = torch.cat([module((batch / 255 - mean[0]) / std[0]) for batch in batches])
        spread = features.std(0) + 1e-6
        scaled = (features - features.mean(0)) / spread
        centres = scaled[:: len(scaled) // CLASSES][:CLASSES]
        for _ in range(ROUNDS):
            nearest = torch.cdist(scaled, centres).argmin(1)
            centres = torch.stack([scaled[nearest == index].mean(0) for index in range(CLASSES)])
        # argmin |z - c|^2 = argmax 2 c.z - |c|^2 with z = (h - m) / s
        head.weight.copy_(centres / spread / len(spread) ** 0.5)
        head.bias.copy_(-(head.weight @ features.mean(0)) - centres.square().sum(1) / 2 / len(spread) ** 0.5)
        module.fc = head
        labels: NDArray[np.int64] = head(features).argmax(1).numpy()
    return labels
