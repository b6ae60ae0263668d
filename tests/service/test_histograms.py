# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.histograms import PENDING, BatchedHistogram

BOUNDS = (0.001, 0.05, 0.5, 1.0)


def test_it_reads_as_the_histogram_of_the_library() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    batched = BatchedHistogram("taken", "Time taken.", ("stage",), BOUNDS, ours)
    library = Histogram("taken", "Time taken.", ("stage",), registry=theirs, buckets=BOUNDS)
    values = [*BOUNDS, 0.0, 7.0, *np.random.default_rng(0).random(500).round(3).tolist()]
    for stage in ("read", "decode"):
        for value in values:
            batched.labels(stage).observe(value)
            library.labels(stage).observe(value)
    batched.labels("never"), library.labels("never")

    def without_sums(registry: CollectorRegistry) -> list[str]:  # which rounding may set apart
        text = generate_latest(registry).decode().splitlines()
        return [line for line in text if "_sum{" not in line and "_created" not in line]

    assert without_sums(ours) == without_sums(theirs)
    found = ours.get_sample_value("taken_sum", {"stage": "read"})
    assert found == pytest.approx(theirs.get_sample_value("taken_sum", {"stage": "read"}))


def test_one_without_labels_is_shown_from_the_start() -> None:
    registry = CollectorRegistry()
    lag = BatchedHistogram("lag", "Lag.", (), BOUNDS, registry)
    assert registry.get_sample_value("lag_count") == 0
    lag.observe(0.2)
    assert registry.get_sample_value("lag_bucket", {"le": "0.5"}) == 1


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="stage"):
        BatchedHistogram("taken", "Time taken.", ("stage",), BOUNDS, CollectorRegistry()).labels("read", "more")


def test_nothing_is_lost_while_it_is_read() -> None:
    registry = CollectorRegistry()
    series = BatchedHistogram("taken", "Time taken.", ("stage",), BOUNDS, registry).labels("read")

    def observe() -> None:
        for _ in range(3 * PENDING):
            series.observe(0.1)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        series.read()
    assert registry.get_sample_value("taken_count", {"stage": "read"}) == 12 * PENDING


def test_what_nobody_reads_does_not_grow() -> None:
    series = BatchedHistogram("taken", "Time taken.", ("stage",), BOUNDS, CollectorRegistry()).labels("read")
    for _ in range(2 * PENDING + 10):
        series.observe(0.1)
    assert len(series._pending) <= PENDING
