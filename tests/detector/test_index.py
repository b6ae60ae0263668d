# SPDX-License-Identifier: Apache-2.0
"""The approximate index: what it misses, what it can never do, and that a fit keeps it for every server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detector import Detector, fit
from detector.policy import Policy
from detector.scores import FitOptions, index
from detector.scores.index import NearestIndex, centres
from tests.helpers import ROOT, TOY_CLASSES, toy_dataset, toy_network

CLASSES, ROWS, DIMENSIONS = 20, 4_000, 64
SHADOWS = ["knn", "grood", "grood_w"]


@pytest.fixture(scope="module")
def bank() -> Tensor:
    return clustered(ROWS, seed=1)


def clustered(rows: int, seed: int) -> Tensor:
    """Rows around twenty class means, float32 [rows, 64]."""
    means = torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(rows, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    return means[torch.arange(rows) % CLASSES] + 0.5 * noise


def test_nearly_all_nearest_rows_are_found_and_no_distance_comes_out_shorter(bank: Tensor) -> None:
    queries = clustered(500, seed=2)
    found = NearestIndex(bank, centres(bank)).nearest(queries, 1)[:, 0]
    distances = torch.linalg.vector_norm((queries - bank[found]).double(), dim=1)
    exact = torch.cdist(queries.double(), bank.double()).amin(dim=1)
    assert bool((distances >= exact - 1e-6).all())
    assert float((distances <= exact + 1e-6).double().mean()) > 0.9
    assert float((distances / exact).max()) < 1.2


def test_as_many_rows_are_found_as_are_wanted_however_few_a_list_holds(bank: Tensor) -> None:
    found = NearestIndex(bank, centres(bank)).nearest(clustered(5, seed=3), 3_900)
    assert int(found.min()) >= 0
    assert all(len(row.unique()) == 3_900 for row in found)


def test_the_centres_are_the_same_to_the_bit_every_time(bank: Tensor) -> None:
    assert torch.equal(centres(bank), centres(bank))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two model directories, exact and with an index, from one fit otherwise."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "INDEX_FROM", 100)
        patch.setattr(index, "ROWS_PER_LIST", 5)
        paths = []
        for name, indexed in (("exact", False), ("indexed", True)):
            options = FitOptions(num_classes=len(TOY_CLASSES), bank_size=400, mixup_images=40, index=indexed)
            paths.append(folder / name / "1")
            fit(
                toy_network(), toy_dataset(600, seed=1), toy_dataset(200, seed=2), paths[-1],
                tune=toy_dataset(100, seed=3), options=options, scores=SHADOWS, policy=Policy(score_name="grood"),
            )  # fmt: skip
        yield paths[0], paths[1]


@pytest.mark.parametrize("name", SHADOWS)
def test_scores_by_index_are_the_exact_ones_or_a_little_larger(name: str, fitted: tuple[Path, Path]) -> None:
    exact, indexed = (Detector.load(path, device="cpu", precision="fp32") for path in fitted)
    images = toy_dataset(200, seed=7).images
    outputs = exact.outputs(images)
    there, here = (torch.from_numpy(each.scores(outputs)[name]) for each in (indexed, exact))
    assert bool((there >= here * (1 - 1e-3)).all())  # which of two equally near rows is the k-th, float32 decides
    assert float((there <= here * (1 + 1e-3)).double().mean()) > 0.8


def test_only_a_large_bank_gets_an_index(fitted: tuple[Path, Path]) -> None:
    exact, indexed = (Detector.load(path, device="cpu", precision="fp32") for path in fitted)
    assert "centres" not in exact.fitted["grood"].state()
    assert indexed.fitted["grood"].state()["centres"].shape[0] == 80
    assert index.kept(torch.zeros(index.INDEX_FROM - 1, 2), FitOptions(index=True)) == {}


def test_a_model_with_an_index_says_what_to_install_where_faiss_is_missing(fitted: tuple[Path, Path]) -> None:
    script = (
        "import sys; sys.modules['faiss'] = None\n"
        "from detector import Detector\n"
        "from detector.errors import ScoreError\n"
        "try: Detector.load(sys.argv[1], device='cpu', precision='fp32')\n"
        "except ScoreError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, fitted[1]], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "pip install 'oodgate[index]'" in done.stdout
