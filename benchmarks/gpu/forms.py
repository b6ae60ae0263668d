# SPDX-License-Identifier: Apache-2.0
"""A forward compiled for each power of two of batch sizes; recorded as a CUDA graph it is in `detector.recording`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detector.backbone import Run


def compiled(forward: Run, images: Tensor) -> Run:
    """By torch.compile, for this one size; CUDA graphs where the device is one."""
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = 64  # each size is a compilation of the same code; past the limit it would run eager
    mode: Any = "reduce-overhead" if images.is_cuda else None
    run: Run = torch.compile(forward, dynamic=False, fullgraph=True, mode=mode)
    return run
