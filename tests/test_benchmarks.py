# SPDX-License-Identifier: Apache-2.0
"""The scripts that made the embedded model, on something small."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import datasets
from benchmarks.cifar10 import splits, train
from benchmarks.readme import replaced
from detector import artifact as artifacts
from detector.images import image_ids
from detector.networks import load_network, parse_spec
from tests.helpers import EMBEDDED, photo, toy_images


def test_mosaics_are_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODGATE_DATA_DIR", str(tmp_path))
    images = np.stack([photo(32, 32, seed) for seed in range(45)])
    padded = np.concatenate([images, np.zeros((35, 32, 32, 3), np.uint8)])
    mosaic = padded.reshape(2, 40, 32, 32, 3).swapaxes(1, 2).reshape(64, 1280, 3)
    Image.fromarray(mosaic).save(tmp_path / "some-00.webp", lossless=True)
    np.savez(tmp_path / "some-labels.npz", labels=np.arange(45))
    found, labels = datasets.load("some")
    assert np.array_equal(found, images)
    assert labels.tolist() == list(range(45))


def test_training_writes_weights_and_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = toy_images(64, seed=1)
    monkeypatch.setattr(train, "split", lambda _: {"fit": known})
    monkeypatch.setattr(train, "load", lambda name: toy_images(20, seed=2))
    args = argparse.Namespace(
        out=tmp_path,
        width=8,
        epochs=2,
        batch_size=16,
        lr=0.1,
        weight_decay=5e-4,
        held_out=5,
        small_epochs=1,
        whole_epochs=1,
        seed=0,
        device="cpu",
    )
    train.train(args)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert [epoch["epoch"] for epoch in summary["history"]] == [1, 2]
    (tmp_path / "weights.safetensors").unlink()
    train.train(args)  # nothing is left to train: the weights come from the checkpoint
    _, spec, _ = load_network(parse_spec("cifar_resnet18"), str(tmp_path / "weights.safetensors"))
    assert (spec.width, spec.num_classes) == (8, 10)
    args.lr = 0.2
    with pytest.raises(SystemExit, match="another recipe"):
        train.train(args)


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert replaced(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"


@pytest.mark.data
def test_the_embedded_model_was_calibrated_on_the_split_that_trained_nothing() -> None:
    parts = splits.split()
    assert {name: len(images) for name, (images, _) in parts.items()} == {
        "calibration": 5000,
        "tune": 5000,
        "fit": 40000,
    }
    stored = artifacts.load(EMBEDDED).splits
    for name, (images, _) in parts.items():
        assert set(stored[name].tolist()) == set(image_ids(images).tolist())
