# SPDX-License-Identifier: Apache-2.0
"""Decoding on a device, with a stand-in for nvJPEG: what it gets, what it gives, and what is left to Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from detector.errors import BackboneError, TooManyPixels, UndecodableImage
from detector.images import Limits, Pixels, Preprocessing, decode, resize
from detector.nvjpeg import NvJpeg
from tests.helpers import encoded, photo

CPU = torch.device("cpu")
WHOLE = Preprocessing(resize=96, crop=(96, 128))  # of `photo(128, 96)`: nothing is resized
LARGE = Preprocessing(resize=64, crop=(64, 64))


class StandIn:
    """torchvision's decoder on the CPU, counting what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, data: Tensor) -> Tensor:
        self.asked += 1
        pixels: Tensor = decode_jpeg(data, mode=ImageReadMode.RGB)
        return pixels


def refusing(data: Tensor) -> Tensor:
    raise RuntimeError("nvjpegDecode failed: 5")


def black(data: Tensor) -> Tensor:
    return torch.zeros(3, 96, 128, dtype=torch.uint8)


def grey_levels_apart(first: Pixels, second: Pixels) -> float:
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_pixels_come_from_the_device_and_are_those_of_pillow_but_for_a_grey_level(options: dict[str, object]) -> None:
    data, stand_in = encoded(photo(400, 300), "JPEG", quality=90, **options), StandIn()
    found = decode(data, LARGE, jpegs=NvJpeg(CPU, stand_in))
    assert stand_in.asked == 1
    assert found.shape == (64, 64, 3)
    assert grey_levels_apart(found, decode(data, LARGE)) < 1


def test_what_the_device_decodes_is_what_is_judged() -> None:
    assert not decode(encoded(photo(128, 96), "JPEG"), WHOLE, jpegs=NvJpeg(CPU, black)).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(photo(128, 96)).save(buffer, "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")
    found = decode(buffer.getvalue(), LARGE, jpegs=NvJpeg(CPU, StandIn()))
    assert grey_levels_apart(found, resize(upright, LARGE)) < 1


def test_what_the_device_refuses_is_decoded_by_pillow() -> None:
    data = encoded(photo(400, 300), "JPEG")
    assert np.array_equal(decode(data, LARGE, jpegs=NvJpeg(CPU, refusing)), decode(data, LARGE))


def test_pixels_of_another_size_than_the_header_says_are_not_believed() -> None:
    data = encoded(photo(400, 300), "JPEG")
    assert np.array_equal(decode(data, LARGE, jpegs=NvJpeg(CPU, black)), decode(data, LARGE))


def test_grey_images_become_rgb() -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo(128, 96)).convert("L").save(buffer, "JPEG")
    stand_in = StandIn()
    found = decode(buffer.getvalue(), WHOLE, jpegs=NvJpeg(CPU, stand_in))
    assert stand_in.asked == 1
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize(("mode", "image_format"), [("CMYK", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP")])
def test_other_colours_and_formats_never_reach_the_device(mode: str, image_format: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo(128, 96)).convert(mode).save(buffer, image_format)
    stand_in = StandIn()
    found = decode(buffer.getvalue(), LARGE, jpegs=NvJpeg(CPU, stand_in))
    assert stand_in.asked == 0
    assert np.array_equal(found, decode(buffer.getvalue(), LARGE))


def test_a_truncated_jpeg_is_refused_by_pillow_and_not_filled_up_on_the_device() -> None:
    data, stand_in = encoded(photo(400, 300), "JPEG"), StandIn()
    with pytest.raises(UndecodableImage, match="truncated"):
        decode(data[: len(data) // 2], LARGE, jpegs=NvJpeg(CPU, stand_in))
    assert stand_in.asked == 0


def test_limits_hold_before_the_device_is_asked() -> None:
    stand_in = StandIn()
    with pytest.raises(TooManyPixels):
        decode(encoded(photo(400, 300), "JPEG"), LARGE, Limits(max_pixels=1_000), NvJpeg(CPU, stand_in))
    assert stand_in.asked == 0


def test_without_a_cuda_device_the_refusal_says_what_to_set() -> None:
    with pytest.raises(BackboneError, match="OODGATE_JPEG=pillow"):
        NvJpeg(CPU)
