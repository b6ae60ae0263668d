# SPDX-License-Identifier: Apache-2.0
"""The forward of a CUDA device as CUDA graphs, one for each power of two of batch sizes: many launches become one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from detector.backbone import Run
from detector.outputs import BATCH

Pair = tuple[Tensor, Tensor]
Make = Callable[[Run, Tensor], Run]
WARM_UP = 3  # runs before a recording: libraries choose their kernels in the first
_one_recording = threading.Lock()  # at a time in a process: torch allows no more


class Bucketed:
    """A forward as `make` prepares it for batches of one size, prepared when a size is first run.

    A batch is filled up to its bucket, the next power of two, and what comes out is copied: the next replay of a graph
    writes to its place. For the same reason one batch is run at a time, whoever asks.

    Args:
        forward: what is prepared.
        make: from the forward and a batch of the size, what runs batches of that size.
        largest: a power of two; larger batches are cut.

    Input: uint8 [N, H, W, 3] on the device, N > 0. Output: logits float32 [N, C], penultimate float32 [N, D].
    """

    def __init__(self, forward: Run, make: Make, largest: int = BATCH) -> None:
        self._forward, self._make, self._largest = forward, make, largest
        self._made: dict[int, Run] = {}
        self._one_at_a_time = threading.Lock()

    def __call__(self, images: Tensor) -> Pair:
        parts = [self._run(part) for part in torch.split(images, self._largest)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([logits for logits, _ in parts]), torch.cat([penultimate for _, penultimate in parts])

    def _run(self, images: Tensor) -> Pair:
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
    with _one_recording, torch.cuda.device(images.device):
        placed = images.clone()
        # From another pool than the streams of uploads, which must not be recorded with it.
        beside = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                forward(placed)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on their streams meanwhile is neither recorded nor a reason to fail.
        with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
            found = forward(placed)

    def run(images: Tensor) -> Pair:
        placed.copy_(images)
        graph.replay()
        return found

    return run
