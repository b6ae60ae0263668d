# SPDX-License-Identifier: Apache-2.0
"""What the detector asks of the machine below it: its devices, its threads, its memory, its arithmetic."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import Any

import torch

from detector.errors import BackboneError

CGROUP = Path("/sys/fs/cgroup")
QUOTAS = (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"])  # of version 2 and 1: quota, period


def cores() -> int:
    """Cores this process may use: those of its affinity, and no more than its cgroup has time for."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in QUOTAS:
        with suppress(OSError, ValueError):  # there is no such file, or it says `max`
            quota, period = (int(word) for name in files for word in (CGROUP / name).read_text().split())
            if quota > 0:  # -1: no limit
                return min(allowed, ceil(quota / period))
    return allowed


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch from sharing out the operations of this thread: most are over before another thread is awake."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def own_threads(threads: int) -> None:
    """Give this thread its own number of torch's threads, which no other thread's setting changes afterwards."""
    torch.get_num_threads()  # a thread takes over, at its first use of torch, what any thread set last: here and now
    torch.set_num_threads(threads)


def return_freed_memory() -> None:
    """Give the system back what was freed, which glibc would keep: after a model is built, and now and then."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def reclaim_memory() -> None:
    """Give back what only cycles keep, too, such as the weights of a traced network that nobody serves any more."""
    gc.collect()
    return_freed_memory()


def resolve_device(name: str) -> torch.device:
    """cpu, cuda, cuda:N, or auto: cuda where there is one; BackboneError where the device is not there."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise BackboneError(f"{name!r} is no device; use cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackboneError(
            f"there is no {name} here; {torch.cuda.device_count()} CUDA devices were found. Use cpu or auto"
        )
    return device


def exact_float32(device: torch.device) -> None:
    """Keep float32 convolutions of CUDA from TF32, in this process: what was calibrated has more digits than that."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16: every CUDA device, and CPUs with AVX512_BF16, AMX or Arm's.

    A rule rather than a measurement: replicas on the same hardware must decide alike, whatever their neighbours do
    while they start.
    """
    able = cpu_capabilities()
    return device.type == "cuda" or any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_capabilities() -> dict[str, Any]:
    """What torch knows of this CPU; nothing before torch 2.12, where fp32 is never wrong."""
    known: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return known


def has_onednn() -> bool:
    """Whether torch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call] # missing from torch's stubs
