# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from benchmarks.datasets import load
from detector import Detector
from detector.calibration import acceptance_interval, clopper_pearson
from detector.data import ArrayDataset
from detector.evaluation import auroc, id_flag_rate_at_ood95, ood_miss_rate_at_id95
from detector.features import collect
from detector.networks import CIFAR_PREPROCESSING


def test_auroc_counts_pairs_with_ties_as_half() -> None:
    known, ood = np.array([0.0, 1.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0])
    pairs = (known[:, None] < ood).mean() + 0.5 * (known[:, None] == ood).mean()
    assert auroc(known, ood) == pytest.approx(pairs)


def test_the_two_conventions_of_fpr_at_95_differ() -> None:
    known, ood = np.arange(100.0), np.arange(50.0, 150.0)
    assert ood_miss_rate_at_id95(known, ood) == pytest.approx(0.45)  # the cut is 94; OOD up to it: 50..94
    assert id_flag_rate_at_ood95(known, ood) == pytest.approx(0.45)  # the cut is 55; ID from it: 55..99
    skewed = np.concatenate([ood[:10] - 60, ood[10:]])
    assert ood_miss_rate_at_id95(known, skewed) != id_flag_rate_at_ood95(known, skewed)


def test_perfect_separation() -> None:
    known, ood = np.zeros(10), np.ones(10)
    assert (auroc(known, ood), ood_miss_rate_at_id95(known, ood), id_flag_rate_at_ood95(known, ood)) == (1, 0, 0)


@pytest.mark.data
def test_the_promise_holds_on_real_test_images(embedded: Detector) -> None:
    images, _ = load("cifar10-test")
    outputs = collect(embedded.backbone, ArrayDataset(images[:2000], None, CIFAR_PREPROCESSING)).outputs
    accepted = sum(verdict.decision == "accept" for verdict in embedded.judge(outputs))
    low, high = clopper_pearson(accepted, 2000, level=0.999)
    cut = embedded.decider.thresholds[0]
    promised_low, promised_high = acceptance_interval(cut.rank, cut.n, level=0.999)
    assert low <= promised_high
    assert high >= promised_low


@pytest.mark.data
@pytest.mark.parametrize(("name", "least"), [("svhn-test", 0.85), ("cifar100-test", 0.8)])
def test_real_ood_images_score_higher(embedded: Detector, name: str, least: float) -> None:
    scores = [
        embedded.scores(
            collect(embedded.backbone, ArrayDataset(load(source)[0][:600], None, CIFAR_PREPROCESSING)).outputs
        )
        for source in ("cifar10-test", name)
    ]
    assert auroc(scores[0]["grood"], scores[1]["grood"]) > least
