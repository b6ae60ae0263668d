# SPDX-License-Identifier: Apache-2.0
"""What several replicas of one model and policy know together: the tests whose promises survive a sum or a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

from service.drift.monitor import Drift
from service.drift.windows import control_limits, ood_share_lower

MILLION = 1_000_000


@dataclass(frozen=True)
class MergedWindow:
    """The last complete windows of one size, of all replicas that have one, as one window.

    Args:
        size: images in the window of one replica.
        images, deferred: in those windows together.
        ratio: deferred as a share.
        lower, upper: control limits of the ratio for so many images; P(outside) is that of one window of `images`.
        ood_share_lower: the share of OOD images in them is at least this, with the confidence of the options.
        alarm: the ratio lies outside the limits.
    """

    size: int
    images: int
    deferred: int
    ratio: float
    lower: float
    upper: float
    ood_share_lower: float
    alarm: bool


@dataclass(frozen=True)
class MergedStatus:
    """Replicas together.

    Args:
        replicas, images, deferred: how many, and what they have seen since their last reset.
        windows: one for each size of which a replica has a complete window.
        evidence_log10, limit_log10: of the mean capital of `deferral_rate`; alarm iff the first reaches the second.
        alarm: whether it does. P(ever, on in-distribution images) is that of one replica.
    """

    replicas: int
    images: int
    deferred: int
    windows: tuple[MergedWindow, ...]
    evidence_log10: float
    limit_log10: float
    alarm: bool


def merged(drifts: Sequence[Drift]) -> MergedStatus:
    """Merge replicas of one reference and the same options, each on its own images.

    Window counts add up. A mean of capitals that each cannot grow, on average, cannot either. The CUSUM and
    `exchangeability` do not merge: each replica's own alarm stands.

    Raises:
        ValueError: no replica, or replicas of different references or options.
    """
    if len({repr((sorted(drift.reference.identity().items()), drift.options)) for drift in drifts}) != 1:
        raise ValueError("only replicas of one model, policy, calibration and options can be merged")
    statuses = [drift.snapshot() for drift in drifts]
    capital = sum(10**status.deferral_rate.evidence_log10 for status in statuses) / len(statuses)
    limit = statuses[0].deferral_rate.limit_log10
    windows = (_window(drifts, size) for size in drifts[0].options.windows)
    return MergedStatus(
        replicas=len(drifts),
        images=sum(status.images for status in statuses),
        deferred=sum(status.deferred for status in statuses),
        windows=tuple(window for window in windows if window is not None),
        evidence_log10=log10(capital),
        limit_log10=limit,
        alarm=log10(capital) >= limit,
    )


def _window(drifts: Sequence[Drift], size: int) -> MergedWindow | None:
    every = (window for drift in drifts for window in drift.snapshot().windows if window.size == size)
    counts = [window.deferred for window in every if window.deferred is not None]
    if not counts:
        return None
    reference, options = drifts[0].reference, drifts[0].options
    images, deferred = size * len(counts), sum(counts)
    alarms_per_million = options.window_alarms_per_million / len(options.windows)
    low, high = control_limits(reference, images, min(0.5, alarms_per_million / 2 * images / MILLION))
    return MergedWindow(
        size=size,
        images=images,
        deferred=deferred,
        ratio=deferred / images,
        lower=low / images,
        upper=high / images,
        ood_share_lower=ood_share_lower(reference, deferred, images, options.confidence),
        alarm=not low <= deferred <= high,
    )
