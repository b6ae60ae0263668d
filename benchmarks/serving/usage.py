# SPDX-License-Identifier: Apache-2.0
"""What a server's processes use, children included."""

from __future__ import annotations

import threading
import time

import psutil

IDLE_SHARE, WINDOW_S, PATIENCE_S = 0.1, 0.25, 60.0
POLLING_SHARE, POLLING_WINDOWS = 0.5, 12  # of a core: less than any batch takes, for three seconds


def tree(root: psutil.Process) -> list[psutil.Process]:
    """The process and all its descendants."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(root: psutil.Process) -> float:
    """User and system time of the tree since each process began; of ended ones, what their parents gathered."""
    total = 0.0
    for process in tree(root):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def resident_mb(root: psutil.Process) -> float:
    """Proportional set size of the tree in MB: pages that its processes share are counted once.

    What they share with processes beside them, the limit's and the driver's, is counted in part: for what a server
    holds when it is alone see `benchmarks.start_up`.
    """
    total = 0
    for process in tree(root):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


def settle(root: psutil.Process) -> None:
    """Wait until what earlier callers left behind is done: the tree is next to idle, or polls as it does when idle."""
    pause, given_up, polling = threading.Event(), time.monotonic() + PATIENCE_S, 0
    while time.monotonic() < given_up:
        before = cpu_seconds(root)
        pause.wait(WINDOW_S)
        share = (cpu_seconds(root) - before) / WINDOW_S
        polling = polling + 1 if share < POLLING_SHARE else 0
        if share < IDLE_SHARE or polling == POLLING_WINDOWS:
            return
