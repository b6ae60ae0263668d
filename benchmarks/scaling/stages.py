# SPDX-License-Identifier: Apache-2.0
"""What each stage of a fit costs an image, and what it leaves behind: ResNet-50 at 224 pixels, 1,000 classes.

    python -m benchmarks.scaling.stages

Core seconds, not the clock: they hardly change where the machine has other work. Photos are made, weights are random:
neither changes the cost. Writes benchmarks/scaling/results/stages.json.
"""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import resnet50

from detector.backbone import Backbone
from detector.features import share_gatherers
from detector.images import Preprocessing, decode, image_ids
from detector.outputs import BATCH, Outputs
from detector.scores import FitOptions, Gatherer, registry
from detector.scores.gather import EarlyMaps

RESULT = Path("benchmarks/scaling/results/stages.json")
PREPROCESSING = Preprocessing(resize=256, crop=(224, 224))
CLASSES = 1_000
PHOTOS, BATCHES = 256, 4
NAMES = ("grood", "mds", "vim", "knn", "nci")


def main() -> None:
    torch.manual_seed(0)
    photos = [photo(seed) for seed in range(PHOTOS)]
    images: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    decoding = core_seconds(lambda: images.extend(decode(each, PREPROCESSING) for each in photos)) / PHOTOS
    backbone = Backbone(resnet50(num_classes=CLASSES), PREPROCESSING)
    batch = torch.from_numpy(np.stack(images[:BATCH]))
    ids = torch.from_numpy(image_ids(batch.numpy()))
    backbone.outputs(batch)  # the first pass is not like the others
    passed: list[Outputs] = []
    forward = core_seconds(lambda: passed.extend(backbone.outputs(batch).with_ids(ids) for _ in range(BATCHES)))
    labels = torch.arange(BATCH) * (CLASSES // BATCH)
    # The mix-up's sums over the early layer are as large as the network says, whatever the images: not made here.
    kinds = share_gatherers(registry()[name](FitOptions(num_classes=CLASSES)) for name in NAMES)
    kept = {name: kind for name, kind in kinds.items() if not isinstance(kind, EarlyMaps)}
    gathering = core_seconds(lambda: gather(kept, passed, labels))
    early = backbone.outputs(batch[:2], early=True).early
    assert early is not None
    result = {
        "network": "resnet50, 224 x 224, 1,000 classes, random weights",
        "photo": {"pixels": "500 x 375", "mean_bytes": round(float(np.mean([len(each) for each in photos])))},
        "scores": NAMES,
        "core_seconds_per_image": {
            "decode": decoding,
            "extract": forward / (BATCHES * BATCH),
            "gather": gathering / (BATCHES * BATCH),
        },
        "images_per_core_second": {
            "decode": 1 / decoding,
            "extract": BATCHES * BATCH / forward,
            "gather": BATCHES * BATCH / gathering,
        },
        "bytes": {
            "decoded_image": images[0].nbytes,
            "early_map_of_one_image": early[0].numel() * 4,
            "class_sums_of_the_early_layer": CLASSES * early[0].numel() * 8,
            "bank_of_10000_features": 10_000 * backbone.weight.shape[1] * 4,
            **{f"gathered_{name}": size_of(kind) for name, kind in kept.items()},
        },
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "processor": platform.processor()},
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow", "numpy")}
        | {"python": platform.python_version()},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def core_seconds(work: Callable[[], object]) -> float:
    """Seconds of all cores together that this process spends on some work."""
    before = time.process_time()
    work()
    return time.process_time() - before


def photo(seed: int) -> bytes:
    """A JPEG of the size that ImageNet's have on average, with the noise of a sensor."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.float32)
    noisy = np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=95)
    return file.getvalue()


def gather(kinds: dict[str, Gatherer], passed: list[Outputs], labels: torch.Tensor) -> None:
    for outputs in passed:
        for kind in kinds.values():
            kind.add(outputs, labels)


def size_of(kind: Gatherer) -> int:
    return sum(value.nbytes for value in kind.progress().values())


if __name__ == "__main__":
    main()
