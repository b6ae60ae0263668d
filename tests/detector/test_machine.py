# SPDX-License-Identifier: Apache-2.0
"""How many cores this process may use, and how many threads of torch one of its threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from detector import machine
from detector.machine import cores, fast_in_bfloat16, one_thread, own_threads

FULL, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 6),
        ({FULL: "-1", PERIOD: "100000"}, 6),
        ({FULL: "300000", PERIOD: "100000"}, 3),
    ],
)
def test_cores_are_those_of_the_affinity_and_no_more_than_the_cgroup_has_time_for(
    files: dict[str, str], found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert cores() == found


def test_a_thread_keeps_its_own_number_of_torchs_threads_whatever_another_sets() -> None:
    with ThreadPoolExecutor(1, initializer=own_threads, initargs=(3,)) as thread:
        thread.submit(int).result()  # begun, and has not used torch yet
        with one_thread():
            assert thread.submit(torch.get_num_threads).result() == 3


@pytest.mark.parametrize(
    ("device", "able", "fast"),
    [
        ("cuda", {}, True),
        ("cpu", {"avx512_bf16": True}, True),
        ("cpu", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("cpu", {"avx2": True, "avx512_bf16": False}, False),
    ],
)
def test_bfloat16_is_for_devices_that_multiply_in_it(
    device: str, able: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert fast_in_bfloat16(torch.device(device)) == fast
