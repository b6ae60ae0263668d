# SPDX-License-Identifier: Apache-2.0
"""Which heat map points at an odd object?

A patch of a quarter of the area is pasted into accepted images, and the maps of those that are then deferred compared.
Pointing is the chance that a pixel of the patch is hotter than one beside it, hits the share of images whose hottest
pixel lies in the patch. By chance they are 0.5 and 0.25 in the corners; a patch in the middle favours any map that is
hot there, which is why one that is always hot in the centre stands beside the others.

The map is chosen on one half of the images and patches, by its pointing in the place where it points worst, and all are
reported on the other half.

python -m benchmarks.heat
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.datasets import load
from detector import Detector
from detector.explain import elsewhere, occlusion
from detector.images import Pixels
from detector.outputs import Outputs
from detector.scores import score_all

OUT = Path("benchmarks/results/heat.json")
MODEL = Path("models/cifar10/1")
SIDE, CANDIDATES, IMAGES = 16, 400, 24  # of the patch; images tried of each half, and deferred ones measured
HALVES = ("choice", "report")
KINDS = ("noise", "textures", "svhn-test")
PLACES = {
    "corner": ((0, 0), (0, 16), (16, 0), (16, 16)),
    "edge": ((0, 8), (8, 0), (8, 16), (16, 8)),
    "middle": ((8, 8),),
}
LAYERS = ("layer1", "layer2", "layer3", "layer4")
Heat = NDArray[np.float64]


def patches(kind: str, half: int, count: int, generator: np.random.Generator) -> Pixels:
    """uint8 [N, 16, 16, 3], cut from images of one half."""
    if kind == "noise":
        return generator.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    images = load(kind)[0][half :: len(HALVES)]
    return images[generator.choice(len(images), count), 8:24, 8:24]


def gradients(detector: Detector, images: Pixels) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Input and its gradient [N, 3, H, W], and by layer the activations and their gradient, of the deciding score."""
    backbone = detector.backbone
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (backbone.preprocessing.mean, backbone.preprocessing.std))
    x = ((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std).requires_grad_()
    taps: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            taps[layer] = output
            return output.clone()

        return hook

    network = backbone.module
    handles = [network.get_submodule(layer).register_forward_hook(keep(layer)) for layer in LAYERS]
    head = network.get_submodule(backbone.head)
    handles.append(head.register_forward_pre_hook(lambda module, inputs: taps.update(features=inputs[0])))
    network(x)
    for handle in handles:
        handle.remove()
    features = taps["features"]
    outputs = Outputs(
        torch.addmm(backbone.bias, features, backbone.weight.T), features, inputs=torch.from_numpy(images)
    )
    name = detector.manifest.policy.score_name
    score = score_all(detector.fitted, [name], outputs)[name]
    own, *others = torch.autograd.grad(score.sum(), [x, *(taps[layer] for layer in LAYERS)])
    layers = {layer: (taps[layer].detach(), other) for layer, other in zip(LAYERS, others, strict=True)}
    return x.detach(), own, layers


def maps(detector: Detector, images: Pixels) -> dict[str, Heat]:
    """Every heat map, float64 [N, H, W], by its name."""
    x, own, layers = gradients(detector, images)
    name = detector.manifest.policy.score_name
    mean = [np.broadcast_to(image.mean(axis=(0, 1)).round(), image.shape).astype(np.uint8) for image in images]
    found = {
        "occlusion by the rest of the image": _occlusion(detector, images, list(map(elsewhere, images)), name),
        "occlusion by the mirrored image": _occlusion(detector, images, [[image[:, ::-1]] for image in images], name),
        "occlusion by the mean colour": _occlusion(detector, images, [[colour] for colour in mean], name),
        "input gradient": _smooth(own.abs().sum(1)),
        "input gradient x input": _smooth((own * x).sum(1)),
    }
    for layer, (activations, gradient) in layers.items():
        weights = gradient.mean((2, 3), keepdim=True)
        found[f"Grad-CAM, {layer}"] = _enlarged(torch.relu((weights * activations).sum(1)), images.shape[1])
        found[f"gradient, {layer}"] = _enlarged(torch.linalg.vector_norm(gradient, dim=1), images.shape[1])
    rows = torch.arange(images.shape[1]) - (images.shape[1] - 1) / 2
    found["centre of the image"] = -(rows[:, None].square() + rows.square()).expand(len(images), -1, -1)
    return {name: heat.double().numpy() for name, heat in found.items()}


def _occlusion(detector: Detector, images: Pixels, fills: Sequence[Sequence[Pixels]], name: str) -> Tensor:
    heats = [occlusion(detector, image, own, name)[0] for image, own in zip(images, fills, strict=True)]
    return torch.from_numpy(np.stack(heats))


def _smooth(heat: Tensor) -> Tensor:
    offsets = torch.arange(-4, 5)
    kernel = torch.softmax(-offsets.square() / 8, dim=0)
    wide = torch.nn.functional.pad(heat[:, None], (4, 4, 4, 4), mode="reflect")
    return torch.nn.functional.conv2d(wide, (kernel[:, None] * kernel)[None, None])[:, 0]


def _enlarged(heat: Tensor, side: int) -> Tensor:
    return interpolate(heat[:, None], size=side, mode="bilinear", align_corners=False)[:, 0]


def measured(heat: Heat, where: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    """Pointing and hits of each image [N, H, W]."""
    pointing, hits = [], []
    for one, mask in zip(heat, where, strict=True):
        inside, outside = one[mask][:, None], one[~mask]
        pointing.append(float(np.mean(inside > outside) + np.mean(inside == outside) / 2))
        hits.append(float(mask.flat[one.argmax()]))
    return pointing, hits


def main() -> None:
    detector = Detector.load(MODEL, device="cpu", precision="fp32")
    counts, found = {}, {}
    for half, name in enumerate(HALVES):
        counts[name], found[name] = compared(detector, half)
    chosen = chosen_of(found["choice"])
    record = {"images": counts, "model": detector.manifest.model_digest, "chosen": chosen, **found}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"chosen: {chosen}\n{table(found['report'])}\n")


def compared(detector: Detector, half: int) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """On one half: the number of images by place, and by map and place its pointing and hits."""
    generator = np.random.default_rng(half)
    images = load("cifar10-test")[0][half * CANDIDATES : (half + 1) * CANDIDATES]
    images = images[_accepted(detector, images)]
    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for place, corners in PLACES.items():
        parts = [_deferred(detector, images, kind, half, corners, generator) for kind in KINDS]
        patched, where = (np.concatenate(part) for part in zip(*parts, strict=True))
        counts[place] = len(patched)
        for name, heat in maps(detector, patched).items():
            pointing, hits = measured(heat, where)
            row = {"pointing": round(float(np.mean(pointing)), 3), "hits": round(float(np.mean(hits)), 3)}
            found.setdefault(name, {})[place] = row
    return counts, found


def chosen_of(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The map that points best in the place where it points worst: wherever the object is, it is to be found."""
    return max(found, key=lambda name: min(row["pointing"] for row in found[name].values()))


def _deferred(
    detector: Detector,
    images: Pixels,
    kind: str,
    half: int,
    corners: Sequence[tuple[int, int]],
    generator: np.random.Generator,
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Images that are deferred once a patch is in them, and where it is."""
    patched, where = images.copy(), np.zeros(images.shape[:3], dtype=bool)
    for image, patch, mask in zip(patched, patches(kind, half, len(images), generator), where, strict=True):
        y, x = corners[int(generator.integers(len(corners)))]
        image[y : y + SIDE, x : x + SIDE] = patch
        mask[y : y + SIDE, x : x + SIDE] = True
    chosen = np.flatnonzero(~_accepted(detector, patched))[:IMAGES]
    return patched[chosen], where[chosen]


def _accepted(detector: Detector, images: Pixels) -> NDArray[np.bool_]:
    return np.array([verdict.decision == "accept" for verdict in detector.verdicts(images)])


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Pointing / hits as a Markdown table, the best in the corners first."""
    lines = [f"| map | {' | '.join(PLACES)} |", f"|---{'|---:' * len(PLACES)}|"]
    for name in sorted(found, key=lambda name: -found[name]["corner"]["pointing"]):
        cells = [f"{row['pointing']:.2f} / {row['hits']:.2f}" for row in found[name].values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
