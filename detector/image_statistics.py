# SPDX-License-Identifier: Apache-2.0
"""What an image looks like before any network has seen it: colours, contrast, and how much neighbours differ."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

COUNT = 18
SIDE = 64  # larger images are averaged over squares until the shorter side has 64 to 127 of them
WHITE = 3 * 255
LEAST_STEP = WHITE / 1000  # added to a mean step before its logarithm


def image_statistics(images: Tensor) -> Tensor:
    """Eighteen statistics of each image, of its brightness R + G + B and two opponent colours, R - G and R + G - 2 B.

    Mean and standard deviation of each, white = 1; and the logarithm of the mean absolute step from one pixel to the
    next, across and down, at full size and at half. All sums are of whole numbers and exact: an image has the same
    statistics in every batch.

    Args:
        images: uint8 [N, H, W, 3].

    Returns:
        float64 [N, 18].
    """
    square = max(1, min(images.shape[1:3]) // SIDE)
    red, green, blue = _summed(images, square).unbind(dim=3)
    colours = torch.stack([red + green + blue, red - green, red + green - 2 * blue], dim=1)
    mean = colours.mean(dim=(2, 3), dtype=torch.float64)
    spread = (colours.double().square().mean(dim=(2, 3)) - mean.square()).clamp_min(0).sqrt()
    steps = []
    for pixels in (square**2, (2 * square) ** 2):  # in each of the colours' sums
        for along in (3, 2):
            step = colours.diff(dim=along).abs().flatten(2)
            steps.append(step.sum(dim=2, dtype=torch.float64) / (pixels * max(1, step.shape[2])))
        if min(colours.shape[2:]) > 1:
            colours = avg_pool2d(colours, 2, divisor_override=1)
    levels = torch.cat([mean, spread], dim=1) / (WHITE * square**2)
    return torch.cat([levels, (torch.cat(steps, dim=1) + LEAST_STEP).log()], dim=1)


def _summed(images: Tensor, square: int) -> Tensor:
    """Sums over squares of pixels, float32 [N, H // square, W // square, 3]; what is left at two edges is left out."""
    height, width = (side // square * square for side in images.shape[1:3])
    pixels = images[:, :height, :width].float()
    rows = reduce(torch.add, (pixels[:, start::square] for start in range(square)))
    return reduce(torch.add, (rows[:, :, start::square] for start in range(square)))
