# SPDX-License-Identifier: Apache-2.0
"""The pass over the training images on a Ray cluster, in shards. Needs the extra `ray`.

Ray Data decodes on the cores and runs the network on the accelerators; what each shard leaves behind is merged here, in
the order of the images. A shard whose worker is lost is done again by Ray, and is counted once: the ids of its images
come with what was gathered from them, in one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from safetensors.torch import load, save
from torch import Tensor, nn

from detector.backbone import Backbone
from detector.data import Dataset
from detector.errors import DataError
from detector.features import SHARD, gather_shard
from detector.images import Preprocessing, image_ids
from detector.outputs import BATCH, Outputs
from detector.scores import FitOptions, Gatherer

Row = dict[str, Any]
Kinds = tuple[type[Gatherer], ...]


def gather(
    gatherers: Mapping[str, Gatherer],
    backbone: Backbone,
    dataset: Dataset,
    options: FitOptions,
    start: int,
    *,
    shard: int = SHARD,
) -> Iterator[Tensor]:
    """`detector.features.gather` on the Ray cluster that `RAY_ADDRESS` names, else one that runs here, else its own.

    The files of the data set must be readable under the same paths or URIs on every node. `shard`, rounded up to whole
    batches, is how many images a worker holds, and how many leave one state behind, to be sent and merged:
    docs/scaling.md.

    Raises:
        DataError: an image cannot be read, or a shard came back other than asked for.
    """
    shard = -(-shard // BATCH) * BATCH
    kinds = tuple(type(gatherer) for gatherer in gatherers.values())
    for row in _shards(kinds, backbone, dataset, options, range(start, len(dataset), shard)):
        expected = range(start, min(start + shard, len(dataset)))
        _merge(gatherers, options, row, expected)
        start = expected.stop
        yield torch.from_numpy(np.frombuffer(row["ids"], np.int64).copy())


def _shards(kinds: Kinds, backbone: Backbone, dataset: Dataset, options: FitOptions, starts: range) -> Iterator[Row]:
    """What was gathered from each shard, in the order of the images."""
    if not starts:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    on_gpu = backbone.device.type == "cuda"
    places = max(1, int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)))
    DataContext.get_current().execution_options.preserve_order = True
    shared = ray.put(dataset)
    network = _Network(backbone.module, backbone.preprocessing, backbone.head, backbone.early, backbone.device.type)
    rows = ray.data.from_items(
        [{"start": first, "stop": min(first + starts.step, len(dataset))} for first in starts],
        override_num_blocks=len(starts),
    )
    # Without accelerators Ray joins the two stages in one worker, which saves it from passing the images on.
    shards = rows.map(_decode, fn_kwargs={"dataset": shared}, num_cpus=1).map(
        _Extract,
        fn_constructor_args=(ray.put(network), kinds, options),
        compute=ActorPoolStrategy(min_size=1, max_size=places),
        num_cpus=0 if on_gpu else 1,
        num_gpus=1 if on_gpu else 0,
    )
    yield from shards.iter_rows()


def _merge(gatherers: Mapping[str, Gatherer], options: FitOptions, shard: Row, expected: range) -> None:
    """Take in one shard. DataError where it has a problem, or is not the next one, whole."""
    if shard["problem"]:
        raise DataError(shard["problem"])
    images = len(shard["ids"]) // 8
    if shard["start"] != expected.start or images != len(expected):
        raise DataError(
            f"images {expected.start:,} to {expected.stop:,} were due; {images:,} from {shard['start']:,} on came back"
        )
    tensors = load(shard["state"])
    for name, gatherer in gatherers.items():
        prefix = f"{name}."
        part = type(gatherer)(options)
        part.restore({key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)})
        gatherer.merge(part)


@dataclass(frozen=True)
class _Network:
    """What makes the backbone again elsewhere."""

    module: nn.Module
    preprocessing: Preprocessing
    head: str
    early: str | None
    device: str


def _decode(row: Row, dataset: Any) -> Row:
    """The images of a shard, as the network takes them, or what is wrong with one."""
    images: Dataset = ray.get(dataset)
    try:
        pixels = np.stack([images.read(index) for index in range(row["start"], row["stop"])])
    except DataError as error:  # as a value: Ray would wrap it, and try again what cannot succeed
        return {"start": row["start"], "shape": [0], "pixels": b"", "labels": b"", "problem": str(error)}
    return {
        "start": row["start"],
        "shape": list(pixels.shape),
        "pixels": pixels.tobytes(),
        "labels": images.labels[row["start"] : row["stop"]].tobytes(),
        "problem": "",
    }


class _Extract:
    """A worker that owns the network: a shard of images in, what the scores gather from it out."""

    def __init__(self, network: Any, kinds: Kinds, options: FitOptions) -> None:
        built: _Network = ray.get(network) if isinstance(network, ray.ObjectRef) else network
        self.backbone = Backbone(
            built.module, built.preprocessing, head=built.head, early=built.early, device=built.device
        )
        self.kinds, self.options = kinds, options

    def __call__(self, row: Row) -> Row:
        if row["problem"]:
            return {"start": row["start"], "ids": b"", "state": b"", "problem": row["problem"]}
        parts, ids = gather_shard(self.kinds, self.options, self._batches(row))
        state = {
            f"{name}.{key}": value.contiguous()
            for name, part in parts.items()
            for key, value in part.progress().items()
        }
        return {"start": row["start"], "ids": ids.numpy().tobytes(), "state": save(state), "problem": ""}

    def _batches(self, row: Row) -> Iterator[tuple[Outputs, Tensor]]:
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(tuple(row["shape"]))
        labels = torch.from_numpy(np.frombuffer(row["labels"], np.int64).copy())
        ids = torch.from_numpy(image_ids(pixels))
        early = any(kind.needs_early for kind in self.kinds)
        for first in range(0, len(pixels), BATCH):
            part = slice(first, first + BATCH)
            outputs = self.backbone.outputs(torch.from_numpy(pixels[part].copy()), early=early)
            yield outputs.with_ids(ids[part]), labels[part]
