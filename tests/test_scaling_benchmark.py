# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of the index says it measures, on a small bank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.scaling.recall import Known, compared, measured, views
from detector.backbone import Backbone
from detector.networks import CIFAR_PREPROCESSING
from tests.helpers import toy_network

GROUPS = {"close": "near", "distant": "far"}


@pytest.fixture(scope="module")
def known() -> Known:
    """Features around four class means; OOD sets lie between them, and far out."""
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    width = backbone.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, width, generator=generator)

    def around(centres: torch.Tensor, rows: int) -> torch.Tensor:
        return centres[torch.arange(rows) % len(centres)] + 0.2 * torch.randn(rows, width, generator=generator)

    between, out = means.mean(dim=0, keepdim=True), 3 * torch.randn(4, width, generator=generator)
    queries = {"test": around(means, 100), "close": around(between, 100), "distant": around(out, 100)}
    return Known(backbone, around(means, 3_000), queries, GROUPS, means, means.mean(dim=0))


def test_the_index_changes_scores_a_little_and_their_ranking_hardly(known: Known) -> None:
    found = measured(known, 2_000)
    assert set(found) == {"knn", "grood"}
    for score in found.values():
        assert 0.5 < score["same_score"] <= 1
        assert -1e-6 <= score["largest_excess"] < 0.3
        assert score["index_near_auroc"] == pytest.approx(score["exact_near_auroc"], abs=0.01)
        assert score["index_far_auroc"] == pytest.approx(score["exact_far_auroc"], abs=0.01)


def test_what_is_missed_shows_in_every_figure() -> None:
    exact = {"test": torch.tensor([1.0, 2.0]), "close": torch.tensor([3.0, 4.0]), "distant": torch.tensor([5.0, 6.0])}
    missed = exact | {"test": torch.tensor([1.0, 4.5])}
    found = compared(exact, missed, GROUPS)
    assert found["same_score"] == pytest.approx(5 / 6)
    assert found["largest_excess"] == pytest.approx(1.25)
    assert (found["exact_near_auroc"], found["index_near_auroc"]) == (1.0, 0.5)
    assert (found["exact_far_auroc"], found["index_far_auroc"]) == (1.0, 1.0)


def test_views_are_the_images_their_mirror_images_and_shifted_ones() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    same, mirrored, shifted = views(images)
    assert np.array_equal(same, images)
    assert np.array_equal(mirrored, np.flip(images, axis=2))
    assert shifted.shape == images.shape
    assert np.array_equal(shifted[:, 2:, 2:], images[:, :-2, :-2])
