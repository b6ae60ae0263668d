# SPDX-License-Identifier: Apache-2.0
"""The same 32-pixel images under other imaging: JPEG, blur, brightness, downscaling."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from benchmarks.datasets import Images


def shifted(images: Images) -> dict[str, Images]:
    """Each change applied to uint8 images [N, 32, 32, 3], by its name."""
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "JPEG quality 50": lambda image: _jpeg(image, 50),
        "JPEG quality 10": lambda image: _jpeg(image, 10),
        "blur, radius 0.7": lambda image: image.filter(ImageFilter.GaussianBlur(0.7)),
        "brightness 0.6": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
        "brightness 1.5": lambda image: ImageEnhance.Brightness(image).enhance(1.5),
        "24 pixels and back": lambda image: _rescaled(image, 24),
    }
    return {name: np.stack([_changed(image, change) for image in images]) for name, change in changes.items()}


def _changed(pixels: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    return np.asarray(change(Image.fromarray(pixels)), dtype=np.uint8)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def _rescaled(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
