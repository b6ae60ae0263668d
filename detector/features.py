# SPDX-License-Identifier: Apache-2.0
"""Stream a data set through a backbone: into one set of outputs, or into scores that are being fitted.

A fit leaves its progress on disk now and then and goes on from there; the result is the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from detector.artifact import writing
from detector.backbone import Backbone
from detector.data import Dataset, Labels, batches
from detector.errors import DataError
from detector.images import image_ids
from detector.outputs import BATCH, Outputs, concatenate
from detector.scores import FitOptions, Gatherer, Score, registry, score_all
from detector.scores.gather import known_ids

SHARD = 8 * BATCH  # images that are summed by themselves, then merged: every engine rounds alike
RECORD = 5_000  # images between two records of progress
Report = Callable[[int], None]  # told how many more images are done


def silent(images: int) -> None:
    """A Report that tells nobody."""


@dataclass(frozen=True)
class Collected:
    """The outputs of a whole data set, with ids, its labels int64 [N], and scores float64 [N] by name."""

    outputs: Outputs
    labels: Labels
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ids(self) -> Tensor:
        if self.outputs.ids is None:
            raise AssertionError("collected outputs always carry ids")
        return self.outputs.ids

    def __getitem__(self, index: Tensor) -> Collected:
        values = {name: value[index] for name, value in self.values.items()}
        return Collected(self.outputs[index], self.labels[index.numpy()], values)

    def accuracy(self) -> float:
        """Share of labelled images whose label is the network's answer; NaN where none is labelled."""
        labelled = self.labels >= 0
        hits = self.outputs.logits.argmax(1).cpu().numpy()[labelled] == self.labels[labelled]
        return float(hits.mean()) if len(hits) else float("nan")


def stream(
    backbone: Backbone,
    dataset: Dataset,
    *,
    start: int = 0,
    early: bool = False,
    sizes: Sequence[int] = (BATCH,),
) -> Iterator[tuple[Outputs, Tensor]]:
    """Outputs with ids, and labels int64 [N], in batches of these sizes by turns."""
    for batch in batches(dataset, sum(sizes), start=start):
        images, labels, ids = batch.images, torch.from_numpy(batch.labels), torch.from_numpy(image_ids(batch.images))
        for part in torch.arange(len(images)).tensor_split(np.cumsum(sizes)[:-1].tolist()):
            if len(part):
                outputs = backbone.outputs(torch.from_numpy(images)[part], early=early)
                yield outputs.with_ids(ids[part]), labels[part]


def collect(
    backbone: Backbone,
    dataset: Dataset,
    *,
    scores: Mapping[str, Score] | None = None,
    names: Sequence[str] | None = None,
    report: Report = silent,
    sizes: Sequence[int] = (BATCH,),
) -> Collected:
    """Logits, penultimate features and ids of a whole data set, and scores of its images.

    Args:
        backbone, dataset: what to run, and on what.
        scores: fitted scores.
        names: which of them to compute, batch by batch as a server does; all where not given.
        report: told of images done.
        sizes: images in each forward pass, by turns.
    """
    fitted = scores or {}
    wanted = list(fitted) if names is None else list(names)
    parts: list[Outputs] = []
    values: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for each, _ in stream(backbone, dataset, sizes=sizes):
        outputs = each.with_statistics()
        parts.append(replace(outputs, inputs=None))
        for name, value in score_all(fitted, wanted, outputs).items():
            values[name].append(value)
        report(len(outputs))
    together = {name: torch.cat(pieces) for name, pieces in values.items()}
    return Collected(concatenate(parts), dataset.labels, together)


class Gather(Protocol):
    """`gather`, or what does the same elsewhere."""

    def __call__(
        self,
        gatherers: Mapping[str, Gatherer],
        backbone: Backbone,
        dataset: Dataset,
        options: FitOptions,
        start: int,
    ) -> Iterator[Tensor]: ...


def gather(
    gatherers: Mapping[str, Gatherer], backbone: Backbone, dataset: Dataset, options: FitOptions, start: int
) -> Iterator[Tensor]:
    """Pass over the training images from `start` on, in their order, and let the gatherers take them in.

    Yields:
        ids int64 [N] of the images that all gatherers have taken in since the last.
    """
    early = any(each.needs_early for each in gatherers.values())
    batches = stream(backbone, dataset, start=start, early=early)
    kinds = [type(gatherer) for gatherer in gatherers.values()]
    for first in range(start, len(dataset), SHARD):
        shard = islice(batches, ceil(min(SHARD, len(dataset) - first) / BATCH))
        parts, ids = gather_shard(kinds, options, shard)
        for name in tuple(parts):
            gatherers[name].merge(parts.pop(name))  # else sums of large maps would stand beside those of the next shard
        yield ids


