# SPDX-License-Identifier: Apache-2.0
"""What a forward pass gives, and what scores share of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives for N images.

    Args:
        logits: float32 [N, C].
        penultimate: float32 [N, D], the input of the last linear layer: logits = penultimate @ W.T + b.
        early: float32 [N, ...], the output of the early layer, where it was asked for.
        ids: int64 [N], the identity of each image, where it is known.
        inputs: uint8 [N, H, W, 3], the images, where they were asked for.
        checked: whether a score looks first if all of it is finite; where not, the caller sees to that afterwards.
        derived: what scores have made of the outputs, where they share it; see `sharing`.
    """

    logits: Tensor
    penultimate: Tensor
    early: Tensor | None = None
    ids: Tensor | None = None
    inputs: Tensor | None = None
    checked: bool = True
    derived: dict[str, object] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: slice | Tensor) -> Outputs:
        return Outputs(
            self.logits[index],
            self.penultimate[index],
            None if self.early is None else self.early[index],
            None if self.ids is None else self.ids[index],
            None if self.inputs is None else self.inputs[index],
            self.checked,
        )

    def finite(self) -> Tensor:
        """Of each image, bool [N], whether all the network gave for it is a number."""
        return torch.isfinite(self.penultimate).all(dim=1) & torch.isfinite(self.logits).all(dim=1)

    @property
    def features(self) -> Tensor:
        """`penultimate` in float64 [N, D]."""
        return self.once("features", self.penultimate.double)

    def with_ids(self, ids: Tensor) -> Outputs:
        return replace(self, ids=ids)

    def sharing(self) -> Outputs:
        """The same outputs, which keep what `once` computes for as long as they live."""
        return replace(self, derived={})

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """`compute()`, a single time for each key where the outputs are `sharing`."""
        if self.derived is None:
            return compute()
        if key not in self.derived:
            self.derived[key] = compute()
        return cast(T, self.derived[key])


def concatenate(parts: Sequence[Outputs]) -> Outputs:
    """Join the outputs of several batches; `early` and `inputs` are left behind."""
    ids = [part.ids for part in parts if part.ids is not None]
    return Outputs(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.penultimate for part in parts]),
        ids=torch.cat(ids) if len(ids) == len(parts) else None,
    )
