# SPDX-License-Identifier: Apache-2.0
"""LowDimGrad (Wu et al., arXiv 2310.17163): gradients of log sum exp f in few dimensions, here at the last layer alone.

The gradient is whitened entry by entry with its mean and variance over training images, projected on principal
directions or class averages of the training gradients, and scored there: by the energy of a linear probe, or by the
distance to the 5th nearest training image. At the last layer the gradient is p (x) [h; 1]: nothing runs backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from detector.backbone import Backbone
from detector.errors import EmptyClass
from detector.outputs import Outputs
from detector.scores.base import FitOptions, Gatherer, Score, State, register
from detector.scores.gather import Features
from detector.scores.logit import energy
from detector.scores.nearest import CHUNK_CELLS, products, smallest, unit_rows
from detector.scores.subspace import Blocks, Subspace, WhitenedRows, class_averages, principal, refuse_large

COLUMNS = 200
LARGEST_PCA = 200_000  # entries of a last-layer gradient; beyond, class averages
BLOCK_CELLS = 2**24  # of gradient entries held at a time
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 10, 128, 0.1, 0.9, 5e-4
NEIGHBOURS, CANDIDATES = 5, 16  # found in float32, then measured in float64


class LowDimScore(Score):
    """What the forms share: a subspace of whitened gradients and the energy of a linear probe on its coordinates.

    State: basis float32 [P, K] with the whitening in it, offset float32 [K], probe_weight float32 [C, K] and
    probe_bias float32 [C] with the probe's batch norm in them. Where C < K the weights are multiplied into the basis:
    K is C then, and probe_weight the identity.
    """

    tensors: ClassVar[tuple[str, ...]] = ("basis", "offset", "probe_weight", "probe_bias")
    basis: Tensor
    offset: Tensor
    probe_weight: Tensor
    probe_bias: Tensor

    def _finish(self, space: Subspace, labels: Tensor) -> State:
        weight, bias = (part.to(space.basis) for part in train_probe(space.rows, labels, self.options.num_classes))
        basis, offset = space.basis, space.offset
        if len(weight) < len(offset):
            basis, offset, weight = basis @ weight.T, weight @ offset, torch.eye(len(weight)).to(basis)
        return {"basis": basis, "offset": offset, "probe_weight": weight, "probe_bias": bias}

    def _rank(self, rows: Tensor) -> Tensor:
        """Scores of coordinates float64 [N, K]."""
        return -energy(rows @ self.probe_weight.double().T + self.probe_bias.double())


class Neighbours(LowDimScore):
    """Distance to the 5th nearest training image in the subspace, all rows of length one, instead of a probe.

    State: basis and offset as above, bank float32 [n, K].
    """

    tensors: ClassVar[tuple[str, ...]] = ("basis", "offset", "bank")
    bank: Tensor

    def _finish(self, space: Subspace, labels: Tensor) -> State:
        return {"basis": space.basis, "offset": space.offset, "bank": unit_rows(space.rows).float()}

    def _rank(self, rows: Tensor) -> Tensor:
        queries = max(1, CHUNK_CELLS // len(self.bank))
        return torch.cat([self._distance(part) for part in torch.split(unit_rows(rows), queries)])

    def _distance(self, queries: Tensor) -> Tensor:
        wanted = min(NEIGHBOURS, len(self.bank))
        _, found = smallest(products(self.bank, -queries.float()), min(CANDIDATES, len(self.bank)))
        distances = torch.linalg.vector_norm(queries - self.bank[found].double(), dim=2)
        nearest: Tensor = distances.kthvalue(wanted, dim=0).values
        return nearest


@register
class LowDimLast(LowDimScore):
    """The energy of a linear probe on the gradient at the last layer, bias included.

    Principal directions, at most 200, of up to 200,000 entries C (D + 1); beyond, the averages of the C classes.
    """

    name: ClassVar[str] = "lowdim_last"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (Features,)

    @classmethod
    def refuse(cls, backbone: Backbone, options: FitOptions) -> None:
        size = entries(backbone.weight)
        columns = COLUMNS if size <= LARGEST_PCA else backbone.num_classes
        refuse_large(size, columns, "Use a score that does not grow with the classes times the features.")

    def _fit(self, backbone: Backbone) -> State:
        rows = self.got(Features).kept()
        features, labels = rows["features"], rows["labels"]
        need_all_classes(labels, self.options.num_classes)
        weight, bias = backbone.weight.cpu(), backbone.bias.cpu()
        gradients = WhitenedRows(last_layer_blocks(features, weight, bias))
        if entries(weight) <= LARGEST_PCA:
            return self._finish(principal(gradients, COLUMNS), labels)
        return self._finish(class_averages(gradients, labels, len(weight)), labels)

    def _score(self, outputs: Outputs) -> Tensor:
        p, h = torch.softmax(outputs.logits.double(), dim=1), extended(outputs.penultimate)
        basis = self.basis.reshape(p.shape[1], h.shape[1], -1)
        rows = -self.offset.double().expand(len(h), -1)
        for label in range(p.shape[1]):  # class by class, so that no gradient stands in memory
            rows = rows + p[:, label, None] * (h @ basis[label].double())
        return self._rank(rows)


@register
class LowDimLastKnn(Neighbours, LowDimLast):
    """Distance to the 5th nearest training image in the same subspace, without a probe."""

    name: ClassVar[str] = "lowdim_last_knn"


def extended(features: Tensor) -> Tensor:
    """[h; 1], float64 [N, D + 1]."""
    h = features.double()
    return torch.cat([h, h.new_ones(len(h), 1)], dim=1)


def entries(weight: Tensor) -> int:
    """Entries C (D + 1) of a gradient at the last layer, its weight [C, D]."""
    return len(weight) * (weight.shape[1] + 1)


def last_layer_blocks(features: Tensor, weight: Tensor, bias: Tensor) -> Blocks:
    """Gradients of log sum exp f at the last layer: p (x) [h; 1], class by class, float32 [b, C (D + 1)]."""

    def blocks() -> Iterator[Tensor]:
        for part in torch.split(features, max(1, BLOCK_CELLS // entries(weight))):
            p = torch.softmax(part.double() @ weight.double().T + bias.double(), dim=1)
            yield (p[:, :, None] * extended(part)[:, None]).flatten(1).float()

    return blocks


def need_all_classes(labels: Tensor, classes: int) -> None:
    """EmptyClass where a class has no label."""
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise EmptyClass(f"no training image has label {empty[:10]}; every output of the network needs images")


def train_probe(rows: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A batch norm and a linear layer, trained on coordinates [n, K] and labels [n], as one linear map.

    Ten epochs of SGD on the CPU from a fixed seed, whatever the state of the global generator.

    Returns:
        weight float32 [C, K] and bias float32 [C].
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        rows, labels = rows.detach().cpu().clone(), labels.cpu().clone()
        norm, linear = nn.BatchNorm1d(rows.shape[1]), nn.Linear(rows.shape[1], classes)
        probe = nn.Sequential(norm, linear)
        parameters = list(probe.parameters())
        velocities = [torch.zeros_like(parameter) for parameter in parameters]
        for _ in range(EPOCHS):
            for batch in torch.split(torch.randperm(len(rows)), BATCH):
                if len(batch) > 1:  # a batch norm cannot learn from one row
                    loss = nn.functional.cross_entropy(probe(rows[batch]), labels[batch])
                    _step(parameters, velocities, torch.autograd.grad(loss, parameters))
    return _folded(norm, linear)


@torch.no_grad()
def _step(parameters: Sequence[Tensor], velocities: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    # By hand: the first optimiser of a process loads torch's compiler, which takes longer than all of these steps.
    for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
        velocity.mul_(MOMENTUM).add_(gradient + DECAY * parameter)
        parameter.sub_(RATE * velocity)


def _folded(norm: nn.BatchNorm1d, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    with torch.no_grad():
        scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
        weight = linear.weight.double() * scale
        bias = linear.bias.double() + linear.weight.double() @ norm.bias.double() - weight @ mean.double()
        return weight.float(), bias.float()