def gather_shard(
    kinds: Iterable[type[Gatherer]], options: FitOptions, batches: Iterable[tuple[Outputs, Tensor]]
) -> tuple[dict[str, Gatherer], Tensor]:
    """What gatherers of these kinds, by name, gather from batches of one shard; and its ids int64 [N]."""
    parts, ids = {kind.__name__: kind(options) for kind in kinds}, []
    for outputs, labels in batches:
        for part in parts.values():
            part.add(outputs, labels)
        ids.append(known_ids(outputs))
    return parts, torch.cat(ids)


def fit_scores(
    names: Sequence[str],
    backbone: Backbone,
    dataset: Dataset,
    options: FitOptions,
    *,
    engine: Gather = gather,
    workdir: Path | None = None,
    report: Report = silent,
    resumed: Report = silent,
) -> tuple[dict[str, Score], Tensor]:
    """Fit scores in one pass over labelled images.

    Args:
        names: scores of the registry.
        backbone: the network.
        dataset: labelled images.
        options: what every score is told.
        engine: what passes over the images; any goes on from where another was interrupted.
        workdir: where progress is kept; a pass that was interrupted goes on from there. None keeps none.
        report: told of images done.
        resumed: told how many images an interrupted pass had done, where one goes on.

    Returns:
        the fitted scores by name, and the ids int64 [N] of the images they were fitted on.

    Raises:
        DataError: an image cannot be read, or the engine did not take in each image once.
    """
    scores = {name: registry()[name](options) for name in names}
    gatherers = share_gatherers(scores.values())
    progress = Progress(workdir, fit_key(backbone, dataset, options, sorted(gatherers))) if workdir else None
    done, ids = progress.load(gatherers) if progress else (0, torch.zeros(0, dtype=torch.int64))
    if done:
        resumed(done)
        report(done)
    parts = [ids]
    for part in engine(gatherers, backbone, dataset, options, done):
        parts.append(part)
        before, done = done, done + len(part)
        if progress and done // RECORD > before // RECORD:
            progress.save(gatherers, torch.cat(parts))
        report(len(part))
    if done != len(dataset):
        raise DataError(f"{done:,} images were taken in, of {len(dataset):,} training images; start the fit again")
    for score in scores.values():
        score.finalize(backbone)
    return scores, torch.cat(parts)


def bind(scores: Mapping[str, Score]) -> None:
    """Hand scores that are made of others the others."""
    for score in scores.values():
        score.bind(scores)


def tune_scores(scores: Mapping[str, Score], tuned: Collected) -> None:
    """Fix what scores choose on the tune split, members before what is made of them."""
    bind(scores)
    labels = torch.from_numpy(tuned.labels)
    for score in sorted(scores.values(), key=lambda score: bool(score.members)):
        score.tune(tuned.outputs, labels)


def share_gatherers(scores: Iterable[Score]) -> dict[str, Gatherer]:
    """Let scores that gather the same thing share one gatherer.

    Returns:
        all gatherers by the name of their class.
    """
    pool: dict[type[Gatherer], Gatherer] = {}
    for score in scores:
        score.gathered = {kind: pool.setdefault(kind, own) for kind, own in score.gathered.items()}
    return {kind.__name__: gatherer for kind, gatherer in pool.items()}


class Progress:
    """What a fit has gathered so far, in one file that is replaced as a whole."""

    def __init__(self, workdir: Path, key: str) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self.path, self.key = workdir / "progress.safetensors", key

    def load(self, gatherers: Mapping[str, Gatherer]) -> tuple[int, Tensor]:
        """Give the gatherers back what they had; the number of images done, and their ids."""
        nothing = 0, torch.zeros(0, dtype=torch.int64)
        if not self.path.exists():
            return nothing
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != self.key:
                return nothing
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        ids = tensors.pop("ids")
        for name, gatherer in gatherers.items():
            prefix = f"{name}."
            gatherer.restore({key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)})
        return len(ids), ids

    def save(self, gatherers: Mapping[str, Gatherer], ids: Tensor) -> None:
        """Write what was gathered from the images of these ids; ArtifactError where the disk does not take it."""
        gathered = {
            f"{name}.{key}": value for name, kind in gatherers.items() for key, value in kind.progress().items()
        }
        tensors = {key: value.contiguous() for key, value in gathered.items()} | {"ids": ids}
        partial = self.path.with_suffix(".partial")
        with writing(self.path):
            save_file(tensors, partial, {"key": self.key})
            partial.replace(self.path)


def fit_key(backbone: Backbone, dataset: Dataset, options: FitOptions, names: Sequence[str]) -> str:
    """A digest of all that what is gathered depends on: network, images, labels, options, and what is gathered."""
    weights = hashlib.sha256()
    for name, value in sorted(backbone.module.state_dict().items()):
        weights.update(name.encode() + np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    parts = [weights.hexdigest(), dataset.fingerprint(), backbone.preprocessing.model_dump_json(), backbone.early]
    # What is gathered does not depend on how the OOD prototype is made of it, nor on how it is searched.
    told = asdict(replace(options, ood_images=None, index=False))
    return hashlib.sha256(json.dumps([*parts, told, list(names), BATCH]).encode()).hexdigest()
