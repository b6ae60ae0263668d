# SPDX-License-Identifier: Apache-2.0
"""What decoding costs: `decode` against a full decode, against Pillow fed in blocks, and against simplejpeg.

    python -m benchmarks.decode

Needs the photos of `imagenet-nips17-500.zip` and the extra `rivals`. Every way is checked to give the same pixels first
(but the full decode, which has others). Writes benchmarks/results/decode.json and its tables in docs/performance.md.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import platform
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, features

from benchmarks.datasets import data_dir
from benchmarks.readme import replaced
from benchmarks.serving.results import processor
from detector.errors import ImageError
from detector.images import SMALL_BYTES, Pixels, Preprocessing, decode, is_small, resize
from detector.networks import CIFAR_PREPROCESSING

RESULT, DOCUMENT = Path("benchmarks/results/decode.json"), Path("docs/performance.md")
PHOTOS = "imagenet-nips17-500.zip"
LARGE = Preprocessing(resize=256, crop=(224, 224))
ROUNDS, TINY = 7, 200
USUAL = "PNG, 32 x 32, noise"
NOISE = (0, 3, 8)  # standard deviation in grey levels, put on an enlarged photo: a sensor's, which JPEG must code
BUSY = ("500 x 375", "12 megapixels, baseline, noise 3", "12 megapixels, progressive, noise 3")
# Two deflate blocks, each a table of 257 codes and no data: the most work a byte of PNG can ask for, as far as we know.
_EMPTY_BLOCKS = bytes.fromhex(
    "04c005401000000020ffffffffffffffffffffffffffffffffffffffffffb5f84f"
    "005c000401000000f2ffffffffffffffffffffffffffffffffffffffff5f8bff"
)

Spread = dict[str, float]
Way = Callable[[bytes], Pixels]
Clock = Callable[[], float]


def ours(data: bytes) -> Pixels:
    return decode(data, LARGE)


def full(data: bytes) -> Pixels:
    """Every pixel is decoded, then resized."""
    return resize(Image.open(io.BytesIO(data)).convert("RGB"), LARGE)


def in_blocks(data: bytes) -> Pixels:
    """DCT-scaled, as Pillow does it by itself: fed 64 KiB at a time."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * LARGE.resize, 2 * LARGE.resize))
    return resize(image, LARGE)


def by_simplejpeg(data: bytes) -> Pixels:
    """simplejpeg's pixels at the scale that Pillow would choose, resized by Pillow; the header is read by Pillow."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * LARGE.resize, 2 * LARGE.resize))
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=image.width, min_height=image.height)
    return resize(Image.fromarray(pixels), LARGE)


WAYS: dict[str, Way] = {"full": full, "oodgate": ours, "blocks": in_blocks, "simplejpeg": by_simplejpeg}


def files() -> dict[str, list[bytes]]:
    """JPEG files by what they are: real photos of 224 pixels, enlarged, some with noise."""
    with zipfile.ZipFile(data_dir() / PHOTOS) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][:20]
        photos = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    found = {"500 x 375": [_jpeg(photo, (500, 375), 0) for photo in photos]}
    for noise in NOISE:
        for kind in ("baseline", "progressive"):
            one = _jpeg(photos[0], (4000, 3000), noise, progressive=kind == "progressive")
            found[f"12 megapixels, {kind}, noise {noise}"] = [one]
    return found


def _jpeg(photo: Image.Image, size: tuple[int, int], noise: int, *, progressive: bool = False) -> bytes:
    pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(0).normal(0, noise, (*pixels.shape[:2], 1))
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=90, progressive=progressive)
    return buffer.getvalue()


def compare(data: Sequence[bytes], ways: Sequence[str], clock: Clock) -> dict[str, Any]:
    """Milliseconds an image of every way, interleaved, and how many times as fast as the first way each one is."""
    for one in data:
        expected = ours(one)
        if not all(np.array_equal(expected, WAYS[way](one)) for way in ways if way != "full"):
            raise RuntimeError("the ways do not give the same pixels")
    rounds = [{way: _milliseconds(WAYS[way], data, clock) for way in ways} for _ in range(ROUNDS)]
    speed = {way: spread([one[ways[0]] / one[way] for one in rounds]) for way in ways[1:]}
    return {"ms": {way: spread([one[way] for one in rounds]) for way in ways}, "speed": speed}


def _milliseconds(way: Way, data: Sequence[bytes], clock: Clock) -> float:
    way(data[0])  # the memory that the way before gave back is not this one's cost
    started = clock()
    for one in data:
        way(one)
    return 1e3 * (clock() - started) / len(data)


def spread(values: Sequence[float]) -> Spread:
    return {"min": min(values), "median": median(values), "max": max(values)}


def beside_busy_thread(data: Sequence[bytes]) -> dict[str, Any]:
    """Wall-clock times while another thread of this interpreter computes without a pause."""
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            pass

    neighbour = threading.Thread(target=compute)
    neighbour.start()
    try:
        return compare(data, ("blocks", "oodgate", "simplejpeg"), time.perf_counter)
    finally:
        done.set()
        neighbour.join()


def small_files() -> dict[str, bytes]:
    """A usual small file, and slow ones that `is_small` lets through."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    tables = b"\x78\x9c" + _EMPTY_BLOCKS * ((SMALL_BYTES - 100) // len(_EMPTY_BLOCKS))
    return {
        USUAL: buffer.getvalue(),
        "PNG, 128 x 128, 16-bit RGBA, Paeth rows": _png(128, 16, 6, zlib.compress((b"\4" + bytes(8 * 128)) * 128)),
        "PNG, 128 x 128, refused: 8 KiB of Huffman tables": _png(128, 8, 2, tables),
        "JPEG, 128 x 128": _jpeg(Image.fromarray(noise[:4, :4]), (128, 128), 10),
    }


