# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.datasets import available, data_dir
from detector import Detector
from tests import helpers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if available("cifar10-test"):
        return
    absent = pytest.mark.skip(reason=f"the evaluation images are not at {data_dir()}; set OODGATE_DATA_DIR")
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(absent)


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What servers remember, those in processes of their own too, lies outside the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OODGATE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setenv("OODGATE_COMPILE", "off")  # or every server of every test would start a compiler
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded() -> Detector:
    """The default model, as the server loads it."""
    return Detector.load(helpers.EMBEDDED, device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with one small model, `toy` version 1; treat it as read-only."""
    models = tmp_path_factory.mktemp("models")
    helpers.toy_model(models / "toy" / "1")
    return models


@pytest.fixture
def toy(toy_models: Path) -> Path:
    return toy_models / "toy" / "1"
