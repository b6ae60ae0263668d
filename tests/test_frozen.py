# SPDX-License-Identifier: Apache-2.0
"""The constants that were frozen before the confirmation runs, and the document made of the results."""

from __future__ import annotations

import re
import tomllib

from benchmarks.accuracy import run
from benchmarks.accuracy.marks import MARK
from benchmarks.accuracy.table import document, trust
from detector import fitting
from detector.scores import (
    FitOptions,
    Fusion,
    boundary,
    fusion,
    gradient_norm,
    logit,
    nac,
    nearest,
    rectified,
    registry,
)
from tests.helpers import ROOT


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
    rivals = frozen["rivals"]
    assert rivals["knn_neighbours"] == nearest.NEIGHBOURS
    assert rivals["clip_quantile"] == gradient_norm.CLIP_QUANTILE
    assert rivals["scale_percentile"] == rectified.SCALE_PERCENTILE
    assert (rivals["gen_power"], rivals["gen_classes"]) == (logit.GEN_POWER, logit.GEN_CLASSES)
    assert rivals["nci_alpha"] == boundary.NCI_ALPHA
    assert frozen["nac"]["thresholds"] == nac.THRESHOLDS
    assert frozen["nac"]["full_coverage_pooled"] == nac.FULL_POOLED
    assert frozen["nac"]["full_coverage_stage"] == nac.FULL_STAGE
    assert tuple(frozen["fusion"]["members"]) == Fusion.members
    assert frozen["fusion"]["tail"] == fusion.TAIL
    assert frozen["policy"]["decider"] == fitting.default_decider(tuned=True)


def test_no_row_of_a_score_that_changed_after_the_freeze_is_without_its_mark() -> None:
    changes = tomllib.loads((ROOT / "benchmarks" / "accuracy" / "frozen.toml").read_text())["changed"]
    rows = [line for line in document().splitlines() if line.startswith("|")]
    for name in changes["scores"]:
        named = [row for row in rows if re.search(rf"(\| |`){name}(`| )", row)]
        assert len(named) > 10
        assert all(re.search(rf"\b{name}`? {re.escape(MARK)}", row) for row in named), name
    (fused,) = [row for row in trust().splitlines() if "CIFAR-100 (" in row]
    assert fused.split(" | ")[1].endswith(MARK)


def test_the_results_are_those_that_were_measured() -> None:
    assert document() == (ROOT / "docs" / "results.md").read_text()
    assert trust() in (ROOT / "docs" / "methods.md").read_text()
