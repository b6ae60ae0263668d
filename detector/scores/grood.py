# SPDX-License-Identifier: Apache-2.0
"""GROOD (ElAraby et al., arXiv 2312.14427): the gradient of a nearest-prototype loss at one synthetic OOD prototype.

With class prototypes p_1..p_C (class means of the penultimate features h) and an OOD prototype q,

    s_k = -||h - p_k||,  k = 1..C, and s_q = -||h - q||        no temperature, not squared
    pi  = softmax(s_1..s_C, s_q),  L(h) = -log pi_y            y a class, never the OOD slot
    g(h) = dL/dq = pi_q (h - q) / ||h - q||                     so ||g|| = pi_q, and y does not matter

`grood` scores an image by the Euclidean distance from g(h) to the nearest gradient of a correctly classified training
image; `grood_norm` by ||g(h)||_1, which needs no training gradients.
"""

from __future__ import annotations

from math import ceil
from typing import ClassVar, Self

import torch
from torch import Tensor

from detector.backbone import Backbone, Outputs
from detector.errors import EmptyClass, ScoreError
from detector.scores.base import FitOptions, Needs, State, register
from detector.scores.reservoir import Reservoir

CANDIDATES = 16  # found in float32, then measured in float64
ROUNDING = 1e-5  # of a squared distance in float32, in units of the squared gradient
CHUNK_CELLS = 2**22  # queries x bank rows held at a time
SAFE_NORM = 1e-30  # a float32 gradient this short still has its direction


