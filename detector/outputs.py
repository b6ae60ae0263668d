# SPDX-License-Identifier: Apache-2.0
"""What a forward pass gives, and what scores share of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from detector.errors import ScoreError
from detector.image_statistics import image_statistics

T = TypeVar("T")
BATCH = 64  # images in a pass


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives for N images.

    Args:
        logits: float32 [N, C].
        penultimate: float32 [N, D], the input of the last linear layer: logits = penultimate @ W.T + b.
        early: float32 [N, ...], the output of the early layer, where it was asked for.
        ids: int64 [N], the identity of each image, where it is known.
        inputs: uint8 [N, H, W, 3], the images, where they are kept.
        statistics: float64 [N, 18], their `image_statistics`, where these are kept instead.
        checked: whether a score looks first if all of it is finite; where not, the caller sees to that afterwards.
        derived: what scores have made of the outputs, where they share it; see `sharing`.
    """

    logits: Tensor
    penultimate: Tensor
    early: Tensor | None = None
    ids: Tensor | None = None
    inputs: Tensor | None = None
    statistics: Tensor | None = None
    checked: bool = True
    derived: dict[str, object] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: slice | Tensor) -> Outputs:
        rest = {name: getattr(self, name) for name in ("early", "ids", "inputs", "statistics")}
        return Outputs(
            self.logits[index],
            self.penultimate[index],
            **{name: value[index] for name, value in rest.items() if value is not None},
            checked=self.checked,
        )

    def finite(self) -> Tensor:
        """Of each image, bool [N], whether all the network gave for it is a number."""
        return torch.isfinite(self.penultimate).all(dim=1) & torch.isfinite(self.logits).all(dim=1)

    @property
    def features(self) -> Tensor:
        """`penultimate` in float64 [N, D]."""
        return self.once("features", self.penultimate.double)

    @property
    def image_statistics(self) -> Tensor:
        """`image_statistics` of the images, float64 [N, 18]; ScoreError where the outputs came without images."""
        if self.statistics is not None:
            return self.statistics
        images = self.inputs
        if images is None:
            raise ScoreError("these outputs came without their images, which a score looks at: pass Outputs(inputs=…)")
        # In parts, for floats of many images are many times the images.
        parts = torch.split(images, BATCH)
        return self.once(
            "image statistics", lambda: torch.cat([image_statistics(part.to(self.logits.device)) for part in parts])
        )

    def with_statistics(self) -> Outputs:
        """The same with the statistics of the images, which can stand for them."""
        return replace(self, statistics=self.image_statistics)

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

    def joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
        known = [piece for piece in pieces if piece is not None]
        return torch.cat(known) if len(known) == len(pieces) else None

    return Outputs(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.penultimate for part in parts]),
        ids=joined([part.ids for part in parts]),
        statistics=joined([part.statistics for part in parts]),
    )
