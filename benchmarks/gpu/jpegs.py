# SPDX-License-Identifier: Apache-2.0
"""JPEG files a second to the network's pixels: by Pillow, and by nvJPEG where there is a CUDA device."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.measures import agreement
from benchmarks.scaling.stages import photo
from detector import Detector, artifact as artifacts
from detector.images import JpegDecoder, Pixels, Preprocessing, decode
from detector.nvjpeg import NvJpeg

PHOTOS = 64
PREPROCESSING = Preprocessing(resize=256, crop=(224, 224))


def files_per_second(device: torch.device, seconds: float) -> dict[str, float]:
    """Of photos of 500 x 375 pixels, by one thread and by as many as there are cores."""
    files = [photo(seed) for seed in range(PHOTOS)]
    decoders: dict[str, JpegDecoder | None] = {"pillow": None}
    if device.type == "cuda":
        decoders["nvjpeg"] = NvJpeg(device)
    found = {}
    for name, jpegs in decoders.items():
        read = partial(decode, preprocessing=PREPROCESSING, jpegs=jpegs)
        for title, threads in (("one_thread", 1), ("all_cores", os.cpu_count() or 1)):
            with ThreadPoolExecutor(threads) as pool:
                found[f"{name}_{title}"] = PHOTOS * _rounds(partial(_all, pool, read, files), seconds)
    return found


def _all(pool: ThreadPoolExecutor, read: Callable[[bytes], Pixels], files: Sequence[bytes]) -> list[Pixels]:
    return list(pool.map(read, files))


def _rounds(work: Callable[[], Any], seconds: float) -> float:
    work()
    rounds, started = 0, time.perf_counter()
    while not rounds or time.perf_counter() - started < seconds:
        work()
        rounds += 1
    return rounds / (time.perf_counter() - started)


def golden(model: Path, jpegs: JpegDecoder) -> dict[str, Any]:
    """Whether golden images, saved as JPEG, get the labels and decisions by one decoder that they get by Pillow."""
    artifact = artifacts.load(model)
    detector = Detector.from_artifact(artifact, torch.device("cpu"), "fp32")
    files = [_jpeg(image) for image in artifact.golden["images"].numpy()]
    preprocessing = artifact.manifest.preprocessing
    mine, pillows = (np.stack([decode(data, preprocessing, jpegs=each) for data in files]) for each in (jpegs, None))
    agreed = agreement(detector.verdicts(mine), detector.verdicts(pillows))
    return agreed | {
        "largest_grey_level_difference": int(np.abs(mine.astype(int) - pillows.astype(int)).max()),
    }


def _jpeg(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
