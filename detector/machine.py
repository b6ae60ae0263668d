# SPDX-License-Identifier: Apache-2.0
"""What the detector asks of the machine below it: its devices, its threads, its memory, its arithmetic."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from detector.errors import BackboneError


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch from sharing out the operations of this thread: most are over before another thread is awake."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def return_freed_memory() -> None:
    """Give the system back what was freed, which glibc would keep: after a model is built, and now and then."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


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


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16: every CUDA device, and CPUs with AVX512_BF16, AMX or Arm's.

    A rule rather than a measurement: replicas on the same hardware must decide alike, whatever their neighbours do
    while they start.
    """
    ask = getattr(torch.cpu, "get_capabilities", dict)  # from torch 2.12 on; before it, fp32 is never wrong
    able: dict[str, Any] = ask()
    return device.type == "cuda" or any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_onednn() -> bool:
    """Whether torch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call] # missing from torch's stubs
