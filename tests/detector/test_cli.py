# SPDX-License-Identifier: Apache-2.0
"""The commands, run as a person runs them, on folders of image files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from detector.artifact import read_manifest
from detector.calibration import Guarantee
from detector.cli import main
from detector.cli.options import AskedPolicy, progress
from detector.features import Progress
from detector.fitting import FORWARD_SCORES
from detector.networks import CIFAR_PREPROCESSING, export_network
from detector.policy import Policy
from detector.scores import registry
from tests.helpers import TOY_CLASSES, encoded, photo, toy_images, toy_network


def oodgate(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write_folder(root: Path, n: int, seed: int) -> Path:
    images, labels = toy_images(n, seed)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / TOY_CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:04}.png").write_bytes(encoded(image))
    return root


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("material")
    weights = {name: value.contiguous() for name, value in toy_network().module.state_dict().items()}
    save_file(weights, root / "weights.safetensors")
    (root / "classes.txt").write_text("\n".join(TOY_CLASSES))
    write_folder(root / "train", 200, 1)
    images, labels = toy_images(200, 2)
    np.savez(root / "held_out.npz", images=images, labels=labels)
    images, labels = toy_images(150, 3)
    np.savez(root / "test.npz", images=images, labels=labels)
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(root / "noise.npz", images=noise)
    return root


@pytest.fixture(scope="module")
def fitted(material: Path) -> Path:
    out = material / "models" / "mine" / "1"
    result = oodgate(
        "fit", material / "train", "--calibration", material / "held_out.npz", "--test", material / "test.npz",
        "--backbone", "cifar_resnet18", "--weights", material / "weights.safetensors",
        "--classes", material / "classes.txt", "--bank-size", 100, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "promise      accepts 95.0% of such images or more" in result.output
    return out


def test_other_scores_are_fitted_beside_and_a_tune_set_lets_a_fusion_decide(material: Path) -> None:
    out = material / "models" / "fused" / "1"
    result = oodgate(
        "fit", material / "train", "--calibration", material / "held_out.npz", "--tune", material / "test.npz",
        "--backbone", "cifar_resnet18", "--weights", material / "weights.safetensors", "--bank-size", 100,
        "--classes", material / "classes.txt", "--also", "msp", "--also", "rg",
        "--ood-prototype", "images", "--ood-images", material / "noise.npz", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert manifest.policy.score_name == "fusion"
    assert {"grood", "msp", "rg"} <= set(manifest.scores)
    assert manifest.fit.generator == "images"
    told = "the OOD prototype of the GROOD forms is made of 60 images given to the fit"
    assert told in oodgate("inspect", out).output


def test_another_fusion_decides_when_it_is_named(material: Path) -> None:
    out = material / "models" / "lean" / "1"
    asked = (
        "fit", material / "train", "--calibration", material / "held_out.npz", "--backbone", "cifar_resnet18",
        "--weights", material / "weights.safetensors", "--bank-size", 100, "--classes", material / "classes.txt",
        "--score", "fusion_lean", "--out", out,
    )  # fmt: skip
    refused = oodgate(*asked)
    assert refused.exit_code == 1
    assert "fusion_lean needs a tune set" in refused.output
    assert not out.exists()
    result = oodgate(*asked, "--tune", material / "test.npz")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert manifest.policy.score_name == "fusion_lean"
    assert {"knn", "vim", "rg", "grood_noise", "grood_margin_noise"} <= set(manifest.scores)


def test_all_scores_leave_out_and_name_those_that_refuse_the_network(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.scores.subspace.LARGEST", 1_000)
    out = material / "models" / "all" / "1"
    result = oodgate(
        "fit", material / "train", "--calibration", material / "held_out.npz", "--also", "all", "--out", out,
        "--backbone", "cifar_resnet18", "--weights", material / "weights.safetensors", "--bank-size", 40,
        "--classes", material / "classes.txt",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    named = [line.split(":")[0] for line in result.stderr.splitlines() if "a basis of" in line]
    assert named == ["lowdim_last is left out", "lowdim_last_knn is left out"]
    forward = {name for name in FORWARD_SCORES if not registry()[name].tuned}
    assert set(read_manifest(out).scores) == forward - {"lowdim_last", "lowdim_last_knn"}


def test_fit_without_the_class_order_says_what_it_saw(material: Path) -> None:
    result = oodgate(
        "fit", material / "train", "--calibration", material / "held_out.npz", "--backbone", "cifar_resnet18",
        "--weights", material / "weights.safetensors", "--out", material / "models" / "wrong" / "1",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "mostly answered" in result.output
    assert "[class_order_mismatch]" in result.output


def test_an_export_is_fitted_and_kept_as_it_came(material: Path) -> None:
    archive = export_network(toy_network().module, CIFAR_PREPROCESSING)
    (material / "theirs.pt2").write_bytes(archive)
    out = material / "models" / "exported" / "1"
    mean, std = (["--mean", *CIFAR_PREPROCESSING.mean], ["--std", *CIFAR_PREPROCESSING.std])
    result = oodgate(
        "fit", material / "held_out.npz", "--calibration", material / "test.npz", "--out", out,
        "--backbone", f"export:{material / 'theirs.pt2'}", "--resize", 32, "--crop", 32, *mean, *std,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (out / "backbone.pt2").read_bytes() == archive
    assert "classes      4: 0, 1, 2, 3" in result.output


def test_the_parameters_that_lowdim_looks_at_are_chosen_by_name(material: Path) -> None:
    out = material / "models" / "lowdim" / "1"
    result = oodgate(
        "fit", material / "train", "--calibration", material / "held_out.npz",
        "--backbone", "cifar_resnet18", "--weights", material / "weights.safetensors",
        "--classes", material / "classes.txt", "--bank-size", 40, "--also", "lowdim_average",
        "--lowdim-parameters", "fc.bias", "--lowdim-parameters", "bn1", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = [name for name, _ in toy_network().module.named_parameters()]
    chosen = load_file(out / "scores.safetensors")["lowdim_average.parameters"].tolist()
    assert sorted(names[index] for index in chosen) == ["bn1.bias", "bn1.weight", "fc.bias"]


def test_an_interrupted_fit_tells_where_it_goes_on(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        "fit", material / "train", "--calibration", material / "held_out.npz",
        "--backbone", "cifar_resnet18", "--weights", material / "weights.safetensors",
        "--classes", material / "classes.txt", "--bank-size", 100, "--out", material / "models" / "again" / "1",
    )  # fmt: skip
    save = Progress.save

    def save_then_interrupt(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr("detector.features.SHARD", 128)
    monkeypatch.setattr("detector.features.RECORD", 100)
    monkeypatch.setattr(Progress, "save", save_then_interrupt)
    first = oodgate(*arguments)
    assert first.exit_code == 1
    assert "resuming" not in first.stderr
    monkeypatch.setattr(Progress, "save", save)
    second = oodgate(*arguments)
    assert second.exit_code == 0, second.output
    assert "resuming at 128 of 200 images" in second.stderr
    assert "fitting  50%  200 of 400 images" in second.stderr
    assert "100%  400 of 400 images" in second.stderr
    assert "resuming" not in second.stdout


def test_progress_is_told_each_two_per_cent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1_000, "fitting") as report:
        for _ in range(200):
            report(5)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 50
    assert told[0] == "fitting   2%  20 of 1,000 images"
    assert told[-1] == "fitting 100%  1,000 of 1,000 images"


def test_score_prints_a_table(fitted: Path, material: Path) -> None:
    image = next((material / "train").rglob("*.png"))
    result = oodgate("score", fitted, image)
    assert result.exit_code == 0
    assert "decision" in result.output
    assert str(image) in result.output


def test_score_prints_json_and_fails_only_the_bad_file(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded(photo(200, 100), "JPEG"))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    result = oodgate("score", fitted, tmp_path / "bad.jpg", tmp_path / "good.jpg", "--json")
    bad, good = map(json.loads, result.output.splitlines())
    assert result.exit_code == 1
    assert bad["problem"]["code"] == "undecodable_image"
    assert good["decision"] in ("accept", "defer")


def test_inspect_shows_the_card(fitted: Path) -> None:
    assert read_manifest(fitted).model_digest in oodgate("inspect", fitted).output
    assert json.loads(oodgate("inspect", fitted, "--json").output)["name"] == "mine"


def test_inspect_refuses_a_damaged_model(fitted: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(fitted, tmp_path / "1")
    scores = damaged / "scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-1] + b"?")
    result = oodgate("inspect", damaged)
    assert result.exit_code == 1
    assert "scores.safetensors" in result.output


def test_inspect_of_something_else_is_one_clear_line(tmp_path: Path) -> None:
    result = oodgate("inspect", tmp_path)
    assert result.exit_code == 1
    assert "it is no model" in result.output


def test_evaluate_prints_the_documented_json_and_stores_it(fitted: Path, material: Path) -> None:
    arguments = ("evaluate", fitted, "--id", material / "test.npz", "--far", f"noise={material / 'noise.npz'}")
    report = json.loads(oodgate(*arguments, "--json").stdout)
    row = report["scores"]["grood"]["ood"]["noise"]
    assert set(row) == {
        "auroc", "ood_miss_rate_at_id95", "id_flag_rate_at_ood95", "aupr_ood", "aupr_id", "aurc", "augrc",
        "auroc_interval",
    }  # fmt: skip
    assert row["auroc"] > 0.5
    assert report["scores"]["grood"]["far"] == row
    assert report["scores"]["grood"]["near"] == {}
    assert set(report["id"]) == {"n", "accuracy", "acceptance", "acceptance_interval", "accuracy_of_accepted"}
    assert json.loads((fitted / "report.json").read_text()) == report
    output = oodgate(*arguments).output
    assert "| noise (far) | 60 |" in output
    assert "| `grood` |" in output
    assert "Milliseconds an image" in output


def test_evaluate_draws_figures_and_keeps_shifted_images_apart(fitted: Path, material: Path, tmp_path: Path) -> None:
    dark = tmp_path / "dark"
    write_folder(dark, 20, 90)
    result = oodgate(
        "evaluate", fitted, "--id", material / "test.npz", "--ood", f"noise={material / 'noise.npz'}",
        "--shifted", f"dark={dark}", "--plots", tmp_path / "figures" / "new", "--no-store", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["shifted"]["dark"]["accuracy"] > 0.5  # labels from the class folders
    assert set(report["decisions"]) == {"noise"}
    assert len(list((tmp_path / "figures" / "new").glob("*.svg"))) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--near", "here={noise}", "--near", "here={noise}"), "names 'here' twice"),
        (("--near", "here={noise}", "--far", "here={noise}"), "two OOD sets are called 'here'"),
        (("--shifted", "{noise}"), "must be NAME=PATH"),
        (("--ood", "gone=nowhere.npz"), "the path must exist"),
    ],
)
def test_evaluate_refuses_sets_it_cannot_tell_apart(
    fitted: Path, material: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = (argument.format(noise=material / "noise.npz") for argument in arguments)
    result = oodgate("evaluate", fitted, "--id", material / "test.npz", *given)
    assert result.exit_code == 2
    assert said in result.output


def test_evaluate_without_an_ood_set_prints_no_empty_table(fitted: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "unlabelled.npz", images=toy_images(40, 12)[0])
    result = oodgate("evaluate", fitted, "--id", tmp_path / "unlabelled.npz", "--no-store")
    assert result.exit_code == 0, result.output
    assert "In-distribution test images: 40, accepted" in result.stdout
    assert "|" not in result.stdout


def test_plots_without_matplotlib_say_what_to_install(
    fitted: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.cli.evaluate.find_spec", lambda name: None)
    result = oodgate("evaluate", fitted, "--id", material / "test.npz", "--plots", tmp_path)
    assert result.exit_code == 2
    assert "pip install -c constraints.txt -e '.[plots]'" in result.output


def test_calibrate_writes_the_next_version_and_keeps_groups_whole(fitted: Path, material: Path) -> None:
    images, _ = toy_images(400, 70)
    own = material / "own"
    own.mkdir()
    lines = ["file,group"]
    for index, image in enumerate(images):
        (own / f"{index}.png").write_bytes(encoded(image))
        lines.append(f"{index}.png,camera{index // 2}")
    (material / "groups.csv").write_text("\n".join(lines))
    result = oodgate(
        "calibrate", fitted, "--id", own, "--groups", material / "groups.csv", "--check-share", 0.25, "--target", 0.9
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(fitted.parent / "2")
    assert (manifest.calibration.n, manifest.calibration.grouped) == (150, True)
    assert manifest.policy.target_id_acceptance == 0.9
    assert manifest.report["id"]["n"] == 50  # of 100 images, one of each group


def test_the_policy_that_was_asked_for_replaces_only_what_it_names() -> None:
    base = Policy(target_id_acceptance=0.9, guarantee=Guarantee(kind="marginal", delta=0.2), alpha_conf=0.01)
    assert AskedPolicy(None, None, None, None).over(base) == base
    asked = AskedPolicy(0.8, "pac", None, 0.0).over(base)
    assert asked == Policy(target_id_acceptance=0.8, guarantee=Guarantee(kind="pac", delta=0.2), alpha_conf=0.0)
    assert AskedPolicy(None, None, 0.1, None).over(base).guarantee == Guarantee(kind="marginal", delta=0.1)


def test_calibrate_names_an_image_without_group(fitted: Path, material: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photo(32, 32)))
    (tmp_path / "groups.csv").write_text("file,group\n")
    result = oodgate("calibrate", fitted, "--id", tmp_path, "--groups", tmp_path / "groups.csv")
    assert result.exit_code == 2
    assert "a.png" in result.output


def test_too_few_images_are_refused_with_the_number_needed(fitted: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=toy_images(30, 80)[0])
    result = oodgate("calibrate", fitted, "--id", tmp_path / "few.npz", "--out", tmp_path / "m" / "1")
    assert "at least 59 are needed" in result.output
    assert result.exit_code == 1


def test_a_folder_with_an_unreadable_file_names_it(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    result = oodgate("calibrate", fitted, "--id", tmp_path, "--out", tmp_path / "m" / "1")
    assert "bad.png" in result.output
    assert "Remove the image" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", "95"), "--target"),
        (("--delta", "2"), "--delta"),
        (("--bank-size", "many"), "--bank-size"),
        (("--backbone", "torchvision:resnet81"), "resnet81"),
        (("--weights", "{classes}"), "cannot be read as weights"),
        (("--device", "cuda:99"), "Use cpu or auto"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(material: Path, arguments: tuple[str, str], said: str) -> None:
    (material / "bad.safetensors").write_text("no tensors")
    base = {
        "--calibration": material / "held_out.npz", "--backbone": "cifar_resnet18", "--out": material / "m" / "9",
        "--weights": material / "weights.safetensors", "--classes": material / "classes.txt",
    }  # fmt: skip
    base[arguments[0]] = material / "bad.safetensors" if arguments[0] == "--weights" else arguments[1]
    result = oodgate("fit", material / "train", *(part for pair in base.items() for part in pair))
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)  # a message, no traceback
    assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ood-images", "."), "is read with `--ood-prototype images` alone"),
        (("--lowdim-parameters", "fc"), "is read by lowdim, lowdim_knn, lowdim_average, lowdim_average_knn alone"),
        (("--lowdim-parameters", "fc", "--also", "lowdim_last"), "add one with --also"),
    ],
)
def test_an_option_that_nothing_reads_is_refused_before_the_network_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = oodgate(
        "fit", tmp_path, "--calibration", tmp_path, "--backbone", "export:nowhere.pt2", "--out", tmp_path / "1",
        *arguments,
    )  # fmt: skip
    assert result.exit_code == 2
    assert said in result.output


def test_a_groups_file_without_its_header_is_refused(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photo(32, 32)))
    (tmp_path / "groups.csv").write_text("a.png,one\n")
    result = oodgate("calibrate", fitted, "--id", tmp_path, "--groups", tmp_path / "groups.csv")
    assert "must begin with the line `file,group`" in result.output


def test_help_lists_every_command() -> None:
    output = oodgate("--help").output
    assert all(name in output for name in ("fit", "calibrate", "evaluate", "score", "inspect", "serve"))
