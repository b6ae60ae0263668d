# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detector.data import ArrayDataset, Dataset, Subset, batches, open_dataset
from detector.errors import DataError
from detector.images import Preprocessing
from tests.helpers import encoded, photo

SMALL = Preprocessing(resize=16, crop=(16, 16))


def folders(root: Path) -> Path:
    for name in ("b", "a"):
        (root / name).mkdir()
        for index in range(3):
            (root / name / f"{index}.png").write_bytes(encoded(photo(20, 20, seed=index)))
    return root


def test_class_folders_are_labelled_in_sorted_order(tmp_path: Path) -> None:
    dataset = open_dataset(folders(tmp_path), SMALL)
    assert list(dataset.classes) == ["a", "b"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_class_list_sets_the_order(tmp_path: Path) -> None:
    assert open_dataset(folders(tmp_path), SMALL, classes=["b", "c", "a"]).labels.tolist() == [2, 2, 2, 0, 0, 0]


def test_a_folder_the_class_list_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no b"):
        open_dataset(folders(tmp_path), SMALL, classes=["a"])


def test_folders_of_other_names_may_leave_images_unlabelled(tmp_path: Path) -> None:
    assert open_dataset(folders(tmp_path), SMALL, classes=["x"], labelled=False).labels.tolist() == [-1] * 6


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(photo(20, 20)))
    assert open_dataset(tmp_path, SMALL).labels.tolist() == [-1]


def test_an_npz_of_other_sizes_is_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.stack([photo(40, 30)]), labels=[3])
    dataset = open_dataset(tmp_path / "d.npz", SMALL)
    assert dataset.read(0).shape == (16, 16, 3)
    assert dataset.labels.tolist() == [3]


def test_an_image_in_a_file_and_in_an_array_are_prepared_alike(tmp_path: Path) -> None:
    pixels = photo(37, 53)
    (tmp_path / "x.png").write_bytes(encoded(pixels))
    array = ArrayDataset(pixels[None], None, SMALL)
    assert np.array_equal(open_dataset(tmp_path, SMALL).read(0), array.read(0))


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_place_without_images_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        open_dataset(tmp_path / name, SMALL)


@pytest.mark.parametrize("arrays", [{"pictures": np.zeros(3)}, {"images": np.zeros((2, 8, 8, 3))}])
def test_an_npz_of_other_arrays_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images"):
        open_dataset(tmp_path / "d.npz", SMALL)


def test_batches_cover_every_image_once_in_order() -> None:
    images = np.stack([photo(16, 16, seed) for seed in range(11)])
    dataset = ArrayDataset(images, np.arange(11), SMALL)
    found = list(batches(dataset, 4, start=2))
    assert [len(batch.images) for batch in found] == [4, 4, 1]
    assert np.concatenate([batch.labels for batch in found]).tolist() == list(range(2, 11))
    assert np.array_equal(np.concatenate([batch.images for batch in found]), images[2:])


def test_a_fingerprint_changes_with_images_labels_and_subset() -> None:
    images = np.stack([photo(16, 16, seed) for seed in range(4)])
    dataset = ArrayDataset(images, np.arange(4), SMALL)
    others: list[Dataset] = [
        ArrayDataset(images[::-1], np.arange(4), SMALL),
        ArrayDataset(images, np.arange(4)[::-1], SMALL),
        Subset(dataset, np.array([0, 1, 2])),
    ]
    assert len({dataset.fingerprint(), *(other.fingerprint() for other in others)}) == 4
