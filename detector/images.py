# SPDX-License-Identifier: Apache-2.0
"""Bytes of one image -> uint8 RGB pixels of the network's input size. Fit and serve both decode here.

The header is read first; byte, format and pixel limits are settled before any pixel is decoded.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from pydantic import BaseModel, ConfigDict, Field

from detector.errors import TooManyBytes, TooManyPixels, UndecodableImage, UnsupportedImageFormat

Pixels = NDArray[np.uint8]  # [H, W, 3]; batches [N, H, W, 3]
JpegDecoder = Callable[[bytes], Pixels | None]  # the whole file in RGB, as it lies; None leaves it to Pillow

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DEFAULT_MAX_BYTES = 20 * 2**20
DEFAULT_MAX_PIXELS = 25_000_000  # a 24-megapixel camera fits; decoded it takes 75 MB

_FORMATS = {plugin.format: plugin for plugin in (JpegImagePlugin.JpegImageFile, PngImagePlugin.PngImageFile)} | {
    WebPImagePlugin.WebPImageFile.format: WebPImagePlugin.WebPImageFile
}
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_FOREIGN_MAGIC = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"%PDF", "PDF"),
    (b"SIMPLE  =", "FITS"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
)
# What Pillow's three decoders raise on damaged bytes, established by fuzzing them.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
_ORIENTATION = 0x0112
# What `is_small` lets through, so that no file, however hostile, takes much over two milliseconds: 64 KiB of empty
# deflate blocks alone take six.
SMALL_BYTES = 8 * 2**10
SMALL_SIDE = 128  # pixels, of the file and of the network's input
_SMALL_PARTS, _SMALL_HEADER = 16, 1024  # chunks or segments in a file, and bytes of one that holds no pixels
# Chunks that Pillow does not inflate. No second IHDR, which would announce another size.
_PLAIN_CHUNKS = frozenset(b"PLTE tRNS gAMA cHRM sRGB pHYs sBIT bKGD tIME tEXt eXIf".split())
_PLAIN_SEGMENTS = frozenset((0xFFC0, 0xFFC4, 0xFFDB, 0xFFDD, 0xFFE0, 0xFFE1, 0xFFEE, 0xFFFE))
_BASELINE, _SCAN = 0xFFC0, 0xFFDA
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Args:
        max_bytes: length of the encoded file.
        max_pixels: width x height as the header announces them.
    """

    max_bytes: int = DEFAULT_MAX_BYTES
    max_pixels: int = DEFAULT_MAX_PIXELS


class Preprocessing(BaseModel):
    """How an image becomes the network's input; it travels with the artifact.

    Args:
        resize: length in pixels that the shorter side is resized to; the aspect ratio is kept.
        crop: (height, width) in pixels of the centre crop, the network's input.
        interpolation: resampling filter, antialiased when the image shrinks.
        mean, std: per channel, for pixels scaled to 0-1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int = Field(ge=1)
    crop: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


def decode(
    data: bytes, preprocessing: Preprocessing, limits: Limits | None = None, jpegs: JpegDecoder | None = None
) -> Pixels:
    """Decode one encoded image to the network's input.

    JPEG, PNG and WebP; EXIF orientation applied; the first frame of an animation; transparency dropped.
    Large JPEGs are decoded at 1/2, 1/4 or 1/8 scale where that leaves at least twice the size asked for.

    Args:
        data: the file.
        preprocessing: sizes and filter.
        limits: byte and pixel limits; `Limits()` where not given.
        jpegs: decodes grey and colour JPEGs instead of Pillow; see `detector.nvjpeg`.

    Returns:
        uint8 [crop height, crop width, 3], RGB.

    Raises:
        TooManyBytes, TooManyPixels, UnsupportedImageFormat, UndecodableImage
    """
    image = _open(data, limits or Limits())
    try:
        orientation = _orientation(image)
        if jpegs is not None and image.format == "JPEG" and image.mode in ("L", "RGB"):
            pixels = jpegs(data)
            if pixels is not None and pixels.shape == (image.height, image.width, 3):
                return resize(_upright(Image.fromarray(pixels), orientation), preprocessing)
        image.draft("RGB", (2 * preprocessing.resize, 2 * preprocessing.resize))
        image.decodermaxblock = len(data)  # in one go: each block that Pillow feeds its decoder waits for the GIL again
        return resize(_upright(_as_rgb(image), orientation), preprocessing)
    except _DECODER_ERRORS as error:
        raise UndecodableImage(f"the {image.format} image is truncated or damaged: {error}") from error


def is_small(data: bytes, preprocessing: Preprocessing) -> bool:
    """Whether `decode` is sure to be so quick that handing the image to another thread would cost more.

    Read from the outline of the file in microseconds. True for PNG and one-scan baseline JPEG of at most `SMALL_BYTES`,
    with few and short headers, where file and network input are at most `SMALL_SIDE` pixels a side. It promises nothing
    but speed: `decode` may refuse the file.

    Args:
        data: the file.
        preprocessing: sizes and filter.
    """
    if len(data) > SMALL_BYTES or max(preprocessing.crop) > SMALL_SIDE:
        return False
    try:
        return _is_small_png(data) if data.startswith(_PNG_START) else _is_small_jpeg(data)
    except struct.error:
        return False  # it ends within a header


def resize(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Resize the shorter side and cut the centre of an RGB image in one step.

    Returns:
        uint8 [crop height, crop width, 3].
    """
    width, height = image.size
    crop_height, crop_width = preprocessing.crop
    scale = min(width, height) / preprocessing.resize  # source pixels per output pixel
    # The crop is at most the resized image; a larger one is stretched, which the manifest's author asked for.
    span_x, span_y = min(width, crop_width * scale), min(height, crop_height * scale)
    left, top = (width - span_x) / 2, (height - span_y) / 2
    if (span_x, span_y) == (crop_width, crop_height) == (width, height):
        return np.array(image)
    box = (left, top, left + span_x, top + span_y)
    return np.array(image.resize((crop_width, crop_height), _INTERPOLATIONS[preprocessing.interpolation], box=box))


