# SPDX-License-Identifier: Apache-2.0
"""A low-dimensional space of whitened gradients, found from streamed rows that are never held together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from detector.errors import ScoreError

OVERSAMPLED = 10  # columns of the sketch beyond those that are kept
POWER_PASSES = 2
WEAKEST = 1e-4  # singular value relative to the largest; float32 coordinates carry nothing below it
CONSTANT = 1e-10  # variance relative to the mean square; less of it is rounding
UNDERFLOW = 1e-60  # mean square of entries that float32 cannot tell from zero
LARGEST = 2_000_000_000  # bytes of a basis

Blocks = Callable[[], Iterator[Tensor]]  # the same rows float32 [b, P], block by block, whenever it is called


@dataclass(frozen=True)
class Subspace:
    """Coordinates r = g basis - offset of a gradient g.

    Args:
        basis: float32 [P, K], with the whitening multiplied in.
        offset: float32 [K].
        rows: float32 [n, K], coordinates of the training gradients, in the order of their blocks.
    """

    basis: Tensor
    offset: Tensor
    rows: Tensor


class WhitenedRows:
    """Rows g that are whitened by the diagonal of their covariance: (g - mean) / standard deviation, entry by entry.

    An entry that does not vary carries nothing and becomes zero.

    Args:
        blocks: the rows; they are run through once here and once for each product below.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self.count = 0
        total = squares = torch.zeros(())
        for block in blocks():
            rows = block.double()
            total, squares = total.to(rows) + rows.sum(dim=0), squares.to(rows) + rows.square().sum(dim=0)
            self.count += len(rows)
        mean, square = total / self.count, squares / self.count
        variance = square - mean.square()
        varies = (variance > CONSTANT * square) & (square > UNDERFLOW)
        self.mean = mean.float()
        self.scale = torch.where(varies, variance.clamp_min(UNDERFLOW).rsqrt(), 0.0).float()

    def __iter__(self) -> Iterator[Tensor]:
        for block in self._blocks():
            yield (block - self.mean) * self.scale

    def combined(self, weights: Tensor) -> Tensor:
        """G^T weights, float32 [P, K], of weights [n, K]."""
        found = self.mean.new_zeros(len(self.mean), weights.shape[1])
        weights, start = weights.to(found), 0
        for rows in self:
            found.addmm_(rows.T, weights[start : start + len(rows)])
            start += len(rows)
        return found

    def multiplied(self, directions: Tensor) -> Tensor:
        """G^T G directions, float32 [P, K], in one run through the rows."""
        found = torch.zeros_like(directions)
        for rows in self:
            found.addmm_(rows.T, rows @ directions)
        return found

    def coordinates(self, directions: Tensor) -> Tensor:
        """G directions, float32 [n, K]."""
        return torch.cat([rows @ directions for rows in self])

    def subspace(self, directions: Tensor, rows: Tensor) -> Subspace:
        """The space of directions [P, K] in which the training rows have these coordinates [n, K]."""
        basis = directions * self.scale[:, None]
        mean = self.mean.double()
        offset = torch.stack([mean @ column.double() for column in basis.T])  # column by column: float64 is twice V
        return Subspace(basis, offset.float(), rows)


def principal(rows: WhitenedRows, columns: int) -> Subspace:
    """The first principal directions of the rows, at most `columns` and no more than their rank, at least one.

    One randomised block sketch and two power passes; three times the basis is held.
    """
    width = min(columns + OVERSAMPLED, rows.count, len(rows.mean))
    sketch = torch.randn(rows.count, width, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.qr(rows.combined(sketch)).Q
    for _ in range(POWER_PASSES):
        found = torch.linalg.qr(rows.multiplied(found)).Q
    coordinates = rows.coordinates(found)
    _, singular, turned = torch.linalg.svd(coordinates.double(), full_matrices=False)
    rank = int((singular > WEAKEST * singular[0]).sum())
    axes = turned[: max(1, min(columns, rank))].T.float()
    return rows.subspace(found @ axes, coordinates @ axes)


def class_averages(rows: WhitenedRows, labels: Tensor, classes: int) -> Subspace:
    """The directions of the mean row of each class, each of length one, not orthogonal."""
    members = torch.nn.functional.one_hot(labels, classes).double()
    means = rows.combined((members / members.sum(dim=0).clamp_min(1)).float())
    directions = torch.nn.functional.normalize(means, dim=0)
    return rows.subspace(directions, rows.coordinates(directions))


def refuse_large(size: int, columns: int, advice: str) -> None:
    """ScoreError where a basis [size, columns] would have more than 2 GB."""
    needed = 4 * size * columns
    if needed > LARGEST:
        raise ScoreError(
            f"a basis of {size:,} x {columns:,} numbers would take {needed / 1e9:.1f} GB; "
            f"the limit is {LARGEST / 1e9:.0f} GB. {advice}"
        )
