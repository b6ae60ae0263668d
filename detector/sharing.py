# SPDX-License-Identifier: Apache-2.0
"""Share a batch out between the cores of a CPU by its images rather than within each layer.

Threads that share the layers meet after every one of them and wait there for the slowest; threads that take pieces of
the batch meet once. Beside another busy process, the thread on the freer core takes more of the pieces.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from math import gcd

import torch
from torch import Tensor

from detector.machine import cores, own_threads

Outcome = tuple[Tensor, Tensor]

SMALL = 128 * 128  # pixels
PIECE, PIECE_OF_SMALL = 4, 8  # images at least: with fewer, a layer costs more an image


def shared_out(run: Callable[[Tensor], Outcome], images: Tensor) -> Outcome:
    """Run a network on a batch, in pieces side by side where there are enough images and threads for it.

    How a batch is cut depends on its size and on the number of torch's threads alone, so the same machine rounds alike
    every time. As many threads run side by side as divide both the threads and the pieces.

    Meanwhile torch's number of threads is a smaller one: a thread that first uses torch at that moment gets that
    number, unless it has its own by `own_threads`.

    Args:
        run: may be called by several threads at once.
        images: uint8 [N, H, W, 3], N > 0.

    Returns:
        what `run` returns for the whole batch: two tensors [N, ...].
    """
    pieces = images.tensor_split(max(1, len(images) // _least(images)))
    threads = torch.get_num_threads()
    lanes = gcd(threads, len(pieces))  # no thread is without a piece at the end
    if lanes == 1:
        return run(images)
    left = deque(enumerate(pieces))
    done: dict[int, Outcome] = {}

    def take_pieces() -> None:
        own_threads(threads // lanes)
        with torch.inference_mode():
            while left:
                try:
                    index, piece = left.popleft()
                except IndexError:  # another thread was faster
                    return
                done[index] = run(piece)

    helpers = [_helpers().submit(take_pieces) for _ in range(lanes - 1)]
    try:
        take_pieces()
    finally:
        helping = [helper for helper in helpers if not helper.cancel()]  # those that came too late have nothing to do
        wait(helping)
        torch.set_num_threads(threads)
    for helper in helping:
        helper.result()
    first, second = zip(*(done[index] for index in range(len(pieces))), strict=True)
    return torch.cat(first), torch.cat(second)


def _least(images: Tensor) -> int:
    return PIECE_OF_SMALL if images.shape[1] * images.shape[2] <= SMALL else PIECE


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="forward")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not live on in a child
