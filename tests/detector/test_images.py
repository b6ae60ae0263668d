# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import struct
import zlib
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps, JpegImagePlugin

from benchmarks.serving.workloads import squares
from detector.errors import ImageError, TooManyBytes, TooManyPixels, UndecodableImage, UnsupportedImageFormat
from detector.images import SMALL_BYTES, Limits, Pixels, Preprocessing, decode, image_ids, is_small, resize
from tests.helpers import HUGE_PNG, encoded, photo

SMALL = Preprocessing(resize=32, crop=(32, 32))
LARGE = Preprocessing(resize=256, crop=(224, 224))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_a_lossless_image_of_the_input_size_keeps_its_pixels(image_format: str) -> None:
    pixels = photo(32, 32)
    assert np.array_equal(decode(encoded(pixels, image_format, lossless=True), SMALL), pixels)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (33, 4000), (1, 1)])
def test_any_size_becomes_the_input_size(image_format: str, size: tuple[int, int]) -> None:
    assert decode(encoded(photo(*size), image_format), LARGE).shape == (224, 224, 3)


def test_the_crop_is_the_centre_of_the_resized_image() -> None:
    pixels = photo(300, 200)
    whole = Image.fromarray(pixels).resize((384, 256), Image.Resampling.BILINEAR)
    centre = np.asarray(whole.crop((80, 16, 304, 240))).astype(int)
    assert np.abs(resize(Image.fromarray(pixels), LARGE).astype(int) - centre).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.fromarray(photo(64, 64))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode(buffer.getvalue(), SMALL), resize(upright, SMALL))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_costs_the_orientation_not_the_image() -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo(32, 32)).save(buffer, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode(buffer.getvalue(), SMALL).shape == (32, 32, 3)


def test_only_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.fromarray(photo(32, 32, seed)) for seed in (1, 2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(decode(buffer.getvalue(), SMALL), np.asarray(frames[0]))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo(32, 32)).convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    assert decode(buffer.getvalue(), SMALL).shape == (32, 32, 3)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    grey = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue(), SMALL)[..., 0], (grey >> 8).astype(np.uint8))


def test_a_large_jpeg_is_close_to_its_full_decode() -> None:
    data = encoded(photo(3000, 2000), "JPEG", quality=95)
    full = resize(Image.open(io.BytesIO(data)).convert("RGB"), LARGE).astype(int)
    assert np.abs(decode(data, LARGE).astype(int) - full).mean() < 2


def plainly(data: bytes, preprocessing: Preprocessing) -> Pixels | None:
    """A JPEG as Pillow reads it when left alone, fed 64 KiB at a time; None where it refuses."""
    try:
        image: Image.Image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        image.draft("RGB", (2 * preprocessing.resize, 2 * preprocessing.resize))
        return resize(ImageOps.exif_transpose(image.convert("RGB")), preprocessing)
    except (OSError, SyntaxError, ValueError):
        return None


def noisy_jpeg(width: int, height: int, seed: int = 0, mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 20, (height, width, 1))
    pixels = np.clip(photo(width, height, seed) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(801, 603), (1027, 1301)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0), ("CMYK", 0)])
