# SPDX-License-Identifier: Apache-2.0
"""A forward prepared for each power of two of batch sizes: recorded as a CUDA graph, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detector.forward import Forward

Pair = tuple[Tensor, Tensor]
Run = Callable[[Tensor], Pair]
Make = Callable[[Forward, Tensor], Run]
WARM_UP = 3  # runs before a recording: libraries choose their kernels in the first


class Bucketed:
    """A forward as `make` prepares it, for each power of two of batch sizes.

    A batch is filled up to its bucket, and what comes out is copied: the next replay of a graph writes to its place.
    """

    def __init__(self, forward: Forward, make: Make) -> None:
        self._forward, self._make = forward, make
        self._made: dict[int, Run] = {}

    def __call__(self, images: Tensor) -> Pair:
        size = 1 << (len(images) - 1).bit_length()
        filled = images
        if len(images) < size:
            filled = images.new_zeros(size, *images.shape[1:])
            filled[: len(images)] = images
        if size not in self._made:
            self._made[size] = self._make(self._forward, filled)
        logits, penultimate = self._made[size](filled)
        return logits[: len(images)].clone(), penultimate[: len(images)].clone()


def compiled(forward: Forward, images: Tensor) -> Run:
    """By torch.compile, for this one size; CUDA graphs where the device is one."""
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = 64  # each size is a compilation of the same code; past the limit it would run eager
    mode: Any = "reduce-overhead" if images.is_cuda else None
    run: Run = torch.compile(forward, dynamic=False, fullgraph=True, mode=mode)
    return run


def recorded(forward: Forward, images: Tensor) -> Run:
    """The eager forward as one CUDA graph, for this one size."""
    placed = images.clone()
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            forward(placed)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found: Pair = forward(placed)

    def run(images: Tensor) -> Pair:
        placed.copy_(images)
        graph.replay()
        return found

    return run
