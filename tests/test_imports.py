# SPDX-License-Identifier: Apache-2.0
"""The import rule, and what the packages export."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import detector
import service
from tests.helpers import EMBEDDED, ROOT


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted((ROOT / "detector").rglob("*.py")), ids=lambda path: path.stem)
def test_the_detector_never_imports_the_service_nor_a_web_framework(path: Path) -> None:
    assert not imported(path) & {"service", "fastapi", "starlette", "uvicorn", "prometheus_client"}


@pytest.mark.parametrize("path", sorted((ROOT / "service").rglob("*.py")), ids=lambda path: path.stem)
def test_the_service_imports_neither_tests_nor_benchmarks(path: Path) -> None:
    assert not imported(path) & {"tests", "benchmarks"}


def test_the_packages_export_their_public_names() -> None:
    public = {name for name in vars(detector) if name[0].isupper() or name in ("fit", "calibrate", "evaluate")}
    classes = {"Detector", "GatedModel", "GatedOutput", "Network", "OodSet", "Policy", "Verdict"}
    assert public == classes | {"calibrate", "evaluate", "fit"}
    assert {"Settings", "create_app"} <= set(vars(service))


def test_serving_the_embedded_model_imports_neither_torchvision_nor_a_client_for_the_gate() -> None:
    code = (
        "import sys, service\n"
        "from detector import Detector\n"
        f"Detector.load({str(EMBEDDED)!r}, device='cpu')\n"
        "raise SystemExit(bool(sys.modules.keys() & {'torchvision', 'httpx'}))\n"  # 165 and 8 MB that few need
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
