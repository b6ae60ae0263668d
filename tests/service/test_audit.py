# SPDX-License-Identifier: Apache-2.0
"""The audit log on a disk that fails."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from service.audit import Audit


def lines(directory: Path) -> list[int]:
    return [json.loads(line)["n"] for path in directory.glob("audit.jsonl*") for line in path.read_text().splitlines()]


def test_a_disk_that_cannot_sync_does_not_end_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(descriptor: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr("service.audit.SYNC_S", 0)
    audit = Audit(tmp_path, max_bytes=10**6, keep=1)
    audit.write({"n": 1})
    assert failed.wait(20)
    audit.write({"n": 2})
    audit.close()
    assert lines(tmp_path) == [1, 2]


def test_a_rotation_that_fails_loses_counted_lines_until_it_succeeds(tmp_path: Path) -> None:
    lost = threading.Event()
    (tmp_path / "audit.jsonl.1").mkdir()
    (tmp_path / "audit.jsonl.2").mkdir()  # in the way of the older, which is in the way of the youngest
    (tmp_path / "audit.jsonl.2" / "kept").write_text("")
    audit = Audit(tmp_path, max_bytes=1, keep=1, on_loss=lambda count: lost.set())
    audit.write({"n": 1})
    while not lost.is_set():
        audit.write({"n": 2})
    (tmp_path / "audit.jsonl.1").rmdir()  # first: without what is in its way, it would be set aside itself
    (tmp_path / "audit.jsonl.2" / "kept").unlink()
    (tmp_path / "audit.jsonl.2").rmdir()
    audit.write({"n": 3})
    audit.close()
    assert 3 in lines(tmp_path)
