# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.measuring import Measured, Scored
from detector.plots import write


def scored(values: list[float], labels: int = 0, group: str = "other") -> Scored:
    scores = np.array(values)
    n = len(values)
    return Scored(
        scores={"msp": scores},
        p_values={"msp": (1 + np.arange(n)) / (n + 1)},
        accepted=scores < 1,
        predicted=np.arange(n) % 5,
        labels=np.full(n, labels),
        group=group,
    )


def measured(known: Scored, **ood: Scored) -> Measured:
    return Measured("msp", "fp32", known, ood, {}, {})


def test_figures_are_written_and_readable(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    known, strange = scored(generator.normal(size=5_000).tolist()), scored(generator.normal(1, 1, 3_000).tolist())
    written = write(measured(known, **{"textures $x": strange}), tmp_path / "new" / "folder")
    names = {path.name for path in written}
    figures = ("roc", "scores", "p_values", "risk_coverage")
    assert names == {f"{name}.{suffix}" for name in figures for suffix in ("svg", "png")}
    for path in written:
        assert path.stat().st_size < 300_000
        if path.suffix == ".png":
            assert np.asarray(Image.open(path).convert("L")).std() > 5
        else:
            assert "textures" in path.read_text()


def test_the_same_evaluation_draws_the_same_files(tmp_path: Path) -> None:
    known, strange = scored([0.0, 1.0, 2.0]), scored([1.0, 3.0])
    first, second = (write(measured(known, far=strange), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("values", [[0.5], [1e30] * 3 + [np.inf]])
def test_one_image_and_a_constant_score_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    assert write(measured(scored(values), far=scored([0.5])), tmp_path)


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    names = {path.stem for path in write(measured(scored([0.0, 1.0], labels=-1)), tmp_path)}
    assert names == {"scores", "p_values"}  # no OOD set, no labels
