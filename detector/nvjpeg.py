# SPDX-License-Identifier: Apache-2.0
"""JPEGs decoded on a CUDA device by nvJPEG, through torchvision. Opt-in: its pixels are nearly those of Pillow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detector.errors import BackboneError
from detector.images import Pixels

END = b"\xff\xd9"  # of a whole JPEG


class NvJpeg:
    """Decodes baseline and progressive JPEGs on a CUDA device; None for those it leaves to Pillow.

    Args:
        device: a CUDA device.
        decode: uint8 [bytes] -> uint8 [3, H, W], both on the CPU; by torchvision on the device where not given.

    Raises:
        BackboneError: the device is no CUDA device, or torchvision is not there.
    """

    def __init__(self, device: torch.device, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        self._decode = _of_torchvision(device) if decode is None else decode

    def __call__(self, data: bytes) -> Pixels | None:
        """Pixels [H, W, 3] of a file, not turned by its EXIF block; None where it may be cut off or is refused."""
        if not data.rstrip(b"\0").endswith(END):
            return None  # nvJPEG would fill up what is missing; Pillow says that it is
        try:
            pixels = self._decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        except (RuntimeError, ValueError):  # arithmetic coding, 12 bits, a device that is full: Pillow may still do
            return None
        found: Pixels = pixels.permute(1, 2, 0).contiguous().numpy()
        return found


def _of_torchvision(device: torch.device) -> Callable[[Tensor], Tensor]:
    if device.type != "cuda":
        raise BackboneError(f"nvJPEG needs a CUDA device, not {device}; decode by Pillow instead (OODGATE_JPEG=pillow)")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise BackboneError("nvJPEG is reached through torchvision, which is not installed") from error
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # else an image would wait for the forward

    def decode(data: Tensor) -> Tensor:
        with torch.cuda.stream(stream):
            pixels: Tensor = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
            return pixels.cpu()

    return decode
