# SPDX-License-Identifier: Apache-2.0
"""A fit on a real Ray: the same scores as here, each image once, whatever dies. `make test-ray` runs it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed; `make test-ray` brings it")

from benchmarks.scaling.cluster import machine  # noqa: E402
from detector import features, fit_ray  # noqa: E402
from detector.backbone import Backbone  # noqa: E402
from detector.data import Dataset, open_dataset  # noqa: E402
from detector.errors import DataError  # noqa: E402
from detector.features import silent  # noqa: E402
from detector.networks import CIFAR_PREPROCESSING  # noqa: E402
from detector.scores import FitOptions, Score  # noqa: E402
from tests.helpers import TOY_CLASSES, toy_images, toy_network  # noqa: E402

SHARDS = 4
IMAGES = SHARDS * fit_ray.SHARD - 37  # the last shard is short, and its last batch too
NAMES = ("grood", "mds", "vim", "knn", "nci")
OPTIONS = FitOptions(num_classes=len(TOY_CLASSES), bank_size=200, mixup_images=40)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with machine(OODGATE_COMPILE="off"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for index, (image, label) in enumerate(zip(*toy_images(IMAGES, seed=1), strict=True)):
        (root / TOY_CLASSES[label]).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / TOY_CLASSES[label] / f"{index:05}.png")
    return root


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder, CIFAR_PREPROCESSING, classes=TOY_CLASSES)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(toy_network().module, CIFAR_PREPROCESSING)


@pytest.fixture(scope="module")
def local(backbone: Backbone, dataset: Dataset) -> tuple[dict[str, Score], torch.Tensor]:
    return features.fit_scores(NAMES, backbone, dataset, OPTIONS)


def assert_same(fitted: tuple[dict[str, Score], torch.Tensor], local: tuple[dict[str, Score], torch.Tensor]) -> None:
    scores, ids = fitted
    assert torch.equal(ids, local[1])  # each image once, in order
    for name, score in scores.items():
        ours, theirs = score.state(), local[0][name].state()
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            np.testing.assert_allclose(
                value.double(), theirs[key].double(), rtol=1e-5, atol=1e-6, err_msg=f"{name}.{key}"
            )


def test_the_result_is_that_of_a_local_fit(
    backbone: Backbone, dataset: Dataset, local: tuple[dict[str, Score], torch.Tensor]
) -> None:
    told: list[int] = []
    fitted = fit_ray.fit_scores(NAMES, backbone, dataset, OPTIONS, report=told.append)
    assert sum(told) == len(dataset) == IMAGES
    assert_same(fitted, local)


def test_class_sums_agree_to_ten_digits_with_those_of_a_local_fit(
    backbone: Backbone, dataset: Dataset, local: tuple[dict[str, Score], torch.Tensor]
) -> None:
    scores, _ = fit_ray.fit_scores(["mds"], backbone, dataset, OPTIONS)
    [here] = [kind for kind in local[0]["mds"].gathered.values() if type(kind).__name__ == "ClassSums"]
    [there] = [kind for kind in scores["mds"].gathered.values() if type(kind).__name__ == "ClassSums"]
    assert torch.equal(there.progress()["counts"], here.progress()["counts"])
    torch.testing.assert_close(there.means(), here.means(), rtol=1e-10, atol=1e-12)


def test_a_worker_that_dies_costs_no_image_and_counts_none_twice(
    backbone: Backbone, dataset: Dataset, local: tuple[dict[str, Score], torch.Tensor]
) -> None:
    killed: list[int] = []

    def kill_the_worker(_: int) -> None:
        if not killed:
            from ray.util.state import list_actors

            workers = [actor for actor in list_actors(filters=[("state", "=", "ALIVE")]) if actor.pid]
            killed.append(next(actor.pid for actor in workers if "Map" in actor.class_name))
            os.kill(killed[0], signal.SIGKILL)

    fitted = fit_ray.fit_scores(NAMES, backbone, dataset, OPTIONS, report=kill_the_worker)
    assert killed
    assert_same(fitted, local)


def test_a_fit_that_was_interrupted_goes_on_where_it_stopped(
    backbone: Backbone,
    dataset: Dataset,
    local: tuple[dict[str, Score], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit_ray, "KEEP_EVERY", 1)

    class Interrupted(Exception): ...

    def interrupt(_: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        fit_ray.fit_scores(NAMES, backbone, dataset, OPTIONS, workdir=tmp_path, report=interrupt)
    resumed: list[int] = []
    fitted = fit_ray.fit_scores(
        NAMES, backbone, dataset, OPTIONS, workdir=tmp_path, report=silent, resumed=resumed.append
    )
    assert resumed == [fit_ray.SHARD]
    assert_same(fitted, local)


def test_a_shard_that_comes_twice_is_refused(
    backbone: Backbone, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = fit_ray._shards

    def twice(*arguments: object, **options: object) -> Iterator[fit_ray.Row]:
        for shard in shards(*arguments, **options):  # type: ignore[arg-type]
            yield shard
            yield shard

    monkeypatch.setattr(fit_ray, "_shards", twice)
    with pytest.raises(DataError, match="were due"):
        fit_ray.fit_scores(["mds"], backbone, dataset, OPTIONS)
