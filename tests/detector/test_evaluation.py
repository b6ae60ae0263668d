# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks.datasets import load
from detector import Detector, OodSet, evaluate
from detector.calibration import acceptance_interval, clopper_pearson
from detector.data import ArrayDataset
from detector.errors import DataError, SplitOverlap
from detector.evaluation import (
    P_VALUE_EDGES,
    auroc,
    id_flag_rate_at_ood95,
    ood_miss_rate_at_id95,
    scores_table,
    summary,
    table,
)
from detector.features import collect
from detector.images import Pixels
from detector.measuring import measure
from detector.metrics import augrc, aurc, bootstrap_auroc, histogram, measures
from detector.networks import CIFAR_PREPROCESSING
from detector.outputs import Outputs
from detector.policy import CalibrationScores
from detector.scores import FitOptions, Score
from tests.helpers import TOY_CLASSES, toy_dataset, toy_images


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


def noise(n: int, seed: int) -> ArrayDataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return ArrayDataset(pixels, None, CIFAR_PREPROCESSING, source=f"noise{seed}")


def unlike(n: int, seed: int, change: Callable[[Image.Image], Image.Image]) -> ArrayDataset:
    """Toy images of the same classes, seen through another camera."""
    images, labels = toy_images(n, seed)
    changed: Pixels = np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
    return ArrayDataset(changed, labels, CIFAR_PREPROCESSING, classes=TOY_CLASSES)


def strange_sets() -> dict[str, OodSet]:
    return {"a": OodSet(noise(40, 1), "near"), "b": OodSet(noise(30, 2), "near"), "c": OodSet(noise(20, 3))}


