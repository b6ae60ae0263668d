# SPDX-License-Identifier: Apache-2.0
"""Make the example images and the console's samples: some computed from the default network, some drawn.

python -m benchmarks.cifar10.examples
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from benchmarks.cifar10 import drawn
from benchmarks.cifar10.train import MEAN, STD
from detector import Detector
from detector.images import Pixels

MODEL, OUT, SAMPLES = Path("models/cifar10/1"), Path("examples"), Path("service/console/samples")
CAT, HORSE, SHIP = 3, 7, 8
STEPS = 300


def dreamt(detector: Detector, label: int) -> Pixels:
    """Pixels moved towards a class's prototype and logit, kept smooth: uint8 [32, 32, 3]."""
    network = detector.backbone.module
    prototypes = detector.fitted["grood"].state()["prototypes"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    pixels = functional.interpolate(coarse, 32, mode="bicubic").clamp(0.1, 0.9).requires_grad_()
    features: list[torch.Tensor] = []
    handle = network.get_submodule(detector.backbone.head).register_forward_pre_hook(
        lambda module, inputs: features.append(inputs[0])
    )
    optimiser = torch.optim.Adam([pixels], 0.02)
    for _ in range(STEPS):
        features.clear()
        logits = network((pixels - mean) / std)
        rough = (pixels[..., 1:] - pixels[..., :-1]).abs().mean() + (
            pixels[..., 1:, :] - pixels[..., :-1, :]
        ).abs().mean()
        away = (features[0] - prototypes[label]).norm() / prototypes[label].norm()
        loss = functional.cross_entropy(logits, torch.tensor([label])) + away + rough
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    handle.remove()
    picture: Pixels = pixels.detach()[0].permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
    return picture


def static() -> Pixels:
    """Television static: uint8 [32, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def stripes() -> Pixels:
    """Diagonal stripes in two colours: uint8 [32, 32, 3]."""
    y, x = np.mgrid[:32, :32]
    return np.where(((x + y) // 4 % 2)[..., None], [240, 200, 40], [30, 60, 140]).astype(np.uint8)


def with_static(image: Pixels, side: int) -> Pixels:
    """An image with static in one corner, `side` pixels wide: uint8 [32, 32, 3]."""
    patched = image.copy()
    patched[-side:, -side:] = static()[-side:, -side:]
    return patched


def main() -> None:
    detector = Detector.load(MODEL, device="cpu", precision="fp32")
    cat = dreamt(detector, CAT)
    for name, pixels in (("cat", cat), ("static", static())):
        _write(detector, OUT / f"{name}.png", pixels)
    samples = (
        ("cat", "the model's idea of a cat", cat),
        ("horse", "the model's idea of a horse", dreamt(detector, HORSE)),
        ("ship", "the model's idea of a ship", dreamt(detector, SHIP)),
        ("patched", "a cat, half covered by static", with_static(cat, 22)),
        ("static", "static", static()),
        ("stripes", "stripes", stripes()),
        ("drawn-ship", "a drawn ship", np.asarray(drawn.ship())),
        ("drawn-airplane", "a drawn airplane", np.asarray(drawn.airplane())),
        ("smiley", "a smiley", np.asarray(drawn.smiley())),
    )
    SAMPLES.mkdir(exist_ok=True)
    for name, _, pixels in samples:
        _write(detector, SAMPLES / f"{name}.png", pixels)
    listed = [{"file": f"{name}.png", "text": text} for name, text, _ in samples]
    (SAMPLES / "samples.json").write_text(json.dumps(listed, indent=1) + "\n")


def _write(detector: Detector, path: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(path)
    verdict = detector.verdicts([path.read_bytes()])[0]
    sys.stdout.write(f"{path}: {verdict.decision}, {verdict.prediction.label}, p = {verdict.ood.p_value:.4f}\n")


if __name__ == "__main__":
    main()
