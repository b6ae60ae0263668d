# SPDX-License-Identifier: Apache-2.0
"""Between the host and a CUDA device: images go up while it computes, small results come down in one copy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

DEPTH = 3  # buffers of a bucket: one being filled, one on its way, one to spare


class Staging:
    """Page-locked buffers through which uint8 images reach the device: a ring for each power of two of batch sizes.

    Args:
        shape: (H, W, 3) of one image.
        device: where to. On a CPU the same steps are taken without streams.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._shape, self._device = tuple(shape), device
        self._cuda = _works_alone(device)
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._rings: dict[int, cycle[_Buffer]] = {}
        self._one_at_a_time = threading.Lock()

    def upload(self, images: Tensor) -> Tensor:
        """Images uint8 [N, H, W, 3] on the device; what the caller's stream does next waits for them there."""
        with self._one_at_a_time:
            size = 1 << (len(images) - 1).bit_length()
            if size not in self._rings:
                self._rings[size] = cycle([_Buffer((size, *self._shape), pinned=self._cuda) for _ in range(DEPTH)])
            buffer = next(self._rings[size])
            buffer.wait()
            staged = buffer.pixels[: len(images)].copy_(images)
            with torch.cuda.stream(self._stream):  # does nothing where there is no stream
                arrived = staged.to(self._device, non_blocking=True, copy=True)
                buffer.mark(self._stream)
        if self._stream is not None:
            own = torch.cuda.current_stream(self._device)
            own.wait_stream(self._stream)
            arrived.record_stream(own)
        return arrived


class _Buffer:
    def __init__(self, shape: Sequence[int], *, pinned: bool) -> None:
        self.pixels = torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the last copy out of this buffer is over."""
        if self._copied is not None:
            self._copied.synchronize()

    def mark(self, stream: torch.cuda.Stream | None) -> None:
        if self._copied is not None:
            self._copied.record(stream)


class Download:
    """Floating tensors of N rows on their way to the CPU, from a device all in one copy.

    What that device is given to do afterwards does not delay them: the copy is waited for, not the stream.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._copied: torch.cuda.Event | None = None
        if not _away(tensors):
            self._rows = [tensor.double() for tensor in tensors]
            return
        widths = [shape[1:].numel() for shape in self._shapes]
        rows = [tensor.reshape(len(tensor), width).double() for tensor, width in zip(tensors, widths, strict=True)]
        there = torch.cat(rows, dim=1)
        here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
        self._rows = [*torch.split(here, widths, dim=1)]
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(there.device))

    def tensors(self) -> list[Tensor]:
        """They, float64, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return [rows.reshape(shape) for rows, shape in zip(self._rows, self._shapes, strict=True)]


def _works_alone(device: torch.device) -> bool:
    return device.type == "cuda"


def _away(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Floating tensors of N rows on the CPU, float64, from a device all in one copy."""
    return Download(tensors).tensors()