def test_a_jpeg_fed_whole_has_the_pixels_of_one_fed_in_blocks(
    mode: str, subsampling: int, progressive: bool, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = noisy_jpeg(*size, mode=mode, subsampling=subsampling, progressive=progressive, exif=exif)
    assert len(data) > 2**16
    expected = plainly(data, LARGE)
    assert expected is not None
    assert np.array_equal(decode(data, LARGE), expected)


def test_a_large_jpeg_reaches_its_decoder_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            block = super().read(size)
            reads.append(len(block))
            return block

    data = noisy_jpeg(1200, 900)
    monkeypatch.setattr("detector.images.io", SimpleNamespace(BytesIO=Watched))
    decode(data, LARGE)
    assert [size for size in reads if size > 2**15] == [len(data)]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_ends_as_it_does_in_pillow_left_alone(progressive: bool) -> None:
    generator = np.random.default_rng(5)
    whole = noisy_jpeg(600, 450, quality=90, progressive=progressive)
    outcomes = set()
    for _ in range(60):
        data = bytearray(whole[: generator.integers(2**16, len(whole) + 2**15)])
        for place in generator.integers(0, len(data), generator.integers(0, 3)):
            data[place] = generator.integers(256)
        expected = plainly(bytes(data), LARGE)
        outcomes.add(expected is None)
        try:
            found = decode(bytes(data), LARGE)
        except UndecodableImage:
            assert expected is None
        else:
            assert expected is not None
            assert np.array_equal(found, expected)
    assert outcomes == {True, False}


def test_too_many_bytes_are_refused_with_both_numbers() -> None:
    with pytest.raises(TooManyBytes, match=r"1,001 bytes; the limit is 1,000"):
        decode(b"\xff" * 1001, SMALL, Limits(max_bytes=1000))


def test_a_huge_header_is_refused_with_its_size_before_any_pixel_is_decoded() -> None:
    with pytest.raises(TooManyPixels, match=r"60000 x 60000 = 3,600,000,000 pixels; the limit is 25,000,000"):
        decode(HUGE_PNG, SMALL)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}])
def test_a_webp_over_the_pixel_limit_is_refused_with_its_size(options: dict[str, object]) -> None:
    with pytest.raises(TooManyPixels, match="64 x 48"):
        decode(encoded(photo(64, 48), "WEBP", **options), SMALL, Limits(max_pixels=64 * 48 - 1))