def image_ids(images: Pixels) -> NDArray[np.int64]:
    """The identity of each image: the first 8 bytes of the SHA-256 of its pixels.

    Args:
        images: uint8 [N, H, W, 3], as the network sees them.

    Returns:
        int64 [N], big-endian, signed.
    """
    digests = (hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images)
    return np.fromiter((int.from_bytes(digest[:8], "big", signed=True) for digest in digests), np.int64, len(images))


def _open(data: bytes, limits: Limits) -> ImageFile.ImageFile:
    if not data:
        raise UndecodableImage("the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise TooManyBytes(len(data), limits.max_bytes)
    # Pillow reads a PNG up to its first pixels, and raises an error of its own at a huge WebP.
    announced = _announced(data)
    if announced is not None:
        _check_size(*announced, limits)
    image = _read_header(data)
    _check_size(*image.size, limits)
    return image


def _announced(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG or WebP, from their fixed place in the header."""
    if data.startswith(_PNG_START) and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not (data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30):
        return None
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        sides = int.from_bytes(data[21:25], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise TooManyPixels(width, height, limits.max_pixels)


def _read_header(data: bytes) -> ImageFile.ImageFile:
    # Pillow's own `open` would warn or raise on large headers with a limit of its own, and tell no value.
    for name in _FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(data[:16]):
            try:
                return factory(io.BytesIO(data), "")
            except _DECODER_ERRORS as error:
                raise UndecodableImage(f"the header of the {name} image cannot be read: {error}") from error
    for magic, name in _FOREIGN_MAGIC:
        if data.startswith(magic):
            raise UnsupportedImageFormat(f"{name} is not supported; send JPEG, PNG or WebP")
    raise UndecodableImage("the bytes are not a JPEG, PNG or WebP image")


def _is_small_png(data: bytes) -> bool:
    sides: tuple[int, ...] = struct.unpack_from(">II", data, 16)
    at = len(_PNG_START) + 17  # behind IHDR
    for _ in range(_SMALL_PARTS):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND":
            return max(sides) <= SMALL_SIDE
        if name != b"IDAT" and (name not in _PLAIN_CHUNKS or length > _SMALL_HEADER):
            return False
        at += 12 + length
    return False


def _is_small_jpeg(data: bytes) -> bool:
    if not data.startswith(b"\xff\xd8"):
        return False
    at = 2
    sides: tuple[int, ...] = ()
    for _ in range(_SMALL_PARTS):
        marker, length = struct.unpack_from(">HH", data, at)
        if marker == _SCAN:  # a file of many scans is decoded over and over
            return len(sides) == 2 and max(sides) <= SMALL_SIDE and data.find(b"\xff\xda", at + 2) < 0
        if marker not in _PLAIN_SEGMENTS or length > _SMALL_HEADER:
            return False
        if marker == _BASELINE:
            sides += struct.unpack_from(">HH", data, at + 5)
        at += 2 + length
    return False


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DECODER_ERRORS:
        return 1  # a damaged EXIF block costs the orientation, as in browsers, not the image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy what is RGB already


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    transpose = _TRANSPOSE.get(orientation)
    return image if transpose is None else image.transpose(transpose)
