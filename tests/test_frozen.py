# SPDX-License-Identifier: Apache-2.0
"""The constants that were frozen before the confirmation runs, and the document made of the results."""

from __future__ import annotations

import re
import tomllib

import torch

from benchmarks.accuracy import run
from benchmarks.accuracy.marks import MARK, later_scores
from benchmarks.accuracy.table import document, trust
from detector import Detector, fitting
from detector.artifact import read_manifest
from detector.cifar_resnet import CifarResNet18
from detector.outputs import Outputs
from detector.scores import (
    FitOptions,
    Fusion,
    FusionImage,
    FusionLean,
    Grood,
    boundary,
    fusion,
    gaia,
    gaussian,
    gradient_norm,
    grood,
    logit,
    lowdim,
    nac,
    nearest,
    rectified,
    registry,
)
from detector.taps import find_early
from tests.helpers import EMBEDDED, ROOT


def test_the_code_holds_the_frozen_constants() -> None:
    frozen = tomllib.loads((ROOT / "benchmarks" / "accuracy" / "frozen.toml").read_text())
    options = FitOptions()
    assert frozen["grood"]["mixup_coefficient"] == options.mixup_coefficient
    assert frozen["grood"]["bank_size"] == options.bank_size
    assert frozen["grood"]["mixup_images"] == options.mixup_images
    assert registry()["grood"].mixup_coefficient is None  # type: ignore[attr-defined]
    for name in ("grood_w", "grood_margin", "grood_margin_w"):
        assert frozen["grood_w"]["mixup_coefficient"] == registry()[name].mixup_coefficient  # type: ignore[attr-defined]
    assert frozen["grood_w"]["form"] == run.OURS[0]
    assert quarter_powers(frozen["grood_w"]["shrinkage"]) == grood.SHRINKAGES
    assert quarter_powers(frozen["grood_w"]["temperature"]) == grood.TEMPERATURES
    rivals = frozen["rivals"]
    assert rivals["knn_neighbours"] == nearest.NEIGHBOURS
    assert rivals["clip_quantile"] == gradient_norm.CLIP_QUANTILE
    assert rivals["scale_percentile"] == rectified.SCALE_PERCENTILE
    assert (rivals["gen_power"], rivals["gen_classes"]) == (logit.GEN_POWER, logit.GEN_CLASSES)
    assert rivals["nci_alpha"] == boundary.NCI_ALPHA
    most, wide, fewer, middle = map(int, re.findall(r"\d+", rivals["vim_dimensions"]))
    sizes = (wide, wide - 1, middle, middle - 1)
    assert [gaussian.vim_dimensions(size) for size in sizes] == [most, fewer, fewer, (middle - 1) // 2]
    assert frozen["nac"]["thresholds"] == nac.THRESHOLDS
    assert frozen["nac"]["full_coverage_pooled"] == nac.FULL_POOLED
    assert frozen["nac"]["full_coverage_stage"] == nac.FULL_STAGE
    assert tuple(frozen["fusion"]["members"]) == Fusion.members
    assert frozen["fusion"]["tail"] == fusion.TAIL
    assert tuple(frozen["third"]["fusion_lean"]) == FusionLean.members
    assert tuple(frozen["fourth"]["fusion_image"]) == FusionImage.members
    for name in ("grood_noise", "grood_margin_noise"):
        assert frozen["second"]["generator"] == registry()[name].generator  # type: ignore[attr-defined]
    assert frozen["policy"]["decider"] == fitting.default_decider(tuned=True)
    afterwards = frozen["afterwards"]
    assert afterwards["gaia_fewest_zeros"] == gaia.FEWEST_ZEROS
    assert (afterwards["lowdim_directions"], afterwards["lowdim_neighbours"]) == (lowdim.COLUMNS, lowdim.NEIGHBOURS)
    probe = (lowdim.EPOCHS, lowdim.BATCH, lowdim.RATE, lowdim.MOMENTUM, lowdim.DECAY)
    assert tuple(afterwards["lowdim_probe"].values()) == probe
    changed, embedded = frozen["changed"]["default_model"], read_manifest(EMBEDDED)
    assert changed["decider"] == embedded.policy.score_name
    assert changed["bank_size"] == embedded.fit.bank_size


def quarter_powers(rule: str) -> tuple[float, ...]:
    """What a rule "... of BASE^(LOW .. HIGH) in quarter powers" chooses from."""
    found = re.search(r"of (\d+)\^\((-?\d+) \.\. (-?\d+)\) in quarter powers", rule)
    assert found
    base, low, high = map(int, found.groups())
    return tuple(base ** (quarter / 4) for quarter in range(4 * low, 4 * high + 1))


def test_the_mix_up_is_at_the_first_stage() -> None:
    frozen = tomllib.loads((ROOT / "benchmarks" / "accuracy" / "frozen.toml").read_text())
    assert {frozen[form]["early_layer"] for form in ("grood", "grood_w")} == {"first stage"}
    assert read_manifest(EMBEDDED).early == find_early(CifarResNet18(10, 8)) == "layer1"


def test_grood_is_the_distance_to_the_frozen_neighbour() -> None:
    frozen = tomllib.loads((ROOT / "benchmarks" / "accuracy" / "frozen.toml").read_text())
    score = Detector.load(EMBEDDED, device="cpu", precision="fp32").fitted["grood"]
    assert isinstance(score, Grood)
    features = torch.rand(20, score.prototypes.shape[1], generator=torch.Generator().manual_seed(0))
    direction, log_pi = grood.grood_gradient(features, score.prototypes, score.ood_prototype)
    gradients = log_pi.exp()[:, None] * direction
    distances = torch.cdist(gradients, score.bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = distances.kthvalue(frozen["grood"]["neighbours"], dim=1).values
    found = score.score(Outputs(torch.zeros(20, len(score.prototypes)), features))
    assert torch.allclose(found, expected, rtol=1e-6)


def test_no_row_of_a_score_that_changed_after_the_freeze_is_without_its_mark() -> None:
    frozen = tomllib.loads((ROOT / "benchmarks" / "accuracy" / "frozen.toml").read_text())
    changes = frozen["changed"]
    rows = [line for line in document().splitlines() if line.startswith("|")]
    for name in (*changes["scores"], *later_scores()):
        named = [row for row in rows if re.search(rf"(\| |`){name}(`| )", row)]
        assert len(named) > (10 if name in changes["scores"] else 3), name
        assert all(re.search(rf"\b{name}`? {re.escape(MARK)}", row) for row in named), name
    head, *_ = trust().splitlines()
    for network, name in (("CIFAR-100 (", "`fusion`"), ("the embedded", "`fusion_image`")):
        (fused,) = [row for row in trust().splitlines() if network in row]
        assert dict(zip(head.split(" | "), fused.split(" | "), strict=True))[name].endswith(MARK), network


def test_the_results_are_those_that_were_measured() -> None:
    assert document() == (ROOT / "docs" / "results.md").read_text()
    assert trust() in (ROOT / "docs" / "methods.md").read_text()
