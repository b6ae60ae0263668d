# SPDX-License-Identifier: Apache-2.0
"""Networks that others trained and published, as backbones: what the scores do on weights we had no hand in.

The parameter names are those of the published files; the classes are ours. The files lie under `weights/` beside the
evaluation images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.datasets import data_dir
from detector.backbone import Backbone
from detector.images import Preprocessing


class Shortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zeros in the new channels. It has no parameters."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.padding = (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; each ReLU is a module of its own, so that it can be hooked."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(before, after)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.bn1(self.conv1(x)))
        output: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return output


class CifarResNet(nn.Module):
    """The ResNet of 6n + 2 layers for 32x32 images (He et al., arXiv 1512.03385); features [N, 64]."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(self.pool(maps).flatten(1))
        return logits


def _stage(before: int, after: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(before, after, stride)
    return nn.Sequential(first, *(BasicBlock(after, after, 1) for _ in range(blocks - 1)))


class DenseLayer(nn.Module):
    """1x1 then 3x3 convolution, its 12 new channels behind those it was given."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(before, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))
        return torch.cat([x, new], dim=1)


class DenseBlock(nn.Module):
    """A chain of dense layers; `layer` is its name in the published files."""

    def __init__(self, before: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(DenseLayer(before + index * growth, growth) for index in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


class Transition(nn.Module):
    """Half the channels and half the side."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(before, before // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.pool(self.conv1(self.relu(self.bn1(x))))
        return output


class DenseNet(nn.Module):
    """DenseNet-BC of 100 layers and growth 12 for 32x32 images (Huang et al., arXiv 1608.06993); features [N, 342]."""

    def __init__(self, num_classes: int, growth: int = 12, layers: int = 16) -> None:
        super().__init__()
        width = 2 * growth
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.block1 = DenseBlock(width, growth, layers)
        self.trans1 = Transition(width + layers * growth)
        width = (width + layers * growth) // 2
        self.block2 = DenseBlock(width, growth, layers)
        self.trans2 = Transition(width + layers * growth)
        width = (width + layers * growth) // 2
        self.block3 = DenseBlock(width, growth, layers)
        width += layers * growth
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.block3(self.trans2(self.block2(self.trans1(self.block1(self.conv1(x))))))
        logits: Tensor = self.fc(self.pool(self.relu(self.bn1(maps))).flatten(1))
        return logits


class UpsideDown(nn.Module):
    """A network that was trained on images rotated by 180 degrees, for upright ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.flip(2, 3))
        return logits


@dataclass(frozen=True)
class Published:
    """One published network.

    Args:
        file: under `weights/`.
        build: the network, with its weights.
        known: the data set it was trained on: cifar10, cifar100 or imagenet.
        early: where the mix-up resumes from.
        preprocessing: its input.
        accuracy: share of test images it gets right, measured when the file was fetched.
    """

    file: str
    build: Callable[[Path], nn.Module]
    known: str
    early: str
    preprocessing: Preprocessing
    accuracy: float


def load(name: str) -> Backbone:
    """One of NETWORKS as a backbone; FileNotFoundError where its file is absent."""
    published = NETWORKS[name]
    module = published.build(weights_file(name))
    return Backbone(module, published.preprocessing, early=published.early)


def available(name: str) -> bool:
    return weights_file(name).exists()


def weights_file(name: str) -> Path:
    return data_dir() / "weights" / NETWORKS[name].file


def _resnet(blocks: int) -> Callable[[Path], nn.Module]:
    return lambda path: _with(CifarResNet(blocks), _checkpoint(path))


def _densenet(num_classes: int) -> Callable[[Path], nn.Module]:
    return lambda path: _with(DenseNet(num_classes), _checkpoint(path))


def _mobilenet(path: Path) -> nn.Module:
    from torchvision.models import mobilenet_v2

    return UpsideDown(_with(mobilenet_v2(weights=None), _int8(path)))


def _with(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state)
    return module


def _checkpoint(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("module."): value for name, value in state.items()}


def _int8(path: Path) -> dict[str, Tensor]:
    """`q:NAME` int8 times `s:NAME` of its output channel; `f:NAME` as it is."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    state = {key.removeprefix("f:"): value for key, value in arrays.items() if key.startswith("f:")}
    for key, value in arrays.items():
        if key.startswith("q:"):
            name = key.removeprefix("q:")
            state[name] = value.float() * arrays[f"s:{name}"].reshape(-1, *[1] * (value.ndim - 1))
    return state


_RESNET = Preprocessing(resize=32, crop=(32, 32))  # trained with ImageNet's mean and std
_DENSENET = Preprocessing(resize=32, crop=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
_MOBILENET = Preprocessing(resize=224, crop=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

NETWORKS = {
    "resnet20": Published("resnet20-12fca82f.th", _resnet(3), "cifar10", "layer1", _RESNET, 0.9173),
    "resnet56": Published("resnet56-4bfd9763.th", _resnet(9), "cifar10", "layer1", _RESNET, 0.9339),
    "densenet_cifar10": Published(
        "dice_densenet_cifar10.pth.tar", _densenet(10), "cifar10", "block1", _DENSENET, 0.9425
    ),
    "densenet_cifar100": Published(
        "dice_densenet_cifar100.pth.tar", _densenet(100), "cifar100", "block1", _DENSENET, 0.779
    ),
    # features.3 ends the stage of 56x56 maps, as layer1 of a ResNet does.
    "mobilenet_v2": Published(
        "mobilenet_v2qat_in1k_rot180_int8.npz", _mobilenet, "imagenet", "network.features.3", _MOBILENET, 0.844
    ),
}
