# SPDX-License-Identifier: Apache-2.0
"""Keep the rows with the smallest image ids of each class: the same subset for any order and any sharding."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from detector.scores.base import State


class Reservoir:
    """Rows of some tensors, at most `per_class` of each class, those with the smallest ids.

    Args:
        per_class: rows kept of each class; None keeps all.
    """

    def __init__(self, per_class: int | None) -> None:
        self.per_class = per_class
        self._chunks: list[State] = []
        self._kept = 0

    def add(self, ids: Tensor, labels: Tensor, **rows: Tensor) -> Self:
        """Offer rows: ids int64 [N], labels int64 [N], and any tensors [N, ...]."""
        if len(ids):
            chunk = {"ids": ids, "labels": labels, **rows}
            self._chunks.append({name: value.detach().cpu() for name, value in chunk.items()})
        return self._bounded()

    def merge(self, other: Reservoir) -> Self:
        """Offer all rows of another reservoir."""
        self._chunks.extend(other._chunks)
        return self._bounded()

    def rows(self) -> State:
        """The rows kept, ordered by class, then id; empty where none was ever offered."""
        self._compact()
        return self._chunks[0] if self._chunks else {}

    def _bounded(self) -> Self:
        if self.per_class is not None and self._pending() > max(self._kept, 256):
            self._compact()
        return self

    def _pending(self) -> int:
        return sum(len(chunk["ids"]) for chunk in self._chunks) - self._kept

    def _compact(self) -> None:
        if not self._chunks:
            return
        together = {name: torch.cat([chunk[name] for chunk in self._chunks]) for name in self._chunks[0]}
        kept = smallest_ids(together["ids"], together["labels"], self.per_class)
        self._chunks = [{name: value[kept] for name, value in together.items()}]
        self._kept = len(kept)


def smallest_ids(ids: Tensor, labels: Tensor, per_class: int | None) -> Tensor:
    """Which rows have the smallest ids of their class.

    Args:
        ids, labels: int64 [N].
        per_class: how many of each class; None takes all.

    Returns:
        int64 [K], ordered by class, then id.
    """
    by_id = torch.argsort(ids, stable=True)
    order = by_id[torch.argsort(labels[by_id], stable=True)]
    if per_class is None:
        return order
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank_in_class = torch.arange(len(order)) - starts
    return order[rank_in_class < per_class]