def _png(side: int, bits: int, colours: int, deflated: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, bits, colours, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", deflated), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def cost_of_small(data: bytes) -> Spread:
    """CPU milliseconds of `decode` for a file that is small to the default model."""
    if not is_small(data, CIFAR_PREPROCESSING):
        raise RuntimeError("the file is not small")
    times = []
    for _ in range(TINY):
        started = time.thread_time()
        with suppress(ImageError):
            decode(data, CIFAR_PREPROCESSING)
        times.append(1e3 * (time.thread_time() - started))
    return spread(times)


async def on_the_spot_and_in_a_pool(data: bytes) -> dict[str, Spread]:
    """Wall-clock milliseconds an image, from the event loop, 32 at once: decoded there, and by one thread of a pool."""
    loop = asyncio.get_running_loop()

    async def here() -> Pixels:
        return decode(data, CIFAR_PREPROCESSING)

    async def there() -> Pixels:
        return await loop.run_in_executor(pool, decode, data, CIFAR_PREPROCESSING)

    times: dict[str, list[float]] = {"inline": [], "pool": []}
    with ThreadPoolExecutor(1) as pool:
        for _ in range(TINY):
            for name, way in (("inline", here), ("pool", there)):
                started = time.perf_counter()
                await asyncio.gather(*(way() for _ in range(32)))
                times[name].append(1e3 * (time.perf_counter() - started) / 32)
    return {name: spread(values) for name, values in times.items()}


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [
        "| JPEG | bits a pixel | full decode, ms | `decode`, ms | times as fast | simplejpeg, times as fast |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["alone"].items():
        cells = [f"{row['bits_per_pixel']:.1f}", _text(row["ms"]["full"]), _text(row["ms"]["oodgate"])]
        cells += [_text(row["speed"]["oodgate"]), _text(row["speed"]["simplejpeg"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| JPEG, beside a busy thread | in blocks of 64 KiB, ms | `decode`, ms | simplejpeg, ms |",
        "|---|---:|---:|---:|",
    ]
    for name, row in result["beside_busy_thread"].items():
        lines.append(f"| {name} | {' | '.join(_text(row['ms'][way]) for way in ('blocks', 'oodgate', 'simplejpeg'))} |")
    lines += ["", "| small file | `decode`, ms |", "|---|---:|"]
    lines += [f"| {name} | {_text(row)} |" for name, row in result["small"].items()]
    lines += [f"| {USUAL}, from the event loop, {way} | {_text(row)} |" for way, row in result["hop"].items()]
    named = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    where = f"{result['processor']}, {result['cores']} cores, load {result['load']:.0f} while measuring"
    return "\n".join([*lines, "", f"{named}; {where}."])


def _text(row: Spread) -> str:
    return f"{row['median']:.3g} ({row['min']:.3g}-{row['max']:.3g})"


def main() -> None:
    jpegs, small = files(), small_files()
    alone = {
        name: {"bits_per_pixel": _bits_per_pixel(data), **compare(data, tuple(WAYS), time.thread_time)}
        for name, data in jpegs.items()
    }
    libraries = {name: version(name) for name in ("pillow", "simplejpeg", "numpy")}
    result = {
        "versions": {
            "python": platform.python_version(),
            **libraries,
            "Pillow's libjpeg-turbo": features.version("libjpeg_turbo"),
        },
        "processor": processor(),
        "cores": os.cpu_count(),
        "rounds": ROUNDS,
        "alone": alone,
        "beside_busy_thread": {name: beside_busy_thread(jpegs[name]) for name in BUSY},
        "small": {name: cost_of_small(data) for name, data in small.items()},
        "hop": asyncio.run(on_the_spot_and_in_a_pool(small[USUAL])),
        "load": os.getloadavg()[1],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), "decode", table(result)))


def _bits_per_pixel(data: Sequence[bytes]) -> float:
    return median(8 * len(one) / np.prod(Image.open(io.BytesIO(one)).size) for one in data)


if __name__ == "__main__":
    main()
