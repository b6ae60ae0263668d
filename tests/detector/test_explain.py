# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.datasets import load
from detector import Detector
from detector.explain import explain, heat_png
from detector.images import Pixels
from tests.helpers import toy_images

PATCH = 16


@pytest.fixture
def detector(toy: Path) -> Detector:
    return Detector.load(toy, device="cpu", precision="fp32")


def with_patches(images: Pixels, patches: Pixels) -> tuple[Pixels, NDArray[np.bool_]]:
    """Images with a patch pasted into one quarter of each, and where: bool [N, H, W].

    Quarters, so that a map which only favours the centre, or the rim, points at nothing.
    """
    generator = np.random.default_rng(0)
    images, where = images.copy(), np.zeros(images.shape[:3], dtype=bool)
    for image, patch, mask in zip(images, patches, where, strict=True):
        y, x = PATCH * generator.integers(0, 2, 2)
        image[y : y + PATCH, x : x + PATCH] = patch
        mask[y : y + PATCH, x : x + PATCH] = True
    return images, where


def pointing(heat: NDArray[np.float32], where: NDArray[np.bool_]) -> float:
    """Chance that a pixel of the patch is hotter than one beside it."""
    inside, outside = heat[where], heat[~where]
    return float((inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2)


def mean_pointing(detector: Detector, images: Pixels, patches: Pixels) -> float:
    """The mean over the images that are deferred for their patch."""
    patched, where = with_patches(images, patches)
    decisions = [[verdict.decision for verdict in detector.verdicts(part)] for part in (images, patched)]
    turned = [index for index, pair in enumerate(zip(*decisions, strict=True)) if pair == ("accept", "defer")]
    assert len(turned) >= 4
    score = detector.manifest.policy.score_name
    return float(np.mean([pointing(explain(detector, patched[i], score).heat, where[i]) for i in turned]))


def test_the_nearest_prototype_is_that_of_the_class(detector: Detector) -> None:
    images, labels = toy_images(8, seed=70)
    nearest = [explain(detector, image, "grood").nearest[0] for image in images]
    assert [distance.index for distance in nearest] == labels.tolist()


def test_distances_and_pi_are_those_of_the_definition(detector: Detector) -> None:
    image = toy_images(1, seed=71)[0][0]
    found = explain(detector, image, "grood")
    state = detector.fitted["grood"].state()
    h = detector.outputs(image[None]).penultimate.double()[0]
    distances = torch.stack([(h - p.double()).norm() for p in (*state["prototypes"], state["ood_prototype"])])
    assert [d.distance for d in found.nearest] == pytest.approx(sorted(distances[:-1].tolist())[:3], rel=1e-4)
    assert found.ood_prototype is not None
    assert found.ood_prototype.distance == pytest.approx(float(distances[-1]), rel=1e-4)
    assert found.ood_prototype.pi == pytest.approx(float(torch.softmax(-distances, dim=0)[-1]), rel=1e-3)


def test_the_heat_is_how_far_the_score_falls_where_the_image_is_hidden(detector: Detector) -> None:
    image = toy_images(1, seed=72)[0][0]
    found = explain(detector, image, "grood")
    fall, times = np.zeros((32, 32)), np.zeros((32, 32))
    score = detector.scores(detector.outputs(image[None]), ["grood"])["grood"][0]
    lowest = np.inf
    for fill in (image[:, ::-1], np.roll(image, 16, 0), np.roll(image, 16, 1)):
        for y, x in product((0, 8, 16), repeat=2):
            hidden = image.copy()
            hidden[y : y + 16, x : x + 16] = fill[y : y + 16, x : x + 16]
            without = detector.scores(detector.outputs(hidden[None]), ["grood"])["grood"][0]
            fall[y : y + 16, x : x + 16] += score - without
            times[y : y + 16, x : x + 16] += 1
            lowest = min(lowest, without)
    expected = np.maximum(fall / times, 0)
    assert found.heat == pytest.approx(expected / expected.max(), abs=1e-3)
    assert found.score_without == pytest.approx(lowest, rel=1e-3)


def test_where_hiding_changes_nothing_there_is_no_heat(detector: Detector) -> None:
    assert not explain(detector, np.full((32, 32, 3), 120, dtype=np.uint8), "grood").heat.any()


def test_every_score_has_a_heat_between_0_and_1(detector: Detector) -> None:
    image = toy_images(1, seed=72)[0][0]
    for name in detector.scores_without_backward:
        heat = explain(detector, image, name).heat
        assert heat.shape == (32, 32)
        assert 0 <= heat.min() <= heat.max() <= 1


def test_the_heat_map_is_clear_where_cold() -> None:
    heat = np.array([[0.0, 1.0]], dtype=np.float32)
    drawn = np.asarray(Image.open(io.BytesIO(heat_png(heat))))
    assert drawn[0, 0, 3] == 0
    assert drawn[0, 1].tolist() == [255, 224, 0, 204]


def test_on_the_toy_network_the_heat_points_at_a_patch_of_noise(detector: Detector) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, PATCH, PATCH, 3), dtype=np.uint8)
    assert mean_pointing(detector, toy_images(64, seed=73)[0], noise) > 0.6


@pytest.mark.data
@pytest.mark.parametrize("kind", ["noise", "svhn-test", "textures"])
def test_on_real_images_the_heat_points_at_the_odd_object(embedded: Detector, kind: str) -> None:
    images = load("cifar10-test")[0][:64]
    generator = np.random.default_rng(1)
    noise = generator.integers(0, 256, (64, PATCH, PATCH, 3), dtype=np.uint8)
    patches = noise if kind == "noise" else load(kind)[0][:64, 8 : 8 + PATCH, 8 : 8 + PATCH]
    assert mean_pointing(embedded, images, patches) > 0.6
