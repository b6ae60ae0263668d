# SPDX-License-Identifier: Apache-2.0
"""What scores gather from one pass over the training images: class sums, scatter, and reservoirs of rows."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import ClassVar, Self

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.errors import EmptyClass, ScoreError
from detector.outputs import Outputs
from detector.scores.base import FitOptions, Gatherer, State
from detector.scores.reservoir import Reservoir


class ClassSums(Gatherer):
    """Images and the sum of the penultimate features of each class, by true label."""

    def __init__(self, options: FitOptions) -> None:
        self.counts = torch.zeros(options.num_classes, dtype=torch.int64)
        self.sums = torch.zeros(options.num_classes, 0, dtype=torch.float64)

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        self.counts += torch.bincount(labels.cpu(), minlength=len(self.counts))
        self.sums = _with_rows(self.sums, outputs.penultimate, labels)

    def merge(self, other: Self) -> None:
        self.counts += other.counts
        self.sums = _added(self.sums, other.sums)

    def progress(self) -> State:
        return {"counts": self.counts, "sums": self.sums}

    def restore(self, progress: State) -> None:
        self.counts, self.sums = progress["counts"], progress["sums"]

    def means(self) -> Tensor:
        """The class prototypes, float64 [C, D]; EmptyClass where a class has no image."""
        empty = (self.counts == 0).nonzero().flatten().tolist()
        if empty:
            raise EmptyClass(f"no training image has label {empty[:10]}; every output of the network needs images")
        return self.sums / self.counts[:, None]

    def mean(self) -> Tensor:
        """The mean of all features, float64 [D]; EmptyClass where there was no image."""
        if not int(self.counts.sum()):
            raise EmptyClass("no training image was seen")
        return self.sums.sum(dim=0) / self.counts.sum()


class Scatter(Gatherer):
    """The sum of h h^T over all training images, float64 [D, D]: 2 MB for 512 features, 33 MB for 2,048."""

    def __init__(self, options: FitOptions) -> None:
        self.total = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        h = outputs.penultimate.double()
        self.total = _added(self.total, (h.T @ h).cpu())

    def merge(self, other: Self) -> None:
        self.total = _added(self.total, other.total.clone())

    def progress(self) -> State:
        return {"total": self.total}

    def restore(self, progress: State) -> None:
        self.total = progress["total"]

    def within_classes(self, sums: ClassSums) -> Tensor:
        """Covariance of the features around the prototype of their class, float64 [D, D]."""
        means = sums.means()
        between = (means * sums.counts[:, None]).T @ means
        return _symmetric((self.total - between) / sums.counts.sum())

    def about(self, sums: ClassSums, centre: Tensor) -> Tensor:
        """Second moment of the features about any point, float64 [D, D]."""
        mean = sums.mean()
        covariance = self.total / sums.counts.sum() - torch.outer(mean, mean)
        return _symmetric(covariance + torch.outer(mean - centre, mean - centre))


class Rows(Gatherer):
    """Rows of some training images, balanced over the classes, those with the smallest ids."""

    def __init__(self, options: FitOptions) -> None:
        self.rows = Reservoir(_per_class(options.bank_size, options))

    def merge(self, other: Self) -> None:
        self.rows.merge(other.rows)

    def progress(self) -> State:
        return dict(self.rows.rows())

    def restore(self, progress: State) -> None:
        _refill(self.rows, progress)

    def kept(self) -> State:
        """The rows by name, ordered by class, then id; EmptyClass where there was no image."""
        rows = self.rows.rows()
        if not rows:
            raise EmptyClass("no training image was seen")
        return rows


class Features(Rows):
    """Features of at most `bank_size` training images."""

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        self.rows.add(known_ids(outputs), labels, features=outputs.penultimate)

    def features(self) -> Tensor:
        """float32 [B, D], ordered by class, then id; EmptyClass where there was no image."""
        return self.kept()["features"]


class CorrectFeatures(Features):
    """The same, of correctly classified images only."""

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        correct = (outputs.logits.argmax(dim=1).cpu() == labels.cpu()).nonzero().flatten()
        super().add(outputs[correct], labels[correct])

    def features(self) -> Tensor:
        """float32 [B, D]; ScoreError where no image was classified correctly."""
        if not self.rows.rows():
            raise ScoreError("no training image is classified correctly; check the order of the classes")
        return super().features()


class EarlyMaps(Gatherer):
    """For the mix-up at the early layer: its class sums, and the maps of `mixup_images` training images."""

    needs_early: ClassVar[bool] = True

    def __init__(self, options: FitOptions) -> None:
        self.counts = torch.zeros(options.num_classes, dtype=torch.int64)
        self.sums = torch.zeros(options.num_classes, 0, dtype=torch.float64)
        self.shape = torch.zeros(0, dtype=torch.int64)
        self.maps = Reservoir(_per_class(options.mixup_images, options))
        self._mixed: dict[float, Tensor] = {}  # the forms of GROOD ask for the same few

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        if outputs.early is None:
            raise ScoreError("the mix-up is fitted from outputs that carry the early layer")
        self._mixed.clear()
        self.shape = torch.tensor(outputs.early.shape[1:])
        self.counts += torch.bincount(labels.cpu(), minlength=len(self.counts))
        self.sums = _with_rows(self.sums, outputs.early.flatten(1), labels)
        runner_up = outputs.logits.topk(2, dim=1).indices[:, 1]
        self.maps.add(known_ids(outputs), labels, early=outputs.early, runner_up=runner_up)

    def merge(self, other: Self) -> None:
        self._mixed.clear()
        self.counts += other.counts
        self.sums = _added(self.sums, other.sums)
        self.shape = other.shape if len(other.shape) else self.shape
        self.maps.merge(other.maps)

    def progress(self) -> State:
        return {"class_counts": self.counts, "class_sums": self.sums, "shape": self.shape} | self.maps.rows()

    def restore(self, progress: State) -> None:
        self._mixed.clear()
        rows = dict(progress)
        self.counts, self.sums, self.shape = (rows.pop(name) for name in ("class_counts", "class_sums", "shape"))
        _refill(self.maps, rows)

    def mean_of_mixed(self, backbone: Backbone, share: float, batch_size: int = 100) -> Tensor:
        """Mean features, float64 [D], of share x map + (1 - share) x the mean map of the runner-up class."""
        if share not in self._mixed:
            self._mixed[share] = self._mean_of_mixed(backbone, share, batch_size)
        return self._mixed[share]

    def _mean_of_mixed(self, backbone: Backbone, share: float, batch_size: int) -> Tensor:
        rows = self.maps.rows()
        if not rows:
            raise EmptyClass("no training image was seen")
        total: Tensor | None = None
        for start in range(0, len(rows["ids"]), batch_size):
            part = slice(start, start + batch_size)
            runner_up = rows["runner_up"][part]
            # Where the runner-up class has no image, its sum is zero: ClassSums names the class in its own error.
            counts = self.counts[runner_up, None].clamp_min(1)
            other = (self.sums[runner_up] / counts).reshape(-1, *self.shape.tolist())
            mixed = share * rows["early"][part].double() + (1 - share) * other
            resumed = backbone.resume(mixed.float()).double().sum(dim=0).cpu()
            total = resumed if total is None else total + resumed
        assert total is not None
        return total / len(rows["ids"])


class Images(Rows):
    """At most `bank_size` training images themselves, uint8, for scores whose fit runs the network again."""

    limit: ClassVar[int | None] = None  # fewer than `bank_size`, where the method says so

    def __init__(self, options: FitOptions) -> None:
        sizes = [size for size in (options.bank_size, self.limit) if size is not None]
        super().__init__(replace(options, bank_size=min(sizes, default=None)))

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        if outputs.inputs is None:
            raise ScoreError("this score is fitted from outputs that carry the images")
        self.rows.add(known_ids(outputs), labels, images=outputs.inputs)

    def images(self) -> tuple[Tensor, Tensor]:
        """uint8 [B, H, W, 3] and labels int64 [B]; EmptyClass where there was no image."""
        rows = self.kept()
        return rows["images"], rows["labels"]


def known_ids(outputs: Outputs) -> Tensor:
    """The ids of a batch; ScoreError where it has none."""
    if outputs.ids is None:
        raise ScoreError("scores are fitted from outputs that carry the image ids")
    return outputs.ids


def _per_class(size: int | None, options: FitOptions) -> int | None:
    return None if size is None else ceil(size / options.num_classes) if options.num_classes else size


def _refill(reservoir: Reservoir, progress: State) -> None:
    rows = dict(progress)
    if rows:
        reservoir.add(rows.pop("ids"), rows.pop("labels"), **rows)


def _with_rows(sums: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Class sums float64 [C, D] on the CPU, with rows [N, D] added to the sums of their labels int64 [N]."""
    if sums.shape[1] == 0:
        sums = sums.new_zeros(len(sums), rows.shape[1])
    return sums.index_add_(0, labels.cpu(), rows.cpu().double())


def _added(total: Tensor, part: Tensor) -> Tensor:
    if part.shape[1] == 0:
        return total
    return part.clone() if total.shape[1] == 0 else total.add_(part)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
