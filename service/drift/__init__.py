# SPDX-License-Identifier: Apache-2.0
"""Is the stream still in-distribution? Statistics on the deciding score of one model; no HTTP, no clock of its own."""

from service.drift.merging import MergedStatus, merged
from service.drift.monitor import TESTS, Drift, DriftOptions, DriftStatus, TestName
from service.drift.reference import Reference
from service.drift.sources import OTHER, Thin, TopK
from service.drift.windows import control_limits, ood_share_lower

__all__ = [
    "OTHER",
    "TESTS",
    "Drift",
    "DriftOptions",
    "DriftStatus",
    "MergedStatus",
    "Reference",
    "TestName",
    "Thin",
    "TopK",
    "control_limits",
    "merged",
    "ood_share_lower",
]
