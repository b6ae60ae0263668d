# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch

from detector import Detector, artifact as artifacts, golden
from detector.artifact import CALIBRATION, GOLDEN, MANIFEST, REPORT, SCORES, SPLITS, WEIGHTS
from detector.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactNotFound,
    GoldenMismatch,
    OodgateError,
    SplitOverlap,
)
from tests.helpers import EMBEDDED, toy_images, toy_model


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy, tmp_path / "toy" / "1")


def test_a_saved_model_gives_the_same_verdicts_after_loading(toy: Path) -> None:
    images, _ = toy_images(40, seed=8)
    first, second = Detector.load(toy), Detector.load(toy)
    assert first.verdicts(images) == second.verdicts(images)


def resident_kb(path: Path) -> int:
    """Of the pages of a file that this process has mapped, those in memory."""
    told = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(int(re.findall(r"^Rss: +(\d+)", each, re.M)[0]) for each in told if str(path) in each)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_weights_that_were_read_to_build_the_network_leave_the_memory_until_it_is_built_again() -> None:
    path = EMBEDDED / WEIGHTS
    before = resident_kb(path)
    detector = Detector.load(EMBEDDED, device="cpu", precision="fp32")
    assert resident_kb(path) - before < path.stat().st_size / 1024 / 4
    assert detector.backbone.module is detector.backbone.module


def test_weights_that_went_away_while_the_model_was_loaded_are_a_damaged_model(copy: Path) -> None:
    manifest = artifacts.read_manifest(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(ArtifactCorrupt, match=re.escape(str(copy))):
        artifacts.mapped_weights(copy, manifest)


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


def test_every_truncated_file_is_found(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        if path.name == REPORT:
            continue
        whole = path.read_bytes()
        for kept in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:kept])
            with pytest.raises(ArtifactCorrupt):
                Detector.load(copy)
        path.write_bytes(whole)
    Detector.load(copy)


def test_every_file_of_another_model_is_found(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        if path.name == REPORT:
            continue
        own = path.read_bytes()
        shutil.copy(EMBEDDED / path.name, path)
        with pytest.raises(ArtifactCorrupt):
            Detector.load(copy)
        path.write_bytes(own)
    Detector.load(copy)


def rewritten(directory: Path, **changes: object) -> None:
    """Change a manifest and give it the digest that it should then have."""
    content = json.loads((directory / MANIFEST).read_text()) | changes
    content["model_digest"] = artifacts._model_digest(content)
    (directory / MANIFEST).write_text(json.dumps(content))


TENSORS = sorted({WEIGHTS, SCORES, CALIBRATION, SPLITS, GOLDEN})


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(TENSORS, 2)))
def test_files_swapped_under_right_digests_are_refused_by_name(copy: Path, first: str, second: str) -> None:
    aside = copy.parent / "aside"
    (copy / first).rename(aside)
    (copy / second).rename(copy / first)
    aside.rename(copy / second)
    rewritten(copy, files={path.name: artifacts.file_digest(path) for path in copy.iterdir() if path.name != MANIFEST})
    with pytest.raises(OodgateError):
        Detector.load(copy)


@pytest.mark.parametrize("name", ["../escaped.safetensors", "/etc/passwd", "a/../../b", "sub/scores.safetensors"])
def test_a_name_that_leads_out_of_the_directory_is_refused_unread(copy: Path, name: str) -> None:
    (copy.parent / "escaped.safetensors").write_bytes(b"x")
    files = json.loads((copy / MANIFEST).read_text())["files"]
    rewritten(copy, files=files | {name: files[SCORES]})
    with pytest.raises(ArtifactCorrupt, match=re.escape(name)):
        Detector.load(copy)


@pytest.mark.parametrize("name", [*TENSORS, REPORT])
def test_a_manifest_that_names_too_few_files_is_refused(copy: Path, name: str) -> None:
    files = json.loads((copy / MANIFEST).read_text())["files"]
    del files[name]
    (copy / name).unlink()
    rewritten(copy, files=files)
    with pytest.raises(ArtifactError):
        Detector.load(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": NaN}'])
def test_a_manifest_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactCorrupt):
        Detector.load(copy)


def test_a_manifest_with_a_number_that_json_does_not_know_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["score_tolerance"]["fp32"]["grood"] = math.nan
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactCorrupt, match="not JSON"):
        Detector.load(copy)


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


@pytest.mark.parametrize("which", ["toy", "embedded"])
def test_golden_inputs_of_both_decisions_are_found(toy: Path, which: str) -> None:
    detector = Detector.load(toy if which == "toy" else EMBEDDED, device="cpu", precision="fp32")
    deferred = golden.expected(detector, golden.choose([detector]))["fp32.deferred"]
    assert deferred.tolist() == [False] * 4 + [True] * 4


def test_a_decision_without_a_golden_input_is_told(
    toy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector.load(toy, device="cpu")
    monkeypatch.setattr(golden, "BRED", 0)
    monkeypatch.setattr(golden, "_blobs", lambda height, width, seed: repeat(np.zeros((height, width, 3), np.uint8)))
    images = golden.choose([detector])
    assert len(set(golden.expected(detector, images)["fp32.deferred"].tolist())) == 1
    assert "no golden input is accepted" in caplog.text


def test_golden_inputs_are_nobodys_images(toy: Path) -> None:
    chosen = artifacts.load(toy).golden["images"].numpy()
    images, _ = toy_images(300, seed=2)
    assert np.abs(chosen[:, None].astype(int) - images[None].astype(int)).mean(axis=(2, 3, 4)).min() > 5


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
