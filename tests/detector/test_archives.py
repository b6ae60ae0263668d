# SPDX-License-Identifier: Apache-2.0
"""Parquet files and WebDataset tars: the same images, labels and fit as from the folders they were made of."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from click.testing import CliRunner
from PIL import Image
from pyarrow import parquet

from detector.artifact import read_manifest
from detector.cli import main
from detector.data import Dataset, open_dataset
from detector.errors import DataError
from detector.networks import CIFAR_PREPROCESSING
from tests.archives import add, write_parquet, write_tars
from tests.helpers import GOOD, TOY_CLASSES, encoded, toy_images

WRITERS = pytest.mark.parametrize("write", [write_parquet, write_tars])
Writer = Callable[[Path, Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folders"
    for index, (image, label) in enumerate(zip(*toy_images(50, seed=1), strict=True)):
        (root / TOY_CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / TOY_CLASSES[label] / f"{index:05}.png")
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def opened(where: Path | str, classes: tuple[str, ...] | None = TOY_CLASSES) -> Dataset:
    return open_dataset(where, CIFAR_PREPROCESSING, classes=classes)


def assert_same_images(dataset: Dataset, other: Dataset) -> None:
    assert dataset.labels.tolist() == other.labels.tolist()
    for index in range(len(other)):
        np.testing.assert_array_equal(dataset.read(index), other.read(index))


@WRITERS
def test_an_archive_holds_the_images_and_labels_of_the_folders(write: Writer, folder: Path, out: Path) -> None:
    write(folder, out)
    assert_same_images(opened(out), opened(folder))
    assert list(opened(out, None).classes) == sorted(TOY_CLASSES)


@WRITERS
def test_an_archive_behind_a_uri_is_read_alike(write: Writer, folder: Path, out: Path) -> None:
    write(folder, out)
    memory = fsspec.filesystem("memory")
    memory.put(str(out), "/shelf", recursive=True)
    try:
        assert_same_images(opened("memory://shelf"), opened(folder))
    finally:
        memory.rm("/shelf", recursive=True)


def test_folders_behind_a_uri_are_classes(folder: Path) -> None:
    assert_same_images(opened(f"file://{folder}"), opened(folder))


@WRITERS
def test_an_archive_travels_to_another_process(write: Writer, folder: Path, out: Path) -> None:
    write(folder, out)
    dataset = opened(out)
    dataset.read(0)
    assert_same_images(pickle.loads(pickle.dumps(dataset)), dataset)  # noqa: S301 - our own


@WRITERS
def test_an_archive_that_changes_has_another_fingerprint(write: Writer, folder: Path, out: Path) -> None:
    write(folder, out)
    before = opened(out).fingerprint()
    assert opened(out).fingerprint() == before
    next(folder.rglob("*.png")).unlink()
    write(folder, out)
    assert opened(out).fingerprint() != before


def test_numbers_are_labels_as_they_stand(out: Path) -> None:
    parquet.write_table(pyarrow.table({"image": [GOOD, GOOD], "label": [2, 0]}), out / "x.parquet")
    assert opened(out / "x.parquet").labels.tolist() == [2, 0]


def test_an_image_may_be_a_struct_with_bytes_and_without_a_label(out: Path) -> None:
    parquet.write_table(pyarrow.table({"image": [{"bytes": GOOD, "path": "a.png"}]}), out / "x.parquet")
    dataset = opened(out)
    assert dataset.labels.tolist() == [-1]
    assert dataset.read(0).shape == (32, 32, 3)


def test_a_parquet_file_without_images_is_refused(out: Path) -> None:
    parquet.write_table(pyarrow.table({"picture": [GOOD]}), out / "x.parquet")
    with pytest.raises(DataError, match=r"no column `image`; it has picture"):
        opened(out)


@pytest.mark.parametrize("name", ["x.parquet", "x.tar"])
def test_a_damaged_archive_is_named(name: str, out: Path) -> None:
    (out / name).write_bytes(b"junk" * 1000)
    with pytest.raises(DataError, match=rf"{name}.*damaged"):
        opened(out)


def test_an_image_that_cannot_be_decoded_is_named(out: Path) -> None:
    with tarfile.open(out / "x.tar", "w") as tar:
        add(tar, "a/7.jpg", b"junk")
    with pytest.raises(DataError, match=r"x\.tar/a/7\.jpg.*Remove"):
        opened(out).read(0)


def test_two_images_with_one_key_are_refused(out: Path) -> None:
    with tarfile.open(out / "x.tar", "w") as tar:
        for name in ("7.jpg", "7.png"):
            add(tar, name, GOOD)
    with pytest.raises(DataError, match=r"7\.png and 7\.jpg have one key"):
        opened(out)


@pytest.mark.parametrize("content", [b"[1]", b"junk", b'{"class": 3}', b'{"label": 1.5}'])
def test_a_label_that_is_none_is_refused(content: bytes, out: Path) -> None:
    with tarfile.open(out / "x.tar", "w") as tar:
        add(tar, "7.jpg", GOOD)
        add(tar, "7.json", content)
    with pytest.raises(DataError, match=r"7\.json.*label"):
        opened(out)


@pytest.mark.parametrize("where", ["memory://nothing/there", "nosuchscheme://bucket/x"])
def test_a_uri_with_nothing_behind_it_is_refused(where: str) -> None:
    with pytest.raises(DataError):
        opened(where)


def test_the_command_line_calibrates_on_an_archive_behind_a_uri(toy: Path, out: Path, tmp_path: Path) -> None:
    images, _ = toy_images(300, seed=20)
    columns = {"image": [encoded(image) for image in images]}
    parquet.write_table(pyarrow.table(columns), out / "x.parquet")
    arguments = ["calibrate", str(toy), "--id", f"file://{out}", "--out", str(tmp_path / "models" / "toy" / "2")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "models" / "toy" / "2").calibration.n == 300


def test_the_command_line_says_what_is_wrong_with_a_uri(toy: Path) -> None:
    result = CliRunner().invoke(main, ["calibrate", str(toy), "--id", "memory://nothing"])
    assert result.exit_code == 1
    assert "memory://nothing" in result.output
