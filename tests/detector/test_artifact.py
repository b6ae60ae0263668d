# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from detector import Detector, artifact as artifacts
from detector.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound, GoldenMismatch, SplitOverlap
from tests.helpers import toy_images, toy_model


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy, tmp_path / "toy" / "1")


def test_a_saved_model_gives_the_same_verdicts_after_loading(toy: Path) -> None:
    images, _ = toy_images(40, seed=8)
    first, second = Detector.load(toy), Detector.load(toy)
    assert first.verdicts(images) == second.verdicts(images)


def test_the_directory_holds_no_pickle(toy: Path) -> None:
    assert {path.suffix for path in toy.iterdir()} == {".json", ".safetensors"}


def test_every_altered_byte_is_found(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        if path.name == "report.json":
            continue
        before = path.read_bytes()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        with pytest.raises(ArtifactError):
            artifacts.load(copy)
        path.write_bytes(before)
    artifacts.load(copy)


def test_a_damaged_report_does_not_keep_a_model_from_serving(copy: Path) -> None:
    (copy / "report.json").write_text("half a rep")
    assert artifacts.load(copy).report == {}
    artifacts.replace_report(copy, {"whole": 1}, {})
    assert artifacts.load(copy).report == {"whole": 1}


@pytest.mark.parametrize("name", ["scores.safetensors", "report.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactCorrupt, match=name):
        artifacts.load(copy)


def test_a_foreign_file_is_named(copy: Path) -> None:
    (copy / "extra.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(ArtifactCorrupt, match=r"extra\.pkl"):
        artifacts.load(copy)


def test_a_directory_without_manifest_is_no_model(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactNotFound, match="never completely written"):
        artifacts.load(copy)


def test_an_edited_manifest_is_found(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["policy"]["target_id_acceptance"] = 0.5
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactCorrupt, match="edited"):
        artifacts.load(copy)


def test_a_manifest_of_another_schema_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2}))
    with pytest.raises(ArtifactCorrupt, match="schema_version"):
        artifacts.load(copy)


def test_a_crash_while_writing_leaves_nothing_loadable(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    artifact = artifacts.load(toy)
    monkeypatch.setattr(artifacts, "_write_manifest", crash)
    with pytest.raises(KeyboardInterrupt):
        artifacts.save(artifact, tmp_path / "new" / "1")
    monkeypatch.undo()
    assert not list((tmp_path / "new").glob("*/manifest.json"))
    artifacts.save(artifact, tmp_path / "new" / "1")  # and the next attempt is not in its way
    artifacts.load(tmp_path / "new" / "1")


def test_an_existing_version_is_never_overwritten(toy: Path) -> None:
    with pytest.raises(ArtifactError, match="exists"):
        artifacts.save(artifacts.load(toy), toy)


def test_splits_that_share_an_image_are_refused(toy: Path, tmp_path: Path) -> None:
    artifact = artifacts.load(toy)
    artifact.splits["calibration"] = torch.cat([artifact.splits["calibration"], artifact.splits["fit"][:1]])
    with pytest.raises(SplitOverlap, match="1 images lie in both the calibration and the fit split"):
        artifacts.save(artifact, tmp_path / "overlap" / "1")


def test_a_network_that_answers_otherwise_fails_its_golden_self_test(toy: Path, tmp_path: Path) -> None:
    artifact = artifacts.load(toy)
    assert artifact.weights is not None
    artifact.weights["fc.bias"][0] += 50
    artifacts.save(artifact, tmp_path / "altered" / "1")
    with pytest.raises(GoldenMismatch, match="golden logit"):
        Detector.load(tmp_path / "altered" / "1")


def test_a_decision_that_differs_fails_the_golden_self_test(toy: Path, tmp_path: Path) -> None:
    artifact = artifacts.load(toy)
    artifact.golden["fp32.deferred"] = ~artifact.golden["fp32.deferred"]
    artifacts.save(artifact, tmp_path / "altered" / "1")
    with pytest.raises(GoldenMismatch, match="decision"):
        Detector.load(tmp_path / "altered" / "1")


def test_a_new_report_changes_neither_digest_nor_verdicts(copy: Path) -> None:
    before = artifacts.read_manifest(copy)
    after = artifacts.replace_report(copy, {"big": [1, 2]}, before.report | {"id": {"n": 5}})
    assert after.model_digest == before.model_digest
    assert artifacts.load(copy).report == {"big": [1, 2]}


def test_the_digest_covers_what_influences_a_verdict(toy: Path) -> None:
    manifest = artifacts.read_manifest(toy)
    moved = manifest.policy.model_copy(update={"target_id_acceptance": 0.9})
    assert manifest.model_copy(update={"policy": moved}).digest() != manifest.digest()
    assert manifest.model_copy(update={"created": "2001-01-01"}).digest() == manifest.digest()


def test_golden_inputs_are_nobodys_images(toy: Path) -> None:
    golden = artifacts.load(toy).golden["images"].numpy()
    images, _ = toy_images(300, seed=2)
    assert np.abs(golden[:, None].astype(int) - images[None].astype(int)).mean(axis=(2, 3, 4)).min() > 5


def test_a_precision_that_was_never_calibrated_is_refused(toy: Path) -> None:
    with pytest.raises(ArtifactError, match="bf16 was never calibrated"):
        Detector.load(toy, precision="bf16")


def test_two_fits_of_the_same_images_give_the_same_model(toy: Path, tmp_path: Path) -> None:
    again = toy_model(tmp_path / "toy" / "1")
    first, second = artifacts.load(toy), artifacts.load(tmp_path / "toy" / "1")
    for part in ("scores", "calibration", "splits", "golden"):
        ours, theirs = getattr(first, part), getattr(second, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs), part
    assert again.splits == first.manifest.splits
