# SPDX-License-Identifier: Apache-2.0
"""The forward of a CUDA device as CUDA graphs, one for each power of two of batch sizes: many launches become one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from detector.backbone import Run

Pair = tuple[Tensor, Tensor]
Make = Callable[[Run, Tensor], Run]
WARM_UP = 3  # runs before a recording: libraries choose their kernels in the first


class Bucketed:
    """A forward as `make` prepares it for batches of one size, prepared when a size is first run.

    A batch is filled up to its bucket, the next power of two, and what comes out is copied: the next replay of a graph
    writes to its place. For the same reason one batch is run at a time, whoever asks.

    Args:
        forward: what is prepared.
        make: from the forward and a batch of the size, what runs batches of that size.

    Input: uint8 [N, H, W, 3] on the device, N > 0. Output: logits float32 [N, C], penultimate float32 [N, D].
    """

    def __init__(self, forward: Run, make: Make) -> None:
        self._forward, self._make = forward, make
        self._made: dict[int, Run] = {}
        self._one_at_a_time = threading.Lock()

    def __call__(self, images: Tensor) -> Pair:
        size = 1 << (len(images) - 1).bit_length()
        filled = images
        if len(images) < size:
            filled = images.new_zeros(size, *images.shape[1:])
            filled[: len(images)] = images
        with self._one_at_a_time:
            if size not in self._made:
                self._made[size] = self._make(self._forward, filled)
            logits, penultimate = self._made[size](filled)
            return logits[: len(images)].clone(), penultimate[: len(images)].clone()


def recorded(forward: Run, images: Tensor) -> Run:
    """The forward as one CUDA graph for batches of the size of these images, uint8 [N, H, W, 3] on the device.

    Raises:
        RuntimeError: the forward does something that cannot be recorded, or there is no memory for it.
    """
    with torch.cuda.device(images.device):
        placed = images.clone()
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                forward(placed)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the device meanwhile is neither recorded nor a reason to fail.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = forward(placed)

    def run(images: Tensor) -> Pair:
        placed.copy_(images)
        graph.replay()
        return found

    return run
