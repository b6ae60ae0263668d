# SPDX-License-Identifier: Apache-2.0
"""Small real things for tests: images, a network that knows them, models made of both."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from detector.artifact import Manifest
from detector.backbone import Backbone, Precision
from detector.cifar_resnet import CifarResNet18
from detector.data import ArrayDataset
from detector.features import collect
from detector.fitting import Network, fit
from detector.images import Pixels
from detector.networks import CIFAR_PREPROCESSING, NetworkSpec
from detector.policy import Policy
from detector.scores import FitOptions

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "models" / "cifar10" / "1"
TOY_CLASSES = ("red", "green", "blue", "grey")
TOY_SPEC = NetworkSpec(kind="cifar_resnet18", num_classes=len(TOY_CLASSES), width=8)
_COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [120, 120, 120]])


def encoded(pixels: Pixels, image_format: str = "PNG", **options: object) -> bytes:
    """Pixels [H, W, 3] as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Pixels:
    """A smooth picture of any size, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def toy_images(n: int, seed: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Noisy images of four colours, uint8 [n, 32, 32, 3], and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(TOY_CLASSES), n)
    coarse = generator.normal(0, 35, (n, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    noise = generator.normal(0, 12, (n, 32, 32, 3))
    images = np.clip(_COLOURS[labels][:, None, None] + coarse + noise, 0, 255).astype(np.uint8)
    return images, labels.astype(np.int64)


def toy_dataset(n: int, seed: int) -> ArrayDataset:
    images, labels = toy_images(n, seed)
    return ArrayDataset(images, labels, CIFAR_PREPROCESSING, classes=TOY_CLASSES, source=f"toy{seed}")


def toy_network() -> Network:
    """A small ResNet whose last layer tells the colours apart: the class means of its random features."""
    torch.manual_seed(0)
    module = CifarResNet18(len(TOY_CLASSES), TOY_SPEC.width)
    known = collect(Backbone(module, CIFAR_PREPROCESSING), toy_dataset(400, seed=99))
    features, labels = known.outputs.penultimate, torch.from_numpy(known.labels)
    means = torch.stack([features[labels == label].mean(0) for label in range(len(TOY_CLASSES))])
    with torch.no_grad():
        module.fc.weight.copy_(20 * means)
        module.fc.bias.copy_(-10 * means.square().sum(1))
    return Network(module, CIFAR_PREPROCESSING, TOY_CLASSES, spec=TOY_SPEC)


def toy_model(out: Path, *, policy: Policy | None = None, precisions: Sequence[Precision] = ("fp32",)) -> Manifest:
    """A whole model directory, made in a second."""
    return fit(
        toy_network(),
        toy_dataset(300, seed=1),
        toy_dataset(300, seed=2),
        out,
        tune=toy_dataset(100, seed=3),
        test=toy_dataset(200, seed=4),
        options=FitOptions(num_classes=len(TOY_CLASSES), bank_size=200, mixup_images=40),
        policy=policy or Policy(),
        precisions=precisions,
    )


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG of that size, with no pixels behind them."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


GOOD = encoded(toy_images(1, seed=50)[0][0])
HUGE_PNG = png_header(60_000, 60_000)
