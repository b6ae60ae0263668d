# SPDX-License-Identifier: Apache-2.0
"""Distance to the k-th nearest training feature on the unit sphere: KNN (Sun et al., arXiv 2204.06507)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.machine import has_onednn
from detector.outputs import Outputs
from detector.scores import index
from detector.scores.base import Gatherer, Score, State, register
from detector.scores.gather import Features

NEIGHBOURS = 50
PER_CLASS = 10  # k is at most the tenth part of a class's rows
CHUNK_CELLS = 2**22  # queries x bank rows held at a time
GROUP = 8  # keys of which first only the smallest is looked at
FEW = 4  # queries for which the plain product is the faster
FEW_CELLS = 2**12  # keys that are faster looked at one by one than in groups
MOST_DIFFERENCES = 2**20  # cells, beyond which `cdist` is faster than all differences at once


@register
class Knn(Score):
    """||h/||h|| - its k-th nearest neighbour||, over a class-balanced bank of training features.

    k is 50, or a tenth of a class's rows where the bank is smaller: beyond the rows of its own class every image is far
    from its neighbours, whatever it shows. Neighbours are found by a float32 matrix product, the distance to the k-th
    is then taken in float64.

    State: bank float32 [B, D], rows of length one; with an index, centres float32 [L, D] of its lists.
    """

    name: ClassVar[str] = "knn"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (Features,)
    tensors: ClassVar[tuple[str, ...]] = ("bank",)
    optional: ClassVar[tuple[str, ...]] = ("centres",)
    bank: Tensor
    centres: Tensor | None

    def _attach(self, backbone: Backbone) -> None:
        self.neighbours = neighbours(len(self.bank), backbone.num_classes)
        self._index = index.built(self.bank, self.centres)

    def _fit(self, backbone: Backbone) -> State:
        bank = unit_rows(self.got(Features).features()).float()
        return {"bank": bank} | index.kept(bank, self.options)

    def _score(self, outputs: Outputs) -> Tensor:
        return in_parts(self._kth, CHUNK_CELLS // len(self.bank), outputs.features)

    def _kth(self, features: Tensor) -> Tensor:
        queries = unit_rows(features)
        if self._index is not None:
            last = self._index.nearest(queries, self.neighbours)[:, -1]
        else:
            last = smallest(products(self.bank, -queries.float()), self.neighbours)[1][-1]
        distance: Tensor = torch.linalg.vector_norm(queries - self.bank[last].double(), dim=1)
        return distance


def neighbours(rows: int, classes: int) -> int:
    """k for a bank of so many rows, balanced over so many classes."""
    return max(1, min(NEIGHBOURS, rows // classes // PER_CLASS))


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to length one, float64; a row of zeros stays."""
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-10)


def in_parts(work: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """`work` on at most so many rows of the tensors at a time, its results [rows, ...] joined."""
    if len(tensors[0]) <= size:
        return work(*tensors)
    parts = zip(*(torch.split(tensor, max(1, size)) for tensor in tensors), strict=True)
    return torch.cat([work(*part) for part in parts])


def products(rows: Tensor, queries: Tensor) -> Tensor:
    """Inner products, float32 [B, N] with the queries next to each other, of rows [B, D] and queries [N, D]."""
    if rows.device.type != "cpu" or len(queries) < FEW or not has_onednn():
        return rows @ queries.T
    # A 1 x 1 convolution is the same product, but oneDNN's: twice as fast as MKL's where MKL does not use AVX-512 (on
    # AMD). Dilation says nothing about a 1 x 1 kernel; on one thread torch passes such a kernel to oneDNN only with it.
    image = rows[None, None].permute(0, 3, 1, 2)
    convolved: Tensor = torch.nn.functional.conv2d(image, queries[:, :, None, None], dilation=2)
    return convolved[0, :, 0].T


def smallest(keys: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The smallest of each column of keys [B, N], ascending: values and their rows int64, [wanted, N] each.

    They lie in the `wanted` groups of rows with the smallest minima, so that only those groups are sorted.
    """
    if len(keys) <= wanted * GROUP:
        return torch.topk(keys, wanted, dim=0, largest=False)
    grouped, first = _groups(keys)
    near = grouped.amin(dim=0).topk(wanted, dim=0, largest=False, sorted=False).indices
    candidates = (first[:, None, None] + near).flatten(0, 1)
    values, places = grouped.flatten(0, 1).gather(0, candidates).topk(wanted, dim=0, largest=False)
    return values, candidates.gather(0, places)


def close(keys: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Where keys [B, N] exceed the smallest of their column by at most the margin: rows and columns, int64 [P] each."""
    if keys.numel() <= FEW_CELLS:
        rows, columns = (keys <= keys.amin(dim=0) + margin).nonzero(as_tuple=True)
        return rows, columns
    grouped, first = _groups(keys)
    minima = grouped.amin(dim=0)
    limit = minima.amin(dim=0) + margin
    near, column = (minima <= limit).nonzero(as_tuple=True)
    member, which = (grouped[:, near, column] <= limit[column]).nonzero(as_tuple=True)
    return first[member] + near[which], column[which]


def _groups(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, N] as [GROUP, G, N], filled up with infinity, and the rows int64 [GROUP] of each first group."""
    if missing := -len(keys) % GROUP:
        keys = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=torch.inf)
    groups = len(keys) // GROUP
    return keys.reshape(GROUP, groups, -1), torch.arange(0, len(keys), groups, device=keys.device)


def exact_distances(rows: Tensor, anchors: Tensor) -> Tensor:
    """Euclidean distances [N, A]; the matrix-product shortcut loses the digits that near-zero gradients live on."""
    if len(rows) * anchors.numel() <= MOST_DIFFERENCES:
        differences: Tensor = torch.linalg.vector_norm(rows[:, None] - anchors, dim=2)
        return differences
    return torch.cdist(rows, anchors, compute_mode="donot_use_mm_for_euclid_dist")
