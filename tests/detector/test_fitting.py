# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from detector import Detector, OodSet, artifact as artifacts, calibrate, evaluate, fit
from detector.backbone import Backbone
from detector.calibration import Guarantee, clopper_pearson
from detector.card import card
from detector.cifar_resnet import CifarResNet18
from detector.data import ArrayDataset
from detector.errors import (
    ArtifactError,
    CalibrationError,
    ClassOrderMismatch,
    DataError,
    ScoreError,
    SplitOverlap,
    TooFewSamples,
)
from detector.evaluation import summary
from detector.features import fit_scores
from detector.fitting import Network, check_class_order
from detector.images import Pixels, image_ids
from detector.networks import CIFAR_PREPROCESSING
from detector.outputs import Outputs
from detector.policy import Policy
from detector.scores import FitOptions, Fusion, FusionImage, FusionLean
from detector.scores.grood import noise_prototype
from tests.helpers import TOY_CLASSES, toy_dataset, toy_images, toy_model, toy_network

OPTIONS = FitOptions(num_classes=4, bank_size=100, mixup_images=20)


def test_the_manifest_tells_what_was_done(toy: Path) -> None:
    manifest = artifacts.read_manifest(toy)
    assert manifest.splits == {"fit": 300, "tune": 100, "calibration": 300}
    assert (manifest.calibration.n, manifest.calibration.dropped) == (300, 0)
    assert manifest.fit.accuracy > 0.9
    low, high = manifest.report["id"]["acceptance_interval"]
    assert low <= manifest.report["id"]["acceptance"] <= high


def test_in_distribution_images_are_accepted_and_others_deferred(toy: Path) -> None:
    detector = Detector.load(toy)
    known, _ = toy_images(400, seed=20)
    strange = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    accepted = np.mean([verdict.decision == "accept" for verdict in detector.verdicts(known)])
    deferred = np.mean([verdict.decision == "defer" for verdict in detector.verdicts(strange)])
    assert accepted > 0.92
    assert deferred > 0.5


