# SPDX-License-Identifier: Apache-2.0
"""Samples that a person recognises, drawn: whatever the verdict on them is."""

from __future__ import annotations

from PIL import Image, ImageDraw

SIDE = 128
_SCALE = 4  # drawn larger, so that edges are smooth
_SKY, _SEA, _WHITE, _DARK, _RED = "#8fc3ea", "#2b5f8f", "#f6f6f2", "#2a2f38", "#b8402f"


def ship() -> Image.Image:
    """A ship on water, RGB [128, 128]."""
    image, draw = _canvas(_SKY)
    _rectangle(draw, (0, 84, 128, 128), _SEA)
    _polygon(draw, [(12, 70), (116, 70), (102, 94), (26, 94)], _DARK)
    _polygon(draw, [(22, 86), (107, 86), (102, 94), (26, 94)], _RED)
    _rectangle(draw, (34, 54, 92, 70), _WHITE)
    _rectangle(draw, (46, 40, 84, 54), _WHITE)
    _rectangle(draw, (58, 22, 70, 40), _RED)
    for left in range(40, 88, 10):
        _rectangle(draw, (left, 59, left + 5, 64), _SEA)
    return _small(image)


def airplane() -> Image.Image:
    """An airplane in the sky, from its side, RGB [128, 128]."""
    image, draw = _canvas(_SKY)
    for left, top in ((8, 22), (84, 96)):
        for dx, dy, size in ((0, 5, 16), (10, 0, 20), (22, 5, 16)):
            _ellipse(draw, (left + dx, top + dy, left + dx + size, top + dy + size), _WHITE)
    _polygon(draw, [(16, 36), (28, 36), (40, 58), (22, 58)], _RED)
    _ellipse(draw, (14, 52, 120, 74), _WHITE)
    _polygon(draw, [(54, 62), (74, 62), (52, 96), (42, 96)], "#a9b2ba")
    _polygon(draw, [(56, 54), (70, 54), (54, 38), (48, 38)], "#a9b2ba")
    for left in range(44, 100, 9):
        _rectangle(draw, (left, 57, left + 4, 61), _DARK)
    return _small(image)


def smiley() -> Image.Image:
    """A smiling face, RGB [128, 128]."""
    image, draw = _canvas(_WHITE)
    _ellipse(draw, (10, 10, 118, 118), "#f5c518")
    for left in (40, 76):
        _ellipse(draw, (left, 40, left + 12, 60), _DARK)
    box = tuple(_SCALE * value for value in (34, 40, 94, 98))
    draw.arc(box, 20, 160, _DARK, 6 * _SCALE)
    return _small(image)


def _canvas(ground: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), ground)
    return image, ImageDraw.Draw(image)


def _rectangle(draw: ImageDraw.ImageDraw, box: tuple[int, ...], fill: str) -> None:
    draw.rectangle(tuple(_SCALE * value for value in box), fill)


def _ellipse(draw: ImageDraw.ImageDraw, box: tuple[int, ...], fill: str) -> None:
    draw.ellipse(tuple(_SCALE * value for value in box), fill)


def _polygon(draw: ImageDraw.ImageDraw, corners: list[tuple[int, int]], fill: str) -> None:
    draw.polygon([(_SCALE * x, _SCALE * y) for x, y in corners], fill)


def _small(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
