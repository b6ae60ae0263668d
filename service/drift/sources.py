# SPDX-License-Identifier: Apache-2.0
"""Sources of images (cameras, tenants): one image of each at a time, and labels that stay few."""

from __future__ import annotations

from collections.abc import Callable

OTHER = "other"


class Thin:
    """Keeps one image a source and interval: frames of a burst or a video are no independent evidence.

    Memory is bounded: at most `capacity` sources are remembered, oldest first out when their interval is over. While
    all of them are within theirs, an unknown source is not kept, rather than that one might be kept twice.

    Args:
        interval_s: seconds from one image kept to the next of the same source.
        clock: seconds, never going back, e.g. time.monotonic.
        capacity: sources remembered.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float], capacity: int = 10_000) -> None:
        self.interval_s, self.clock, self.capacity = interval_s, clock, capacity
        self._kept: dict[str, float] = {}  # in the order of the times

    def keep(self, source: str) -> bool:
        """Whether the drift tests should see this image; the caller bounds the length of names."""
        now = self.clock()
        while self._kept and now - next(iter(self._kept.values())) >= self.interval_s:
            del self._kept[next(iter(self._kept))]
        if source in self._kept or len(self._kept) >= self.capacity:
            return False
        self._kept[source] = now
        return True


class TopK:
    """Labels of their own for the k most frequent names; the rest is `other`.

    Counts are kept for `tracked` names (Misra and Gries 1982): a name seen in more than 1 / (tracked + 1) of the images
    keeps a count, and one seen once takes nobody's place. A name takes over the label of the rarest holder when
    counted twice as often, so equals do not take turns. Deterministic: the same names give the same labels.

    Args:
        k: labels beside `other`.
        tracked: names counted; 10 k where not given.
    """

    def __init__(self, k: int, tracked: int | None = None) -> None:
        self.k, self.tracked = k, tracked or 10 * k
        self._counts: dict[str, int] = {}
        self._labels: dict[str, None] = {}  # in the order they were given

    @property
    def labels(self) -> tuple[str, ...]:
        """Names that hold a label."""
        return tuple(self._labels)

    def label(self, name: str) -> tuple[str, str | None]:
        """Count one image of this name.

        Returns:
            its label, and the label it displaced, whose series should be removed.
        """
        self._count(name)
        if name in self._labels or name not in self._counts:
            return (name if name in self._labels else OTHER), None
        if len(self._labels) < self.k:
            self._labels[name] = None
            return name, None
        rarest = min(self._labels, key=lambda holder: self._counts.get(holder, 0))
        if self._counts[name] <= 2 * self._counts.get(rarest, 0):
            return OTHER, None
        del self._labels[rarest]
        self._labels[name] = None
        return name, rarest

    def _count(self, name: str) -> None:
        if name in self._counts or len(self._counts) < self.tracked:
            self._counts[name] = self._counts.get(name, 0) + 1
        else:
            self._counts = {known: count - 1 for known, count in self._counts.items() if count > 1}
