# SPDX-License-Identifier: Apache-2.0
"""Histograms that are counted when they are read: an observation on the way of a request is one append."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

PENDING = 4096  # observations kept before they are counted


class Series:
    """The observations of one set of labels, from any thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._pending: deque[float] = deque()
        self._one_counts = threading.Lock()

    def observe(self, value: float) -> None:
        """Count a value."""
        self._pending.append(value)
        if len(self._pending) > PENDING:
            self.read()

    def read(self) -> tuple[list[int], float]:
        """How many values lie at or under each bound, the last of them infinite; and their sum."""
        with self._one_counts:
            # One by one, for another thread may append meanwhile.
            values = np.array([self._pending.popleft() for _ in range(len(self._pending))])
            if len(values):
                where = np.searchsorted(self._bounds, values, side="left")
                self._counts += np.bincount(where, minlength=len(self._counts))
                self._sum += float(values.sum())
            return self._counts.cumsum().tolist(), self._sum


class BatchedHistogram(Collector):
    """A histogram of prometheus_client in all but how it counts, and without exemplars.

    Args:
        name: of the metric.
        text: what it tells.
        labels: names of its labels.
        bounds: upper bounds of its buckets, rising; one at infinity is added.
        registry: to register with.
    """

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._label_names, self._bounds = name, text, tuple(labels), tuple(bounds)
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """The series of these labels; from now on it is shown.

        Raises:
            ValueError: not as many values as it has labels.
        """
        if len(values) != len(self._label_names):
            raise ValueError(f"{self._name} has the labels {', '.join(self._label_names)}, not {len(values)} values")
        found = self._series.get(values)
        return found or self._series.setdefault(values, Series(self._bounds))

    def observe(self, value: float) -> None:
        """Count a value of a histogram without labels."""
        self.labels().observe(value)

    def describe(self) -> Iterator[Metric]:
        """The family without its samples."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._label_names)

    def collect(self) -> Iterator[Metric]:
        """The family as it stands."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        names = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        for labels, series in list(self._series.items()):
            counts, total = series.read()
            family.add_metric(labels, list(zip(names, counts, strict=True)), total)
        yield family