def test_labels_in_another_order_are_refused_with_what_was_seen() -> None:
    network = toy_network()
    images, labels = toy_images(200, seed=1)
    shifted = ArrayDataset(images, (labels + 1) % 4, CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    with pytest.raises(ClassOrderMismatch, match=r"'green' \(label 1\) is mostly answered 'red' \(output 0.*--classes"):
        check_class_order(Backbone(network.module, CIFAR_PREPROCESSING), shifted, TOY_CLASSES)


def test_two_swapped_classes_among_right_ones_are_found() -> None:
    images, labels = toy_images(200, seed=1)
    swapped = ArrayDataset(images, np.array([1, 0, 2, 3])[labels], CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    with pytest.raises(ClassOrderMismatch, match=r"'red' .*mostly answered 'green'.*'green' .*mostly answered 'red'"):
        check_class_order(Backbone(toy_network().module, CIFAR_PREPROCESSING), swapped, TOY_CLASSES)


def test_a_few_wrong_labels_or_a_hard_class_pass() -> None:
    images, labels = toy_images(200, seed=1)
    labels[:10] = (labels[:10] + 1) % 4
    labels[labels == 3] = 2  # answered as a class that the network knows well, where it is not 2 itself
    dataset = ArrayDataset(images, labels, CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    assert check_class_order(Backbone(toy_network().module, CIFAR_PREPROCESSING), dataset, TOY_CLASSES) < 0.8


def test_a_binary_classifier_that_is_not_perfect_passes() -> None:
    images, labels = toy_images(200, seed=1)
    two = labels < 2
    images, labels = images[two], labels[two]
    labels[:3] = 1 - labels[:3]
    weights = {
        name: value[:2] if name.startswith("fc.") else value
        for name, value in toy_network().module.state_dict().items()
    }
    module = CifarResNet18(2, 8)
    module.load_state_dict(weights)
    dataset = ArrayDataset(images, labels, CIFAR_PREPROCESSING, classes=TOY_CLASSES[:2])
    assert 0.9 < check_class_order(Backbone(module, CIFAR_PREPROCESSING), dataset, TOY_CLASSES[:2]) < 1


def test_answers_no_better_than_chance_point_to_weights_and_preprocessing() -> None:
    torch.manual_seed(3)
    untrained = CifarResNet18(4, 8)
    with pytest.raises(ClassOrderMismatch, match="no more than chance"):
        check_class_order(Backbone(untrained, CIFAR_PREPROCESSING), toy_dataset(200, 1), TOY_CLASSES)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(label: int) -> None:
    images, labels = toy_images(20, seed=1)
    labels[3] = label
    dataset = ArrayDataset(images, labels, CIFAR_PREPROCESSING)
    with pytest.raises(DataError, match="from 0 to 3"):
        check_class_order(Backbone(toy_network().module, CIFAR_PREPROCESSING), dataset, TOY_CLASSES)


def test_a_wrong_number_of_class_names_is_refused(tmp_path: Path) -> None:
    network = toy_network()
    short = Network(network.module, network.preprocessing, TOY_CLASSES[:3], spec=network.spec)
    with pytest.raises(DataError, match="3 class names, but the network has 4 outputs"):
        fit(short, toy_dataset(50, 1), toy_dataset(100, 2), tmp_path / "m" / "1")


def test_calibration_images_that_were_fitted_on_are_refused(tmp_path: Path) -> None:
    images, labels = toy_images(200, seed=1)
    train = ArrayDataset(images, labels, CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    calibration = ArrayDataset(images[:100], labels[:100], CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    with pytest.raises(SplitOverlap, match="100 of 100 calibration images"):
        fit(toy_network(), train, calibration, tmp_path / "m" / "1", options=OPTIONS)


def test_a_few_shared_images_are_dropped_and_counted(tmp_path: Path) -> None:
    images, labels = toy_images(400, seed=2)
    images[7] = toy_images(100, seed=1)[0][5]
    calibration = ArrayDataset(images, labels, CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    manifest = fit(toy_network(), toy_dataset(100, 1), calibration, tmp_path / "m" / "1", options=OPTIONS)
    assert (manifest.calibration.n, manifest.calibration.dropped) == (399, 1)


def test_too_few_calibration_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TooFewSamples, match="at least 59"):
        fit(toy_network(), toy_dataset(100, 1), toy_dataset(58, 2), tmp_path / "m" / "1", options=OPTIONS)
    assert not (tmp_path / "m" / "1").exists()


def test_any_module_is_fitted_and_served_without_its_code(tmp_path: Path) -> None:
    class Theirs(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(x)
            return logits

    known = toy_network()
    network = Network(Theirs(known.module), CIFAR_PREPROCESSING, TOY_CLASSES, early="inner.layer1")
    fit(network, toy_dataset(200, 1), toy_dataset(300, 2), tmp_path / "m" / "1", options=OPTIONS)
    assert (tmp_path / "m" / "1" / "backbone.pt2").exists()
    images, labels = toy_images(100, seed=5)
    verdicts = Detector.load(tmp_path / "m" / "1").verdicts(images)
    assert np.mean([verdict.prediction.index for verdict in verdicts] == labels) > 0.9


def test_thresholds_for_each_class(tmp_path: Path) -> None:
    manifest = fit(
        toy_network(),
        toy_dataset(200, 1),
        toy_dataset(1600, 2),
        tmp_path / "m" / "1",
        tune=toy_dataset(1200, 3),
        options=OPTIONS,
        per_class=True,
    )
    assert set(manifest.group_names) == set(TOY_CLASSES)
    verdicts = Detector.load(tmp_path / "m" / "1").verdicts(toy_images(50, seed=5)[0])
    assert all(verdict.ood.group == verdict.prediction.label for verdict in verdicts)


TWO_REASONS = Policy(target_id_acceptance=0.8, alpha_conf=0.02)  # a class needs 252 images for its second rank


def test_classes_too_rare_for_the_second_reason_share_a_group(tmp_path: Path) -> None:
    sets = toy_dataset(200, 1), toy_dataset(800, 2), tmp_path / "m" / "1"
    manifest = fit(toy_network(), *sets, tune=toy_dataset(800, 3), options=OPTIONS, policy=TWO_REASONS, per_class=True)
    assert manifest.group_names == ("other",)


def test_a_tune_set_too_small_for_one_group_is_refused_before_the_fit(tmp_path: Path) -> None:
    sets = toy_dataset(200, 1), toy_dataset(800, 2), tmp_path / "m" / "1"
    with pytest.raises(TooFewSamples, match="503 tune images are too few to form one group; at least 504 are needed"):
        fit(toy_network(), *sets, tune=toy_dataset(503, 3), options=OPTIONS, policy=TWO_REASONS, per_class=True)
    assert not list(tmp_path.iterdir())


def test_thresholds_for_each_class_need_a_tune_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tune set"):
        fit(
            toy_network(),
            toy_dataset(100, 1),
            toy_dataset(100, 2),
            tmp_path / "m" / "1",
            per_class=True,
            options=OPTIONS,
        )


def test_the_card_says_which_classes_have_a_threshold_of_their_own(tmp_path: Path) -> None:
    sets = toy_dataset(200, 1), toy_dataset(400, 2), tmp_path / "m" / "1"
    manifest = fit(toy_network(), *sets, tune=toy_dataset(240, 3), options=OPTIONS, per_class=True)
    assert manifest.group_names == ("other",)
    assert "no class had enough tune images for a threshold of its own" in card(manifest)
    named = card(manifest.model_copy(update={"group_names": ("red", "other")}))
    assert "thresholds   by predicted class: red, other" in named


def test_two_precisions_are_calibrated_apart(tmp_path: Path) -> None:
    path = tmp_path / "m" / "1"
    fit(toy_network(), toy_dataset(100, 1), toy_dataset(300, 2), path, options=OPTIONS, precisions=("fp32", "bf16"))
    full, half = Detector.load(path, precision="fp32"), Detector.load(path, precision="bf16")
    assert full.decider.thresholds != half.decider.thresholds


def test_half_weights_are_stored_small_and_judge_as_they_were_fitted(tmp_path: Path) -> None:
    path = tmp_path / "m" / "1"
    fit(toy_network(), toy_dataset(100, 1), toy_dataset(300, 2), path, options=OPTIONS, half_weights=True)
    weights = artifacts.load(path).weights
    assert weights is not None
    assert (weights["conv1.weight"].dtype, weights["bn1.running_var"].dtype) == (torch.float16, torch.float32)
    Detector.load(path)  # the golden logits are those of the rounded network


class PowerCut(Exception):
    pass


def cut_off(dataset: ArrayDataset) -> ArrayDataset:
    """The same data set, whose image 450 is never read."""
    read = dataset.read

    def read_or_fail(index: int) -> Pixels:
        if index == 450:
            raise PowerCut
        return read(index)

    dataset.read = read_or_fail  # type: ignore[method-assign]
    return dataset


def test_a_fit_of_scores_that_have_nothing_to_fit_passes_over_the_images_all_the_same() -> None:
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    found, ids = fit_scores(["msp"], backbone, toy_dataset(1200, 1), FitOptions(num_classes=len(TOY_CLASSES)))
    assert list(found) == ["msp"]
    assert len(ids) == 1200


@pytest.mark.parametrize("score", ["grood", "grood_noise"])
def test_an_interrupted_fit_goes_on_and_gives_the_same_bits(
    score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.features.SHARD", 128)
    monkeypatch.setattr("detector.features.RECORD", 128)
    network = toy_network()
    backbone = Backbone(network.module, network.preprocessing)
    straight, ids = fit_scores([score], backbone, toy_dataset(600, 1), OPTIONS)

    with pytest.raises(PowerCut):
        fit_scores([score], backbone, cut_off(toy_dataset(600, 1)), OPTIONS, workdir=tmp_path)
    seen: list[int] = []
    resumed, resumed_ids = fit_scores(
        [score], backbone, toy_dataset(600, 1), OPTIONS, workdir=tmp_path, report=seen.append
    )
    assert seen[0] >= 128  # images that were not read again
    assert torch.equal(ids, resumed_ids)
    expected = straight[score].state()
    assert all(torch.equal(value, expected[name]) for name, value in resumed[score].state().items())


def test_a_disk_that_takes_no_progress_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detector.features.SHARD", 128)
    monkeypatch.setattr("detector.features.RECORD", 128)
    network = toy_network()
    (tmp_path / "progress.partial").mkdir()  # stands in the way as a full disk would
    with pytest.raises(ArtifactError, match=r"progress\.safetensors cannot be written: .*Make room there"):
        fit_scores(
            ["grood"], Backbone(network.module, network.preprocessing), toy_dataset(600, 1), OPTIONS, workdir=tmp_path
        )


def unread(n: int, seed: int) -> ArrayDataset:
    """A data set of which no image may be read."""
    dataset = toy_dataset(n, seed)
    dataset.read = Mock(side_effect=AssertionError)  # type: ignore[method-assign]
    return dataset


def test_a_split_named_twice_is_refused_before_any_image_is_read(tmp_path: Path) -> None:
    with pytest.raises(SplitOverlap, match="the training images and the tune images are the same"):
        fit(toy_network(), unread(300, 1), toy_dataset(200, 2), tmp_path / "mine" / "1", tune=unread(300, 1))


@pytest.mark.parametrize("changed", ["weights", "images", "labels", "options"])
def test_progress_of_other_weights_images_labels_or_options_is_not_taken_up(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.features.SHARD", 128)
    monkeypatch.setattr("detector.features.RECORD", 128)
    module, dataset, options = toy_network().module, toy_dataset(600, 1), OPTIONS
    with pytest.raises(PowerCut):
        fit_scores(["grood"], Backbone(module, CIFAR_PREPROCESSING), cut_off(dataset), options, workdir=tmp_path)
    assert (tmp_path / "progress.safetensors").exists()
    images, labels = toy_images(600, seed=1)
    if changed == "weights":
        module.get_parameter("layer1.0.conv1.weight").mul_(1.5)
    elif changed == "images":
        images //= 2
    elif changed == "labels":
        labels[labels < 2] = 1 - labels[labels < 2]
    else:
        options = replace(options, bank_size=200)
    dataset = ArrayDataset(images, labels, CIFAR_PREPROCESSING, classes=TOY_CLASSES, source="toy1")
    backbone = Backbone(module, CIFAR_PREPROCESSING)
    found, _ = fit_scores(["grood"], backbone, dataset, options, workdir=tmp_path)
    fresh, _ = fit_scores(["grood"], backbone, dataset, options)
    expected = fresh["grood"].state()
    assert all(torch.equal(value, expected[name]) for name, value in found["grood"].state().items())


def test_calibrating_moves_the_promise_to_other_images(toy: Path, tmp_path: Path) -> None:
    images, _ = toy_images(700, seed=30)
    darker = ArrayDataset((images * 0.7).astype(np.uint8), None, CIFAR_PREPROCESSING)
    policy = Policy(target_id_acceptance=0.9, guarantee=Guarantee(kind="marginal"))
    out = tmp_path / "toy" / "2"
    manifest = calibrate(toy, darker, out, policy=policy, source="darker", check=None)
    assert (manifest.version, manifest.calibration.n, manifest.calibration.source) == ("2", 700, "darker")
    fresh = (toy_images(1000, seed=31)[0] * 0.7).astype(np.uint8)
    before = np.mean([v.decision == "accept" for v in Detector.load(toy).verdicts(fresh)])
    after = np.mean([v.decision == "accept" for v in Detector.load(out).verdicts(fresh)])
    assert abs(after - 0.9) < 0.05
    assert abs(after - 0.9) < abs(before - 0.9)


def test_calibration_images_are_scored_in_batches_as_a_server_cuts_them(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, outputs = list[int](), Backbone.outputs

    def counted(self: Backbone, images: torch.Tensor, **options: bool) -> Outputs:
        sizes.append(len(images))
        return outputs(self, images, **options)

    monkeypatch.setattr(Backbone, "outputs", counted)
    images, _ = toy_images(128, seed=41)
    calibrate(toy, ArrayDataset(images, None, CIFAR_PREPROCESSING), tmp_path / "toy" / "2", check=None)
    assert sizes[:14] == [32, 16, 8, 4, 2, 1, 1] * 2


def test_calibrating_by_groups_counts_groups(toy: Path, tmp_path: Path) -> None:
    images, _ = toy_images(400, seed=40)
    dataset = ArrayDataset(images, None, CIFAR_PREPROCESSING)
    groups = [f"camera{index // 4}" for index in range(400)]
    manifest = calibrate(toy, dataset, tmp_path / "toy" / "2", groups=groups)
    assert (manifest.calibration.n, manifest.calibration.grouped) == (100, True)


def test_copies_of_an_image_count_once(toy: Path, tmp_path: Path) -> None:
    images, _ = toy_images(100, seed=40)
    manifest = calibrate(toy, ArrayDataset(images.repeat(3, axis=0), None, CIFAR_PREPROCESSING), tmp_path / "toy" / "2")
    assert (manifest.calibration.n, manifest.calibration.dropped) == (100, 200)


def test_a_check_by_groups_counts_groups_too(toy: Path, tmp_path: Path) -> None:
    sets = [ArrayDataset(toy_images(n, seed)[0], None, CIFAR_PREPROCESSING) for n, seed in ((200, 41), (60, 42))]
    groups = [[f"camera{index // 2}" for index in range(len(dataset))] for dataset in sets]
    out = tmp_path / "toy" / "2"
    manifest = calibrate(toy, sets[0], out, groups=groups[0], check=sets[1], check_groups=groups[1])
    assert (manifest.calibration.n, manifest.report["id"]["n"]) == (100, 30)


def test_evaluating_on_images_of_a_split_is_refused(toy: Path) -> None:
    with pytest.raises(SplitOverlap, match="300 of 300"):
        evaluate(Detector.load(toy), toy_dataset(300, 2))


def test_a_target_moved_after_calibration_needs_the_simultaneous_guarantee(toy: Path) -> None:
    detector = Detector.load(toy)
    with pytest.raises(CalibrationError, match="simultaneous"):
        detector.with_policy(Policy(target_id_acceptance=0.9))
    moved = Policy(target_id_acceptance=0.8, guarantee=Guarantee(kind="simultaneous"))
    assert detector.with_policy(moved).thresholds[0].rank < detector.decider.thresholds[0].rank


def test_budgets_that_cannot_be_kept_are_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="leaves nothing"):
        fit(
            toy_network(), toy_dataset(50, 1), toy_dataset(100, 2), tmp_path / "m" / "1", policy=Policy(alpha_conf=0.05)
        )
    with pytest.raises(TooFewSamples):
        fit(
            toy_network(), toy_dataset(50, 1), toy_dataset(100, 2), tmp_path / "m" / "1", policy=Policy(alpha_conf=0.01)
        )
    assert not list(tmp_path.iterdir())


def test_calibrating_on_the_training_images_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(SplitOverlap):
        calibrate(toy, toy_dataset(300, 1), tmp_path / "toy" / "2")


def test_an_existing_version_is_not_fitted_over(toy: Path) -> None:
    with pytest.raises(ArtifactError, match="exists"):
        toy_model(toy)


def test_a_fit_with_a_tune_split_decides_by_fusion_and_its_promise_holds(tmp_path: Path) -> None:
    manifest = fit(
        toy_network(),
        toy_dataset(300, 1),
        toy_dataset(600, 2),
        tmp_path / "m" / "1",
        tune=toy_dataset(300, 3),
        options=OPTIONS,
    )
    assert manifest.policy.score_name == "fusion"
    assert manifest.shadow_scores == Fusion.members
    assert "grood" in manifest.scores
    detector = Detector.load(tmp_path / "m" / "1")
    known, _ = toy_images(1000, seed=20)
    verdicts = detector.verdicts(known)
    low, high = manifest.report["expected_acceptance_interval"]
    accepted = sum(verdict.decision == "accept" for verdict in verdicts)
    assert clopper_pearson(accepted, 1000)[1] >= low
    assert clopper_pearson(accepted, 1000)[0] <= high
    p_values = np.array([verdict.ood.p_value for verdict in verdicts])
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", [Fusion, FusionLean, FusionImage])
def test_a_fusion_is_the_same_from_its_file_and_its_members_stand_beside_it(tmp_path: Path, kind: type[Fusion]) -> None:
    manifest = fit(
        toy_network(),
        toy_dataset(300, 1),
        toy_dataset(300, 2),
        tmp_path / "m" / "1",
        tune=toy_dataset(100, 3),
        options=OPTIONS,
        policy=Policy(score_name=kind.name),
    )
    assert manifest.shadow_scores == kind.members
    detector = Detector.load(tmp_path / "m" / "1")
    outputs = detector.outputs(toy_images(50, seed=5)[0])
    together = detector.scores(outputs)
    assert np.array_equal(together[kind.name], detector.fitted[kind.name].score(outputs).numpy())


def test_two_fits_of_the_same_images_are_the_same_model(tmp_path: Path) -> None:
    sets = toy_dataset(300, 1), toy_dataset(300, 2)
    places = [tmp_path / place / "m" / "1" for place in ("here", "there")]
    twice = [fit(toy_network(), *sets, place, tune=toy_dataset(100, 3), options=OPTIONS) for place in places]
    assert twice[0].model_digest == twice[1].model_digest


def test_a_fit_without_a_tune_split_decides_by_grood(tmp_path: Path) -> None:
    manifest = fit(toy_network(), toy_dataset(300, 1), toy_dataset(300, 2), tmp_path / "m" / "1", options=OPTIONS)
    assert (manifest.policy.score_name, manifest.scores) == ("grood", ("grood", "grood_norm"))


def test_a_fusion_without_a_tune_split_is_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fusion needs a tune set"):
        fit(
            toy_network(),
            toy_dataset(300, 1),
            toy_dataset(300, 2),
            tmp_path / "m" / "1",
            policy=Policy(score_name="fusion"),
        )


def test_an_unknown_score_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=r"no score grod; known: .*grood"):
        fit(toy_network(), toy_dataset(300, 1), toy_dataset(300, 2), tmp_path / "m" / "1", scores=["grod"])


def test_a_score_with_a_backward_pass_cannot_decide(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="gaia_z runs a backward pass and cannot decide"):
        fit(
            toy_network(),
            toy_dataset(300, 1),
            toy_dataset(300, 2),
            tmp_path / "m" / "1",
            policy=Policy(score_name="gaia_z"),
        )


@pytest.mark.parametrize("generator", ["noise", "prototype_mean", "images"])
def test_the_ood_prototype_is_made_as_asked(generator: str) -> None:
    network = toy_network()
    backbone = Backbone(network.module, CIFAR_PREPROCESSING)
    strange = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    options = replace(OPTIONS, generator=generator, ood_images=strange)
    fitted, _ = fit_scores(["grood_norm"], backbone, toy_dataset(200, 1), options)
    found = fitted["grood_norm"].state()
    expected = {
        "prototype_mean": found["prototypes"].mean(dim=0),
        "images": backbone.outputs(strange).penultimate.mean(dim=0),
        "noise": noise_prototype(backbone).float(),
    }[generator]
    assert torch.allclose(found["ood_prototype"], expected, atol=1e-5)


def strange_images(n: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def fit_on_strange(out: Path) -> Path:
    options = replace(OPTIONS, generator="images", ood_images=torch.from_numpy(strange_images(30)))
    fit(toy_network(), toy_dataset(300, 1), toy_dataset(300, 2), out, options=options)
    return out


def test_ood_images_of_the_fit_stay_a_split_when_the_promise_moves(tmp_path: Path) -> None:
    first, second = fit_on_strange(tmp_path / "m" / "1"), tmp_path / "m" / "2"
    calibrate(first, toy_dataset(300, 5), second)
    for model in (first, second):
        assert artifacts.load(model).splits["ood"].tolist() == sorted(image_ids(strange_images(30)))
        assert "is made of 30 images given to the fit" in card(artifacts.read_manifest(model))


def test_ood_images_of_the_fit_are_no_evidence(tmp_path: Path) -> None:
    detector = Detector.load(fit_on_strange(tmp_path / "m" / "1"), device="cpu")
    known = toy_dataset(50, 9)
    strange = {"some": OodSet(ArrayDataset(strange_images(50), None, CIFAR_PREPROCESSING))}
    result = evaluate(detector, known, strange)
    assert (result["decisions"]["some"]["n"], result["decisions"]["some"]["left_out"]) == (20, 30)
    assert "made of them: 30 of some." in summary(result, "grood")
    same = {"same": OodSet(ArrayDataset(strange_images(30), None, CIFAR_PREPROCESSING))}
    with pytest.raises(DataError, match="made of all images of the same set"):
        evaluate(detector, known, same)


def test_training_images_given_as_ood_images_are_refused(tmp_path: Path) -> None:
    options = replace(OPTIONS, generator="images", ood_images=torch.from_numpy(toy_images(300, 1)[0][:50]))
    with pytest.raises(SplitOverlap, match="50 of 50 OOD images are also in the fit split"):
        fit(toy_network(), toy_dataset(300, 1), toy_dataset(300, 2), tmp_path / "m" / "1", options=options)


def test_scores_of_noise_keep_it_whatever_the_others_take_and_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    made = Mock(wraps=noise_prototype)
    monkeypatch.setattr("detector.scores.grood.noise_prototype", made)
    options = replace(OPTIONS, generator="prototype_mean")
    fitted, _ = fit_scores(["grood", "grood_noise", "grood_margin_noise"], backbone, toy_dataset(200, 1), options)
    made.assert_called_once_with(backbone)
    states = {name: score.state() for name, score in fitted.items()}
    assert torch.allclose(states["grood"]["ood_prototype"], states["grood"]["prototypes"].mean(dim=0), atol=1e-5)
    for name in ("grood_noise", "grood_margin_noise"):
        assert torch.equal(states[name]["ood_prototype"], noise_prototype(backbone).float())


def test_images_for_the_ood_prototype_must_be_passed_by_name() -> None:
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    with pytest.raises(ScoreError, match="--ood-images"):
        fit_scores(["grood_norm"], backbone, toy_dataset(100, 1), replace(OPTIONS, generator="images"))


def test_an_unknown_generator_is_refused() -> None:
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    with pytest.raises(ScoreError, match="no generator 'gauss'"):
        fit_scores(["grood_norm"], backbone, toy_dataset(100, 1), replace(OPTIONS, generator="gauss"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": "images"}, "--ood-images"),
        ({"generator": "gauss"}, "no generator 'gauss'"),
        ({"lowdim_parameters": ("nosuch",)}, "no parameter 'nosuch'"),
    ],
)
def test_an_option_that_cannot_be_met_is_refused_before_any_image_is_read(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sets = unread(300, 1), toy_dataset(300, 2), tmp_path / "toy" / "1"
    with pytest.raises(ScoreError, match=message):
        fit(toy_network(), *sets, scores=("grood", "lowdim"), options=replace(OPTIONS, **change))


@pytest.mark.parametrize("name", ["lowdim", "lowdim_average", "lowdim_last", "lowdim_last_knn"])
def test_a_score_whose_basis_would_be_too_large_is_refused_before_any_image_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.scores.subspace.LARGEST", 1_000)
    sets = unread(300, 1), toy_dataset(300, 2), tmp_path / "toy" / "1"
    with pytest.raises(ScoreError, match=r"a basis of [\d,]+ x [\d,]+ numbers would take"):
        fit(toy_network(), *sets, scores=(name,), options=OPTIONS)


def test_a_basis_that_would_be_too_large_names_the_flag_that_makes_it_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.scores.subspace.LARGEST", 1_000)
    sets = unread(300, 1), toy_dataset(300, 2), tmp_path / "toy" / "1"
    for name in ("lowdim", "lowdim_average"):
        with pytest.raises(ScoreError, match="with --lowdim-parameters"):
            fit(toy_network(), *sets, scores=(name,), options=OPTIONS)


@pytest.mark.parametrize("name", ["gaia_a", "gaia_z"])
def test_a_score_that_needs_batch_norms_is_refused_before_any_image_is_read(name: str, tmp_path: Path) -> None:
    module = nn.Sequential(OrderedDict(layer1=nn.Conv2d(3, 8, 3), pool=nn.AdaptiveAvgPool2d(1)))
    module.extend([nn.Flatten(), nn.Linear(8, len(TOY_CLASSES))])
    network = Network(module, CIFAR_PREPROCESSING, TOY_CLASSES)
    with pytest.raises(ScoreError, match=f"{name} looks at batch norms"):
        fit(network, unread(300, 1), toy_dataset(300, 2), tmp_path / "toy" / "1", scores=(name,), options=OPTIONS)
