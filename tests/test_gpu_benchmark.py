# SPDX-License-Identifier: Apache-2.0
"""The accelerator's benchmark, in a tiny form on the CPU: every step runs, and golden decisions are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import jpegs
from benchmarks.gpu.__main__ import PRECISIONS, golden, main, reached
from benchmarks.gpu.measures import rates
from benchmarks.gpu.subject import Subject, bare, subject
from detector.backbone import Run
from detector.recording import Bucketed
from tests.helpers import ROOT

TINY = ["--network", "resnet18", "--size", "32", "--classes", "10", "--bank", "200", "--batches", "1", "3"]


def eager(forward: Run, images: torch.Tensor) -> Run:
    return forward


def failing(forward: Run, images: torch.Tensor) -> Run:
    raise RuntimeError("no compiler")


def other(forward: Run, images: torch.Tensor) -> Run:
    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, penultimate = forward(images)
        return -logits, penultimate

    return run


def test_every_step_is_measured_and_written(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", *TINY, "--seconds", "0.01", "--model", str(toy), "--out", str(tmp_path)])
    [written] = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert set(result["precisions"]) == set(PRECISIONS)
    for measured in result["precisions"].values():
        assert set(measured["images_per_second"]) == {"1", "3"}
        for found in measured["images_per_second"].values():
            assert {"engine", "bank_search", "upload_staged", "forward_channels_last"} <= set(found)
            assert min(found.values()) > 0
        assert "p99_ms_over_forward" in measured["reached"]
    assert result["jpeg_files_per_second"]["pillow_one_thread"] > 0
    assert all(path["same"] for path in result["golden"].values())
    [page] = tmp_path.glob("*.md")
    assert capsys.readouterr().out == page.read_text()
    assert "| bf16, images/s at batch |" in page.read_text()


def test_what_there_is_no_time_for_is_left_out_and_named(toy: Path, tmp_path: Path) -> None:
    main(["--device", "cpu", *TINY, "--seconds", "0.01", "--minutes", "0", "--model", str(toy), "--out", str(tmp_path)])
    [page] = tmp_path.glob("*.md")
    assert page.read_text().count("Not measured for lack of time: 1, 3.") == len(PRECISIONS)


def test_goals_are_ratios_at_the_goals_batch() -> None:
    at = {"engine": 900.0, "forward_compiled": 1000.0, "bank_search": 20_000.0}
    found = {"images_per_second": {"64": at}, "one_at_a_time_ms": {"engine_p99": 3.5, "forward_p99": 2.0}}
    expected = {"engine_of_compiled_forward": 0.9, "grood_adds": 0.05, "p99_ms_over_forward": 1.5}
    assert reached(found) == pytest.approx(expected)


def test_a_path_with_other_decisions_shows(toy: Path) -> None:
    assert golden(toy, "cpu", {"eager": eager})["fp32 eager"]["same"]
    assert not golden(toy, "cpu", {"other": other})["fp32 other"]["same"]


def test_a_form_that_cannot_be_made_costs_nothing_but_itself(toy: Path) -> None:
    found = golden(toy, "cpu", {"compiled": failing})
    assert (found["fp32 eager"]["same"], found["fp32 compiled"]["same"]) == (True, False)
    made = subject("resnet18", 32, 50, 10, "cpu", "fp32")
    broken = Subject(
        made.backbone.with_forward(Bucketed(bare(made.backbone), failing), "compiled"), made.grood, made.decider
    )
    measured = rates(made, {"compiled": broken}, 2, 0.01)
    assert measured["failed_compiled"] == "RuntimeError: no compiler"
    assert measured["engine"] > 0


def test_a_decoder_with_other_pixels_shows(toy: Path) -> None:
    assert jpegs.golden(toy, lambda data: None)["largest_grey_level_difference"] == 0
    blank = jpegs.golden(toy, lambda data: np.zeros((32, 32, 3), dtype=np.uint8))
    assert blank["largest_grey_level_difference"] > 100
    assert not blank["same"]


def test_a_batch_that_does_not_fill_its_bucket_gives_what_the_forward_gives() -> None:
    backbone = subject("resnet18", 32, 50, 10, "cpu", "fp32").backbone
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        for found, expected in zip(Bucketed(bare(backbone), eager)(images), backbone.forward(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_needs_nothing_of_the_service_so_that_a_bare_machine_will_do() -> None:
    """The packages that docs/scaling.md names are enough."""
    needed = ("torch", "torchvision", "numpy", "PIL", "pydantic", "safetensors", "scipy", "fsspec")
    others = (
        "fastapi",
        "uvicorn",
        "httpx",
        "orjson",
        "click",
        "prometheus_client",
        "pydantic_settings",
        "faiss",
        "service",
    )
    code = f"import sys, benchmarks.gpu.__main__ as _; print([name for name in {others!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(f"`{ {'PIL': 'pillow'}.get(name, name) }`" in page for name in needed)
