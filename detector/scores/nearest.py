# SPDX-License-Identifier: Apache-2.0
"""Distance to the k-th nearest training feature on the unit sphere: KNN (Sun et al., arXiv 2204.06507)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detector.backbone import Backbone, Outputs
from detector.scores.base import Gatherer, Score, State, register
from detector.scores.gather import Features

NEIGHBOURS = 50
CHUNK_CELLS = 2**22  # queries x bank rows held at a time


@register
class Knn(Score):
    """||h/||h|| - its 50th nearest neighbour||, over a class-balanced bank of training features.

    Neighbours are found by a float32 matrix product, the distance to the 50th is then taken in float64.

    State: bank float32 [B, D], rows of length one.
    """

    name: ClassVar[str] = "knn"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (Features,)
    tensors: ClassVar[tuple[str, ...]] = ("bank",)
    bank: Tensor

    def _fit(self, backbone: Backbone) -> State:
        return {"bank": unit_rows(self.got(Features).features()).float()}

    def _score(self, outputs: Outputs) -> Tensor:
        queries = max(1, CHUNK_CELLS // len(self.bank))
        return torch.cat([self._kth(unit_rows(part)) for part in torch.split(outputs.penultimate, queries)])

    def _kth(self, queries: Tensor) -> Tensor:
        found = (queries.float() @ self.bank.T).topk(min(NEIGHBOURS, len(self.bank)), dim=1).indices
        distance: Tensor = torch.linalg.vector_norm(queries - self.bank[found[:, -1]].double(), dim=1)
        return distance


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to length one, float64; a row of zeros stays."""
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-10)


def exact_distances(rows: Tensor, anchors: Tensor) -> Tensor:
    """Euclidean distances [N, A]; the matrix-product shortcut loses the digits that near-zero gradients live on."""
    return torch.cdist(rows, anchors, compute_mode="donot_use_mm_for_euclid_dist")