def grood_gradient(features: Tensor, prototypes: Tensor, ood_prototype: Tensor) -> tuple[Tensor, Tensor]:
    """The closed form of dL/dq for a batch.

    Args:
        features: [N, D].
        prototypes: [C, D].
        ood_prototype: [D].

    Returns:
        unit direction float64 [N, D] and log pi_q float64 [N]; the gradient is exp(log pi_q) x direction.
    """
    h, q = features.double(), ood_prototype.double()
    anchors = torch.vstack([prototypes.double(), q])
    # The matrix-product shortcut of cdist loses the digits that near-zero gradients live on.
    distances = torch.cdist(h, anchors, compute_mode="donot_use_mm_for_euclid_dist")
    log_pi = torch.log_softmax(-distances, dim=1)[:, -1]
    direction = (h - q) / distances[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    return direction, log_pi


class Gathered:
    """What one pass over the training images leaves for GROOD: class sums, and two reservoirs.

    The OOD prototype is the mean of the features that the network gives to mixed early maps,
    lambda e(x) + (1 - lambda) mean of e over the runner-up class of x.
    """

    def __init__(self, options: FitOptions, *, keep_bank: bool) -> None:
        self.options = options
        self.keep_bank = keep_bank
        classes = options.num_classes
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.sums = torch.zeros(classes, 0, dtype=torch.float64)
        self.early_sums = torch.zeros(classes, 0, dtype=torch.float64)
        self.early_shape = torch.zeros(0, dtype=torch.int64)
        self.bank = Reservoir(None if options.bank_size is None else ceil(options.bank_size / classes))
        self.mixup = Reservoir(ceil(options.mixup_images / classes))

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        if outputs.early is None or outputs.ids is None:
            raise ScoreError("GROOD is fitted from outputs that carry the early layer and the image ids")
        self.early_shape = torch.tensor(outputs.early.shape[1:])
        self.counts += torch.bincount(labels.cpu(), minlength=len(self.counts))
        self.sums = _added(self.sums, _class_sums(outputs.penultimate, labels, len(self.counts)))
        self.early_sums = _added(self.early_sums, _class_sums(outputs.early.flatten(1), labels, len(self.counts)))
        best_two = outputs.logits.topk(2, dim=1).indices
        self.mixup.add(outputs.ids, labels, early=outputs.early, runner_up=best_two[:, 1])
        if self.keep_bank:
            correct = best_two[:, 0] == labels.to(best_two.device)
            self.bank.add(outputs.ids[correct.cpu()], labels[correct.cpu()], features=outputs.penultimate[correct])

    def merge(self, other: Gathered) -> None:
        self.counts += other.counts
        self.sums = _added(self.sums, other.sums.clone())
        self.early_sums = _added(self.early_sums, other.early_sums.clone())
        self.early_shape = other.early_shape if len(other.early_shape) else self.early_shape
        self.bank.merge(other.bank)
        self.mixup.merge(other.mixup)

    def progress(self) -> State:
        tensors = {"counts": self.counts, "sums": self.sums, "early_sums": self.early_sums, "shape": self.early_shape}
        bank = {f"bank.{name}": value for name, value in self.bank.rows().items()}
        mixup = {f"mixup.{name}": value for name, value in self.mixup.rows().items()}
        return tensors | bank | mixup

    def restore(self, progress: State) -> None:
        self.counts, self.sums = progress["counts"], progress["sums"]
        self.early_sums, self.early_shape = progress["early_sums"], progress["shape"]
        for prefix, reservoir in (("bank.", self.bank), ("mixup.", self.mixup)):
            rows = {name.removeprefix(prefix): value for name, value in progress.items() if name.startswith(prefix)}
            if rows:
                reservoir.add(rows.pop("ids"), rows.pop("labels"), **rows)

    def prototypes(self) -> Tensor:
        empty = (self.counts == 0).nonzero().flatten().tolist()
        if empty:
            raise EmptyClass(f"no training image has label {empty[:10]}; every output of the network needs images")
        return (self.sums / self.counts[:, None]).float()

    def ood_prototype(self, backbone: Backbone, batch_size: int = 100) -> Tensor:
        rows = self.mixup.rows()
        share = self.options.mixup_coefficient
        total = torch.zeros(self.sums.shape[1], dtype=torch.float64)
        for start in range(0, len(rows["ids"]), batch_size):
            part = slice(start, start + batch_size)
            runner_up = rows["runner_up"][part]
            other = (self.early_sums[runner_up] / self.counts[runner_up, None]).reshape(-1, *self.early_shape.tolist())
            mixed = share * rows["early"][part].double() + (1 - share) * other
            total += backbone.resume(mixed.float()).double().sum(dim=0).cpu()
        return (total / len(rows["ids"])).float()


class GroodFamily:
    """The fit that the forms of GROOD share."""

    keep_bank: ClassVar[bool]

    def __init__(self, options: FitOptions) -> None:
        self._gathered = Gathered(options, keep_bank=self.keep_bank)

    def partial_fit(self, outputs: Outputs, labels: Tensor) -> Self:
        self._gathered.add(outputs, labels)
        return self

    def merge(self, other: Self) -> Self:
        self._gathered.merge(other._gathered)
        return self

    def progress(self) -> State:
        return self._gathered.progress()

    def restore(self, progress: State) -> Self:
        self._gathered.restore(progress)
        return self

    def _set_prototypes(self, prototypes: Tensor, ood_prototype: Tensor, device: torch.device) -> None:
        self.prototypes, self.ood_prototype = prototypes.to(device), ood_prototype.to(device)


@register
class Grood(GroodFamily):
    """Distance from an image's gradient to the nearest training gradient, exact.

    State: prototypes float32 [C, D], ood_prototype float32 [D], bank [B, D]: the training gradients, float32, or
    float64 where one is too short for float32 to hold its direction.
    """

    name: ClassVar[str] = "grood"
    needs: ClassVar[Needs] = Needs(early=True)
    shares_fit_with: ClassVar[str | None] = None
    keep_bank: ClassVar[bool] = True

    def finalize(self, backbone: Backbone) -> Self:
        prototypes = self._gathered.prototypes()
        ood_prototype = self._gathered.ood_prototype(backbone)
        rows = self._gathered.bank.rows()
        if not rows:
            raise ScoreError("no training image is classified correctly; check the order of the classes")
        direction, log_pi = grood_gradient(rows["features"], prototypes, ood_prototype)
        bank = log_pi.exp()[:, None] * direction
        self._set_prototypes(prototypes, ood_prototype, backbone.device)
        self._set_bank(bank.float() if bool((log_pi.exp() >= SAFE_NORM).all()) else bank, backbone.device)
        return self

    def score(self, outputs: Outputs) -> Tensor:
        queries = max(1, CHUNK_CELLS // len(self.bank))
        parts = [self._nearest(features) for features in torch.split(outputs.penultimate, queries)]
        return torch.cat(parts)

    def state(self) -> State:
        return {"prototypes": self.prototypes, "ood_prototype": self.ood_prototype, "bank": self.bank}

    @classmethod
    def from_state(cls, state: State, backbone: Backbone) -> Self:
        score = cls(FitOptions(num_classes=len(state["prototypes"])))
        score._set_prototypes(state["prototypes"], state["ood_prototype"], backbone.device)
        score._set_bank(state["bank"], backbone.device)
        return score

    def _set_bank(self, bank: Tensor, device: torch.device) -> None:
        self.bank = bank.to(device)
        norms = torch.linalg.vector_norm(self.bank, dim=1, dtype=torch.float64)
        norms = norms.clamp_min(torch.finfo(torch.float64).tiny)
        self._bank_directions = self.bank.div(norms.to(bank.dtype)[:, None]).float()
        self._bank_log_pi = norms.log()

    def _nearest(self, features: Tensor) -> Tensor:
        direction, log_pi = grood_gradient(features, self.prototypes, self.ood_prototype)
        # The nearest is no farther than ||g|| + the shortest gradient of the bank; in units of the longer of the two,
        # nothing that matters overflows or vanishes in float32, and ||g - b||^2 = own^2 + theirs^2 - 2 own theirs cos.
        unit = torch.maximum(log_pi, self._bank_log_pi.min())
        own = (log_pi - unit).exp().float()[:, None]
        theirs = (self._bank_log_pi - unit[:, None]).clamp_max(20).exp().float()
        cosine = direction.float() @ self._bank_directions.T
        key = theirs * (theirs - 2 * own * cosine)
        near = key.topk(min(CANDIDATES, len(self.bank)), largest=False)
        nearest = self._exact(direction, log_pi, unit, near.indices)
        # Proven where even the last candidate is farther than the nearest found; else measure all.
        last = near.values[:, -1].double() + own[:, 0].double().square()
        unsure = (last <= nearest.square() + ROUNDING).nonzero().flatten() if len(self.bank) > CANDIDATES else []
        everything = torch.arange(len(self.bank), device=self.bank.device)
        for query in unsure:
            one = slice(int(query), int(query) + 1)
            nearest[one] = self._exact(direction[one], log_pi[one], unit[one], everything[None])
        return nearest * unit.exp()

    def _exact(self, direction: Tensor, log_pi: Tensor, unit: Tensor, candidates: Tensor) -> Tensor:
        """Distance to the nearest of some bank rows, float64, in units of exp(unit)."""
        own = (log_pi - unit).exp()[:, None, None] * direction[:, None]
        length = (self._bank_log_pi[candidates] - unit[:, None]).clamp_max(300).exp()
        stored = self.bank[candidates].double()
        norms = self._bank_log_pi[candidates].exp()
        theirs = stored / norms[..., None] * length[..., None]
        distance: Tensor = torch.linalg.vector_norm(own - theirs, dim=2)
        return distance.amin(dim=1)


@register
class GroodNorm(GroodFamily):
    """The index-free form: ||g||_1 = pi_q ||h - q||_1 / ||h - q||_2.

    State: prototypes float32 [C, D], ood_prototype float32 [D].
    """

    name: ClassVar[str] = "grood_norm"
    needs: ClassVar[Needs] = Needs(early=True)
    shares_fit_with: ClassVar[str | None] = "grood"
    keep_bank: ClassVar[bool] = False

    def finalize(self, backbone: Backbone) -> Self:
        self._set_prototypes(self._gathered.prototypes(), self._gathered.ood_prototype(backbone), backbone.device)
        return self

    def score(self, outputs: Outputs) -> Tensor:
        direction, log_pi = grood_gradient(outputs.penultimate, self.prototypes, self.ood_prototype)
        return log_pi.exp() * direction.abs().sum(dim=1)

    def state(self) -> State:
        return {"prototypes": self.prototypes, "ood_prototype": self.ood_prototype}

    @classmethod
    def from_state(cls, state: State, backbone: Backbone) -> Self:
        score = cls(FitOptions(num_classes=len(state["prototypes"])))
        score._set_prototypes(state["prototypes"], state["ood_prototype"], backbone.device)
        return score


def _class_sums(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    total = torch.zeros(classes, rows.shape[1], dtype=torch.float64, device=rows.device)
    return total.index_add_(0, labels.to(rows.device), rows.double()).cpu()


def _added(total: Tensor, part: Tensor) -> Tensor:
    if part.shape[1] == 0:
        return total
    return part if total.shape[1] == 0 else total.add_(part)
