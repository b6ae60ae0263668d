# SPDX-License-Identifier: Apache-2.0
"""Stream a data set through a backbone: into one set of outputs, or into scores that are being fitted.

A fit leaves its progress on disk after every shard and goes on from there; the result is the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from detector.backbone import Backbone, Outputs, concatenate
from detector.data import Dataset, Labels, batches
from detector.images import image_ids
from detector.scores import FitOptions, Score, registry

BATCH = 64
SHARD = 5_000  # images between two records of progress
Report = Callable[[int], None]  # told how many more images are done


def silent(images: int) -> None:
    """A Report that tells nobody."""


@dataclass(frozen=True)
class Collected:
    """The outputs of a whole data set, with ids, and its labels int64 [N]."""

    outputs: Outputs
    labels: Labels

    @property
    def ids(self) -> Tensor:
        if self.outputs.ids is None:
            raise AssertionError("collected outputs always carry ids")
        return self.outputs.ids

    def __getitem__(self, index: Tensor) -> Collected:
        return Collected(self.outputs[index], self.labels[index.numpy()])

    def accuracy(self) -> float:
        """Share of labelled images whose label is the network's answer; NaN where none is labelled."""
        labelled = self.labels >= 0
        hits = self.outputs.logits.argmax(1).cpu().numpy()[labelled] == self.labels[labelled]
        return float(hits.mean()) if len(hits) else float("nan")


def stream(
    backbone: Backbone, dataset: Dataset, *, start: int = 0, early: bool = False, batch_size: int = BATCH
) -> Iterator[tuple[Outputs, Tensor]]:
    """Outputs with ids, and labels int64 [N], batch by batch."""
    for batch in batches(dataset, batch_size, start=start):
        outputs = backbone.outputs(torch.from_numpy(batch.images), early=early)
        yield outputs.with_ids(torch.from_numpy(image_ids(batch.images))), torch.from_numpy(batch.labels)


def collect(backbone: Backbone, dataset: Dataset, *, report: Report = silent, batch_size: int = BATCH) -> Collected:
    """Logits, penultimate features and ids of a whole data set."""
    parts = []
    for outputs, _ in stream(backbone, dataset, batch_size=batch_size):
        parts.append(outputs)
        report(len(outputs))
    return Collected(concatenate(parts), dataset.labels)


def fit_scores(
    names: Sequence[str],
    backbone: Backbone,
    dataset: Dataset,
    options: FitOptions,
    *,
    workdir: Path | None = None,
    report: Report = silent,
) -> tuple[dict[str, Score], Tensor]:
    """Fit scores in one pass over labelled images.

    Args:
        names: scores of the registry.
        backbone: the network.
        dataset: labelled images.
        options: what every score is told.
        workdir: where progress is kept; a pass that was interrupted goes on from there. None keeps none.
        report: told of images done.

    Returns:
        the fitted scores by name, and the ids int64 [N] of the images they were fitted on.
    """
    classes = registry()
    # A score that can be made from another's state is not fitted twice.
    streamed = [name for name in names if classes[name].shares_fit_with not in names]
    scores: dict[str, Score] = {name: classes[name](options) for name in streamed}
    progress = Progress(workdir, _fit_key(backbone, dataset, options, streamed)) if workdir else None
    done, ids = progress.load(scores) if progress else (0, torch.zeros(0, dtype=torch.int64))
    report(done)
    early = any(score.needs.early for score in scores.values())
    for outputs, labels in stream(backbone, dataset, start=done, early=early):
        for score in scores.values():
            score.partial_fit(outputs, labels)
        assert outputs.ids is not None
        ids = torch.cat([ids, outputs.ids])
        if progress and len(ids) // SHARD > done // SHARD:
            progress.save(scores, ids)
        done = len(ids)
        report(len(outputs))
    fitted = {name: score.finalize(backbone) for name, score in scores.items()}
    for name in names:
        source = classes[name].shares_fit_with
        if name not in fitted and source is not None:
            fitted[name] = classes[name].from_state(fitted[source].state(), backbone)
    return {name: fitted[name] for name in names}, ids


class Progress:
    """What a fit has gathered so far, in one file that is replaced as a whole."""

    def __init__(self, workdir: Path, key: str) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self.path, self.key = workdir / "progress.safetensors", key

    def load(self, scores: dict[str, Score]) -> tuple[int, Tensor]:
        """Give the scores back what they had gathered; the number of images done, and their ids."""
        nothing = 0, torch.zeros(0, dtype=torch.int64)
        if not self.path.exists():
            return nothing
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != self.key:
                return nothing
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        ids = tensors.pop("ids")
        for name, score in scores.items():
            prefix = f"{name}."
            score.restore({key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)})
        return len(ids), ids

    def save(self, scores: dict[str, Score], ids: Tensor) -> None:
        """Write what the scores have gathered from the images of these ids."""
        gathered = {f"{name}.{key}": value for name, score in scores.items() for key, value in score.progress().items()}
        tensors = {key: value.contiguous() for key, value in gathered.items()} | {"ids": ids}
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, {"key": self.key})
        partial.replace(self.path)


def _fit_key(backbone: Backbone, dataset: Dataset, options: FitOptions, names: Sequence[str]) -> str:
    weights = hashlib.sha256()
    for name, value in sorted(backbone.module.state_dict().items()):
        weights.update(name.encode() + np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    parts = [weights.hexdigest(), dataset.fingerprint(), backbone.preprocessing.model_dump_json(), backbone.early]
    return hashlib.sha256(json.dumps([*parts, asdict(options), list(names), BATCH]).encode()).hexdigest()
