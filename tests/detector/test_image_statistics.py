# SPDX-License-Identifier: Apache-2.0
"""The statistics of an image and their score, against the definition written out in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from detector.backbone import Backbone
from detector.errors import ScoreError
from detector.image_statistics import image_statistics
from detector.outputs import Outputs
from detector.scores import FitOptions, registry
from tests.helpers import photo, toy_network

SIZES = [(1, 1), (3, 5), (32, 32), (127, 40), (128, 150), (200, 224)]


def pictures(height: int, width: int, count: int = 3) -> NDArray[np.uint8]:
    return np.stack([np.asarray(photo(width, height, seed)) for seed in range(count)])


def expected(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The eighteen numbers of one image [H, W, 3]."""
    side = max(1, min(image.shape[:2]) // 64)
    colours = averaged(image.astype(np.float64), side) @ np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]).T
    found = [colours.mean(axis=(0, 1)) / 765, colours.std(axis=(0, 1)) / 765]
    half = averaged(colours, 2) if min(colours.shape[:2]) > 1 else colours / 4
    for size in (colours, half):
        for along in (1, 0):
            steps = np.abs(np.diff(size, axis=along)).reshape(-1, 3)
            found.append(np.log(steps.sum(axis=0) / max(1, len(steps)) + 0.765))
    return np.concatenate(found)


def averaged(image: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    height, width = (length // side for length in image.shape[:2])
    kept = image[: height * side, : width * side]
    means: NDArray[np.float64] = kept.reshape(height, side, width, side, 3).mean(axis=(1, 3))
    return means


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_has_the_statistics_of_the_definition(size: tuple[int, int]) -> None:
    images = pictures(*size)
    found = image_statistics(torch.from_numpy(images)).numpy()
    assert np.allclose(found, np.stack([expected(image) for image in images]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (200, 224)], ids=str)
def test_an_image_has_the_same_bits_in_every_batch(size: tuple[int, int]) -> None:
    images = torch.from_numpy(pictures(*size, count=7))
    together = image_statistics(images)
    alone = torch.cat([image_statistics(images[i : i + 1]) for i in range(7)])
    assert torch.equal(together, alone)


def outputs_of(images: NDArray[np.uint8]) -> Outputs:
    count = len(images)
    inputs = torch.from_numpy(images)
    return Outputs(torch.zeros(count, 4), torch.zeros(count, 64), ids=torch.arange(count), inputs=inputs)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    network = toy_network()
    return Backbone(network.module, network.preprocessing)


def test_the_score_is_the_mahalanobis_distance_from_the_training_images(backbone: Backbone) -> None:
    images = pictures(32, 32, count=80)
    known, query = images[:60], images[60:]
    labels = torch.arange(60) % 4
    score = registry()["image_statistics"](FitOptions(num_classes=4)).partial_fit(outputs_of(known), labels)
    found = score.finalize(backbone).score(outputs_of(query)).numpy()
    rows = np.stack([expected(image) for image in known])
    inverse = np.linalg.inv(np.cov(rows.T, bias=True))
    away = np.stack([expected(image) for image in query]) - rows.mean(axis=0)
    assert np.allclose(found, np.sqrt(np.einsum("nd,de,ne->n", away, inverse, away)), rtol=2e-3)


def test_outputs_without_their_images_are_refused_by_what_to_do(backbone: Backbone) -> None:
    outputs = outputs_of(pictures(32, 32))
    score = registry()["image_statistics"](FitOptions(num_classes=4)).partial_fit(outputs, torch.arange(3))
    score.finalize(backbone)
    with pytest.raises(ScoreError, match="without their images"):
        score.score(Outputs(outputs.logits, outputs.penultimate))


def test_the_statistics_stand_for_the_images(backbone: Backbone) -> None:
    outputs = outputs_of(pictures(32, 32))
    score = registry()["image_statistics"](FitOptions(num_classes=4)).partial_fit(outputs, torch.arange(3))
    score.finalize(backbone)
    kept = replace(outputs.with_statistics(), inputs=None)
    assert torch.equal(score.score(kept), score.score(outputs))
