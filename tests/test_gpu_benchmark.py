# SPDX-License-Identifier: Apache-2.0
"""The accelerator's benchmark, in a tiny form on the CPU: every step runs, and golden decisions are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import PRECISIONS, golden, main
from benchmarks.gpu.subject import Bucketed, bare, subject

TINY = ["--network", "resnet18", "--size", "32", "--classes", "10", "--bank", "200", "--batches", "1", "3"]


def test_every_step_is_measured_and_written(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", *TINY, "--seconds", "0.01", "--model", str(toy), "--out", str(tmp_path)])
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert set(result["precisions"]) == set(PRECISIONS)
    for measured in result["precisions"].values():
        for rates in measured["images_per_second"].values():
            assert {"engine", "bank_search", "upload_staged", "forward_channels_last"} <= set(rates)
            assert min(rates.values()) > 0
    assert all(path["same"] for path in result["golden"].values())


def test_a_path_with_other_decisions_shows(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Bucketed, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, penultimate = self._forward(images)
        return -logits, penultimate

    monkeypatch.setattr(Bucketed, "__call__", wrong)
    assert not golden(toy, "cpu", compiled=True)["fp32 compiled"]["same"]


def test_a_batch_that_does_not_fill_its_bucket_gives_what_the_forward_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    backbone = subject("resnet18", 32, 50, 10, "cpu", "fp32").backbone
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        for found, expected in zip(Bucketed(bare(backbone))(images), backbone.forward(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
