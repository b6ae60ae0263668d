# SPDX-License-Identifier: Apache-2.0
"""Damaged models offered to a running server: refused by name, never half-loaded, while the version before serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from detector.artifact import MANIFEST, REPORT, SCORES
from tests.detector.test_artifact import TENSORS, rewritten
from tests.e2e.server import running
from tests.faults import scenarios
from tests.helpers import GOOD
from tests.service.test_admin import add_version, load
from tests.service.test_security import sha256
from tests.service.test_verdict import PNG


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def swap(path: Path) -> None:
    other = path.with_name(TENSORS[TENSORS.index(path.name) - 1])
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def damages() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What is done to a directory, by name."""
    for name in (*TENSORS, MANIFEST):
        for harm in (cut, flip_a_bit):
            yield f"{name} {harm.__name__}", lambda directory, name=name, harm=harm: harm(directory / name)  # type: ignore[misc]
    for name in TENSORS:
        yield f"{name} swapped", lambda directory, name=name: swap(directory / name)  # type: ignore[misc]

    def files(directory: Path) -> dict[str, str]:
        named: dict[str, str] = json.loads((directory / MANIFEST).read_text())["files"]
        return named

    yield "wrong digest", lambda directory: rewritten(directory, files=files(directory) | {SCORES: "0" * 64})
    yield "traversal", lambda directory: rewritten(directory, files=files(directory) | {"../1/" + REPORT: "0" * 64})
    yield "manifest of the future", lambda directory: rewritten(directory, schema_version=99)


def test_no_damage_to_a_model_is_served_and_the_version_before_stays(toy: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(toy, models / "toy" / "1")
    whole = add_version(models, 2).rename(tmp_path / "whole")
    with running(models, state_dir=str(tmp_path / "state"), admin_token_sha256=sha256("boss")) as server:
        for what, harm in damages():
            harm(shutil.copytree(whole, models / "toy" / "2"))
            refused = load(server.client)
            assert refused.status_code == 422, what
            assert refused.json()["code"] in ("artifact_corrupt", "artifact_error"), what
            card = server.client.get("/v1/models/toy").json()
            assert (card["version"], card["failed_update"]["version"]) == ("1", "2"), what
            answer = server.client.post(scenarios.VERDICT, content=GOOD, headers=PNG)
            assert answer.json()["model"]["version"] == "1", what
            shutil.rmtree(models / "toy" / "2")
        whole.rename(models / "toy" / "2")
        assert load(server.client).json()["version"] == "2"