def test_a_webp_that_announces_more_than_the_library_would_open_is_refused_with_its_size() -> None:
    data = bytearray(encoded(photo(64, 48), "WEBP"))
    data[26:30] = (16_000).to_bytes(2, "little") * 2
    with pytest.raises(TooManyPixels, match="16000 x 16000"):
        decode(bytes(data), SMALL)
    with pytest.raises(UndecodableImage):
        decode(bytes(data), SMALL, Limits(max_pixels=10**9))


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF"])
def test_a_foreign_format_is_named(image_format: str) -> None:
    with pytest.raises(UnsupportedImageFormat, match=image_format):
        decode(encoded(photo(8, 8), image_format), SMALL)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(UndecodableImage):
        decode(data, SMALL)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_refused(image_format: str) -> None:
    data = encoded(photo(200, 200), image_format)
    with pytest.raises(UndecodableImage, match=r"truncated or damaged|header"):
        decode(data[: len(data) // 2], SMALL)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_damage_anywhere_gives_an_image_or_a_named_error(
    image_format: str, damage: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(encoded(photo(48, 40), image_format))
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        pixels = decode(bytes(data[: 1 + int(keep * len(data))]), SMALL, Limits(max_pixels=1_000_000))
    except ImageError:
        return
    assert pixels.shape == (32, 32, 3)


def test_equal_pixels_have_equal_ids_and_different_ones_do_not() -> None:
    images = np.stack([photo(32, 32, 1), photo(32, 32, 2), photo(32, 32, 1)])
    ids = image_ids(images)
    assert ids.dtype == np.int64
    assert ids[0] == ids[2] != ids[1]


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunks(*chunks: bytes, side: int = 32) -> bytes:
    """A PNG with more chunks behind its header."""
    data = encoded(photo(side, side))
    return data[:33] + b"".join(chunks) + data[33:]


def with_segments(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with more segments behind its start."""
    data = encoded(photo(32, 32), "JPEG")
    return data[:2] + b"".join(struct.pack(">HH", mark, len(body) + 2) + body for mark, body in segments) + data[2:]


SMALL_FILES = {
    "a PNG": encoded(photo(32, 32)),
    "a PNG of 128 pixels a side": encoded(photo(128, 128) // 128 * 128),
    "a PNG with a comment": with_chunks(chunk(b"tEXt", b"Software\0any"), chunk(b"pHYs", bytes(9))),
    "a JPEG": encoded(photo(128, 128), "JPEG"),
    "a grey JPEG": noisy_jpeg(64, 64, mode="L"),
    "a JPEG with a comment": with_segments((0xFFFE, b"any")),
}
OTHER_FILES = {
    "nothing": b"",
    "a WebP": encoded(photo(32, 32), "WEBP"),
    "a PNG with a side of 129": encoded(photo(129, 1)),
    "a JPEG with a side of 129": encoded(photo(1, 129), "JPEG"),
    "a PNG of too many bytes": encoded(photo(32, 32)) + bytes(SMALL_BYTES),
    "a PNG with two headers": with_chunks(chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0))),
    "a PNG with compressed text": with_chunks(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))),
    "a PNG with a compressed profile": with_chunks(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**6)))),
    "a PNG with long text": with_chunks(chunk(b"tEXt", bytes(1025))),
    "a PNG of many chunks": with_chunks(*[chunk(b"tEXt", b"k\0")] * 16),
    "a PNG cut in its header": encoded(photo(32, 32))[:30],
    "a PNG without an end": encoded(photo(32, 32))[:-12],
    "a progressive JPEG": encoded(photo(32, 32), "JPEG", progressive=True),
    "a JPEG of two scans": encoded(photo(32, 32), "JPEG")[:-2] + b"\xff\xda\xff\xd9",
    "a JPEG with two headers": with_segments((0xFFC0, struct.pack(">BHHB", 8, 5000, 5000, 1) + b"\x01\x11\x00")),
    "a JPEG that announces no size": b"\xff\xd8\xff\xda\x00\x08" + bytes(8),
    "a JPEG with a long comment": with_segments((0xFFFE, bytes(1025))),
    "a JPEG of many segments": with_segments(*[(0xFFFE, b"")] * 16),
    "a JPEG cut in its header": encoded(photo(32, 32), "JPEG")[:300],
}


@pytest.mark.parametrize("data", SMALL_FILES.values(), ids=SMALL_FILES)
def test_a_plain_small_file_is_small(data: bytes) -> None:
    assert is_small(data, SMALL)
    assert decode(data, SMALL).shape == (32, 32, 3)


@pytest.mark.parametrize("data", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_could_take_long_is_not_small(data: bytes) -> None:
    assert not is_small(data, SMALL)


def test_nothing_is_small_to_a_network_with_a_large_input() -> None:
    assert not is_small(encoded(photo(32, 32)), LARGE)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SMALL_FILES)), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)))
)
def test_a_damaged_file_called_small_announces_few_pixels(name: str, damage: list[tuple[float, int]]) -> None:
    data = bytearray(SMALL_FILES[name])
    for place, value in damage:
        data[int(place * len(data))] = value
    if not is_small(bytes(data), SMALL):
        return
    try:
        decode(bytes(data), SMALL, Limits(max_pixels=128 * 128))
    except TooManyPixels:
        pytest.fail("it announces more pixels than is_small read")
    except ImageError:
        pass


@pytest.mark.data
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_simplejpeg_gives_the_same_pixels_of_real_photos_at_every_scale(scale: int) -> None:
    for index, pixels in enumerate(squares("scenes-224-500.zip")[:40]):
        large = Image.fromarray(pixels).resize((1203, 901), Image.Resampling.BICUBIC)
        data = encoded(np.asarray(large), "JPEG", quality=90, progressive=bool(index % 2))
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (large.width // scale, large.height // scale))
        assert image.size == (ceil(large.width / scale), ceil(large.height / scale))
        scaled = simplejpeg.decode_jpeg(data, "RGB", min_width=image.width, min_height=image.height)
        assert np.array_equal(scaled, np.asarray(image))


@pytest.mark.parametrize("size", [(500, 375), (1280, 960), (2051, 1537)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 60}], ids=str)
def test_simplejpeg_gives_the_same_pixels_scaled_ones_too(size: tuple[int, int], options: dict[str, Any]) -> None:
    data = encoded(photo(*size), "JPEG", **options)
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * LARGE.resize, 2 * LARGE.resize))
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=image.width, min_height=image.height)
    assert np.array_equal(resize(Image.fromarray(pixels), LARGE), decode(data, LARGE))