@pytest.fixture(scope="module")
def result(toy_models: Path) -> dict[str, Any]:
    shifted = {
        "blur": unlike(60, 10, lambda image: image.filter(ImageFilter.GaussianBlur(2))),
        "dark": unlike(50, 11, lambda image: image.point(lambda value: value // 4)),
    }
    detector = Detector.load(toy_models / "toy" / "1", device="cpu")
    return evaluate(detector, toy_dataset(150, 9), strange_sets(), shifted=shifted)


def test_the_report_is_json_of_the_documented_shape(result: dict[str, Any], toy: Path) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {"precision", "id", "decisions", "scores", "shifted", "seconds_per_image"}
    assert result["decisions"]["c"]["group"] == "other"
    detector = Detector.load(toy, device="cpu")
    assert set(result["scores"]) == set(detector.scores_without_backward)
    for score in result["scores"].values():
        assert set(score["ood"]) == {"a", "b", "c"}
        assert score["far"] == {}
        for key in set(score["near"]) - {"auroc_interval"}:
            assert score["near"][key] == pytest.approx(np.mean([score["ood"][name][key] for name in "ab"]))
        for row in (*score["ood"].values(), score["near"]):
            low, high = row["auroc_interval"]
            assert low <= row["auroc"] <= high


def test_the_report_repeats_what_the_functions_say(result: dict[str, Any], toy: Path) -> None:
    detector = Detector.load(toy, device="cpu")
    known, strange = (collect(detector.backbone, part) for part in (toy_dataset(150, 9), noise(40, 1)))
    id_scores, ood_scores = (detector.scores(part.outputs)["grood"] for part in (known, strange))
    row = result["scores"]["grood"]["ood"]["a"]
    assert {key: row[key] for key in measures(id_scores, ood_scores)} == pytest.approx(measures(id_scores, ood_scores))
    assert row["auroc_interval"] == pytest.approx(bootstrap_auroc(id_scores, ood_scores))
    wrong = known.outputs.logits.argmax(1).numpy() != known.labels
    mixed = np.concatenate([id_scores, ood_scores]), np.concatenate([wrong, np.ones(40, dtype=bool)])
    assert (row["aurc"], row["augrc"]) == pytest.approx((aurc(*mixed), augrc(*mixed)))
    alone = result["scores"]["grood"]["id"]
    assert (alone["aurc"], alone["augrc"]) == pytest.approx((aurc(id_scores, wrong), augrc(id_scores, wrong)))
    verdicts = detector.judge(known.outputs)
    assert result["id"]["acceptance"] == np.mean([verdict.decision == "accept" for verdict in verdicts])
    p_values = detector.decider.decide(strange.outputs.logits, detector.scores(strange.outputs))
    counts = histogram(np.array([verdict.ood.p_value for verdict in p_values]), P_VALUE_EDGES)
    name = detector.manifest.policy.score_name
    assert result["scores"][name]["p_values"]["ood"]["a"] == counts.tolist()


def test_histograms_count_every_image_and_stay_small(result: dict[str, Any]) -> None:
    for score in result["scores"].values():
        for kind, bins in (("histogram", 20), ("p_values", 38)):
            counts = score[kind]
            assert len(counts["edges"]) == bins + 1
            assert sum(counts["id"]) == result["id"]["n"]
            assert {name: sum(row) for name, row in counts["ood"].items()} == {"a": 40, "b": 30, "c": 20}
        assert len(json.dumps([score["histogram"], score["p_values"]])) < 3_000


def test_shifted_images_stand_beside_the_report_and_are_no_ood(result: dict[str, Any]) -> None:
    assert set(result["shifted"]) == {"blur", "dark"}
    assert not {"blur", "dark"} & {*result["decisions"], *result["scores"]["grood"]["ood"]}
    blur = result["shifted"]["blur"]
    assert blur["n"] == 60
    assert set(blur) == set(result["id"])
    low, high = blur["acceptance_interval"]
    assert low <= blur["acceptance"] <= high
    assert blur["accuracy"] > 0.5  # labels were found


def test_time_is_told_for_every_score(result: dict[str, Any]) -> None:
    seconds = result["seconds_per_image"]
    assert set(seconds["scores"]) == set(result["scores"])
    assert min(seconds["read"], seconds["network"], *seconds["scores"].values()) > 0
    assert seconds["batch"] == 64


def test_the_tables_speak_of_every_set_and_score(result: dict[str, Any]) -> None:
    text = summary(result, "grood")
    assert table(result, "grood") in text
    assert scores_table(result) in text
    assert all(f"| {name} " in text for name in ("a (near)", "mean near", "blur", "dark", "as calibrated"))
    rows = scores_table(result).splitlines()
    assert len(rows) == 2 + len(result["scores"])
    assert {row.count("|") for row in rows} == {8}
    assert f"{result['scores']['grood']['near']['auroc']:.2%}" in rows[2 + [*result["scores"]].index("grood")]


def test_a_report_stored_before_these_measures_still_makes_its_tables(result: dict[str, Any]) -> None:
    old_keys = ("auroc", "ood_miss_rate_at_id95", "id_flag_rate_at_ood95")
    score = result["scores"]["grood"]
    old = {
        "id": {key: value for key, value in result["id"].items() if key != "accuracy_of_accepted"},
        "decisions": result["decisions"],
        "scores": {
            "grood": {
                "ood": {name: {key: row[key] for key in old_keys} for name, row in score["ood"].items()},
                "near": {key: score["near"][key] for key in old_keys},
                "far": {},
            }
        },
    }
    assert table(old, "grood") == table(result, "grood")
    assert scores_table(old).splitlines()[-1] in scores_table(result)


def test_unlabelled_images_and_no_ood_leave_gaps_not_errors(toy: Path) -> None:
    images, _ = toy_images(40, 12)
    bare = evaluate(Detector.load(toy, device="cpu"), ArrayDataset(images, None, CIFAR_PREPROCESSING))
    assert (bare["id"]["accuracy"], bare["id"]["accuracy_of_accepted"]) == (None, None)
    assert bare["scores"]["grood"]["id"] == {"aurc": None, "augrc": None}
    assert bare["scores"]["grood"]["ood"] == bare["scores"]["grood"]["near"] == {}
    assert "40" in summary(bare, "grood")
    sets = {"a": OodSet(noise(5, 1), "far")}
    some = evaluate(Detector.load(toy, device="cpu"), ArrayDataset(images, None, CIFAR_PREPROCESSING), sets)
    assert some["scores"]["grood"]["far"]["augrc"] is None
    assert "| a (far) | 5 |" in summary(some, "grood")


def test_one_image_and_a_constant_score_are_no_special_case(toy: Path) -> None:
    grey = ArrayDataset(np.full((3, 32, 32, 3), 128, np.uint8), None, CIFAR_PREPROCESSING)
    one = evaluate(Detector.load(toy, device="cpu"), toy_dataset(1, 13), {"grey": OodSet(grey, "far")})
    assert one["id"]["n"] == 1
    assert one["scores"]["grood"]["far"]["auroc"] in (0, 0.5, 1)
    assert summary(one, "grood")


def test_a_set_without_images_is_named(toy: Path) -> None:
    with pytest.raises(DataError, match="the empty set has no images; leave it out"):
        evaluate(Detector.load(toy, device="cpu"), toy_dataset(5, 13), {"empty": OodSet(noise(0, 1))})


def test_shifted_images_of_a_split_are_refused(toy: Path) -> None:
    with pytest.raises(SplitOverlap, match="seen images"):
        evaluate(Detector.load(toy, device="cpu"), toy_dataset(5, 13), shifted={"seen": toy_dataset(300, 2)})


class Slow(Score):
    """A score that needs the images, as those with a backward pass do."""

    name = "slow"
    backward = True

    def _score(self, outputs: Outputs) -> Tensor:
        assert outputs.inputs is not None
        return outputs.inputs.double().std(dim=(1, 2, 3))


def test_scores_with_a_backward_pass_are_included_where_asked(toy: Path) -> None:
    plain = Detector.load(toy, device="cpu")
    spread = np.sort(toy_images(100, 14)[0].std(axis=(1, 2, 3)))
    calibration = CalibrationScores(plain.calibration.grouping, {"slow": [spread], **plain.calibration.scores})
    fitted = {"slow": Slow(FitOptions()), **plain.fitted}
    detector = Detector(plain.manifest, plain.backbone, fitted, calibration, plain.splits)
    known, strange = toy_dataset(70, 9), noise(40, 1)
    result = evaluate(detector, known, {"a": OodSet(strange)}, backward=True)
    assert set(result["scores"]) == {"slow", *plain.fitted}
    values = [torch.from_numpy(part.images).double().std(dim=(1, 2, 3)).numpy() for part in (known, strange)]
    assert result["scores"]["slow"]["ood"]["a"]["auroc"] == auroc(*values)
    assert result["seconds_per_image"]["scores"]["slow"] > 0
    assert "slow" not in measure(detector, known).known.scores


def test_the_same_evaluation_gives_the_same_report(result: dict[str, Any], toy: Path) -> None:
    again = evaluate(Detector.load(toy, device="cpu"), toy_dataset(150, 9), strange_sets())
    assert again["scores"] == result["scores"]
