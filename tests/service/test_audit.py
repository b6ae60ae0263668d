# SPDX-License-Identifier: Apache-2.0
"""The audit log on a disk that fails."""

from __future__ import annotations

import json
import os
import resource
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


def test_a_file_that_was_taken_away_is_replaced_by_the_next_rotation_and_nothing_set_aside_moves_on(
    tmp_path: Path,
) -> None:
    lost: list[int] = []
    (tmp_path / "audit.jsonl.1").write_text('{"n": 0}\n')
    audit = Audit(tmp_path, max_bytes=1, keep=1, on_loss=lost.append)
    audit.write({"n": 1})
    while not (tmp_path / "audit.jsonl").stat().st_size:
        pass
    (tmp_path / "audit.jsonl").unlink()
    audit.write({"n": 2})
    audit.close()
    assert not lost
    assert sorted(lines(tmp_path)) == [0, 2]
    assert (tmp_path / "audit.jsonl.1").read_text() == '{"n": 0}\n'


def test_a_disk_that_is_full_for_a_while_costs_the_lines_it_has_no_room_for(tmp_path: Path) -> None:
    lost = threading.Semaphore(0)
    audit = Audit(tmp_path, max_bytes=10**9, keep=1, on_loss=lost.release)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))  # room for two lines and a half
    try:
        for n in range(1, 5):
            audit.write({"n": n, "filling": 400_000 * "x"})
        assert lost.acquire(timeout=20)
        assert lost.acquire(timeout=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    audit.write({"n": 5})
    audit.close()
    first, second, cut, last = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in (first, second, last)] == [1, 2, 5]
    assert '"n":3' in cut
    assert not lost.acquire(blocking=False)
