# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.audit import Audit
from service.errors import StateUnwritable
from service.state import write_whole
from tests.helpers import GOOD
from tests.service.conftest import serving
from tests.service.test_admin import BOSS, settings
from tests.service.test_verdict import post


def test_writers_of_one_file_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    path = tmp_path / "drift" / "model.json"
    contents = [str(number) * 10_000 for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_whole(path, contents[number % 10]), range(400)))
    assert path.read_text() in contents
    assert [each.name for each in path.parent.iterdir()] == ["model.json"]


def modes(folder: Path) -> dict[str, str]:
    """Permissions of a folder and all that is in it."""
    return {path.name: oct(path.stat().st_mode & 0o777) for path in (folder, *folder.rglob("*"))}


def test_what_is_written_is_for_the_servers_own_user_alone(toy_models: Path, tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    with serving(settings(toy_models, state, compile="off")) as running:
        policy = {"target_id_acceptance": 0.9, "guarantee": {"kind": "simultaneous"}}
        assert running.client.put("/v1/models/toy/policy", json=policy, headers=BOSS).status_code == 200
        assert post(running.client, GOOD).status_code == 200
    assert modes(state.parent) == {
        "new": "0o700", "state": "0o700",
        "audit": "0o700", "audit.jsonl": "0o600",
        "policy": "0o700", "drift": "0o700", "toy.json": "0o600",
    }  # fmt: skip


def test_an_audit_file_set_aside_and_its_successor_are_private(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit", max_bytes=1, keep=2)
    audit.write({"n": 1})
    audit.close()
    audit = Audit(tmp_path / "audit", max_bytes=1, keep=2)
    audit.write({"n": 2})
    audit.close()
    assert modes(tmp_path / "audit") == {"audit": "0o700", "audit.jsonl": "0o600", "audit.jsonl.1": "0o600"}


def test_a_folder_that_is_there_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o750)
    write_whole(tmp_path / "shared" / "model.json", "{}")
    assert modes(tmp_path / "shared") == {"shared": "0o750", "model.json": "0o600"}


def test_a_folder_that_cannot_be_written_is_named_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    write_whole(path, "before")
    path.with_suffix(".partial").mkdir()
    with pytest.raises(StateUnwritable, match="cannot be written"):
        write_whole(path, "after")
    assert path.read_text() == "before"
