# SPDX-License-Identifier: Apache-2.0
"""Keep the rows with the smallest image ids of each class: the same subset for any order and any sharding."""

from __future__ import annotations

from collections.abc import Sequence
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
        if self._chunks:
            chunks, self._chunks = self._chunks, []
            self._chunks = [_together(chunks)]
        return self._chunks[0] if self._chunks else {}

    def _bounded(self) -> Self:
        if self.per_class is not None and self._pending() > max(self._kept // 4, 256):
            self._compact()
        return self

    def _pending(self) -> int:
        return sum(len(chunk["ids"]) for chunk in self._chunks) - self._kept

    def _compact(self) -> None:
        if not self._chunks:
            return
        kept = smallest_ids(*_of_all(self._chunks), self.per_class)
        stays = torch.zeros(self._kept + self._pending(), dtype=torch.bool)
        stays[kept] = True
        parts = torch.split(stays, [len(chunk["ids"]) for chunk in self._chunks])
        # Chunk by chunk: maps of an early layer take a gigabyte, which together they would for a while take thrice.
        before, self._chunks, self._kept = self._chunks[::-1], [], len(kept)
        for part in parts:
            chunk = before.pop()
            if bool(part.all()):
                self._chunks.append(chunk)
            elif bool(part.any()):
                self._chunks.append({name: value[part] for name, value in chunk.items()})


def _of_all(chunks: Sequence[State]) -> tuple[Tensor, Tensor]:
    ids, labels = (torch.cat([chunk[name] for chunk in chunks]) for name in ("ids", "labels"))
    return ids, labels


def _together(chunks: list[State]) -> State:
    """One chunk of all rows, ordered by class, then id; the list is used up, so that each chunk is freed."""
    order = smallest_ids(*_of_all(chunks), None)
    if len(chunks) == 1 and torch.equal(order, torch.arange(len(order))):
        return chunks[0]
    where = torch.empty_like(order)
    where[order] = torch.arange(len(order))
    parts = torch.split(where, [len(chunk["ids"]) for chunk in chunks])
    together = {name: value.new_empty(len(order), *value.shape[1:]) for name, value in chunks[0].items()}
    for part in reversed(parts):
        for name, value in chunks.pop().items():
            together[name][part] = value
    return together


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
