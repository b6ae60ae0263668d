# SPDX-License-Identifier: Apache-2.0
"""Watches what each model decides: its drift tests, and deferral by predicted class and by source.

The event loop hands in every verdict; the tests take them in stretches, so that a single image costs next to nothing.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detector.artifact import Manifest
from detector.policy import Decider, Verdict
from service.drift import OTHER, Drift, Reference, TestName, Thin, TopK
from service.errors import DriftStateMismatch, StateUnwritable
from service.metrics import Metrics
from service.served import ServedModel
from service.settings import Settings
from service.state import write_whole

log = logging.getLogger(__name__)

STRETCH = 128  # images after which the tests are fed; a chore feeds them what is left
CLASS_LABELS = 100  # classes with a series of their own


@dataclass
class _Stream:
    """One model under one policy: a drift test for each calibration group, and what they have not seen yet."""

    model: ServedModel
    drifts: list[Drift]
    thin: Thin | None  # its own: a camera may show one frame to several models
    classes: TopK
    sources: TopK
    waiting: list[tuple[int, float, bool]] = field(default_factory=list)  # group, score, deferred as OOD


class Watch:
    """The streams of all models; used on the event loop alone.

    Args:
        settings: what is watched, and where it is remembered.
        metrics: where it is shown.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._directory = settings.state_dir / "drift"
        self._streams: dict[str, _Stream] = {}
        # By name and version, as the series that they bound, which outlive a policy and an unload.
        self._labels: dict[tuple[str, str], tuple[TopK, TopK]] = {}

    def begin(self, model: ServedModel) -> None:
        """Watch a model that is served from now on; the tests go on where the same model and policy were left."""
        name = model.detector.manifest.name
        known = self._streams.get(name)
        if known is not None and known.model.decider is model.decider:
            known.model = model  # another form of the same forward
            self._show(known)
            return
        if known is not None:
            self.end(name)
        stored = self._read(name)
        manifest = model.detector.manifest
        drifts = [
            _resumed(name, stored.get(reference.group), reference) for reference in references(manifest, model.decider)
        ]
        classes = manifest.class_names
        thin = Thin(self._settings.thin_s, time.monotonic) if self._settings.thin_s else None
        new = TopK(CLASS_LABELS), TopK(self._settings.source_labels)
        labels = self._labels.setdefault((name, manifest.version), new)
        self._streams[name] = _Stream(model, drifts, thin, *labels)
        self._metrics.expect(manifest, classes if len(classes) <= CLASS_LABELS else [OTHER], [OTHER])
        self._show(self._streams[name])

    def end(self, name: str) -> None:
        """Watch a model no more; what its tests know is kept, as by `save`."""
        stream = self._streams.pop(name)
        self._feed(stream)
        _kept(self._path(name), _states(stream))

    def saw(self, model: ServedModel, verdict: Verdict, source: str) -> None:
        """Take note of one verdict.

        Args:
            model: who gave it; one that is no longer served is not watched.
            verdict: the answer.
            source: who sent the image: a camera, a tenant.
        """
        manifest = model.detector.manifest
        stream = self._streams.get(manifest.name)
        if stream is None or stream.model.decider is not model.decider:
            return
        label, displaced = stream.sources.label(source)
        self._metrics.count_source(manifest, label, displaced, verdict.decision)
        label, displaced = stream.classes.label(verdict.prediction.label)
        self._metrics.count_class(manifest, label, displaced, verdict.decision)
        if stream.thin is not None and not stream.thin.keep(source):
            return
        group = model.decider.calibration.grouping.of_class[verdict.prediction.index]
        stream.waiting.append((group, verdict.ood.score, verdict.reason == "ood"))
        if len(stream.waiting) >= STRETCH:
            self._feed(stream)

    def refresh(self) -> None:
        """Feed the tests what has come, and show where they stand."""
        for stream in self._streams.values():
            self._feed(stream)
            self._show(stream)

    def status(self, name: str) -> dict[str, Any]:
        """Where a model's tests stand, by calibration group; KeyError where it is not watched."""
        stream = self._streams[name]
        self._feed(stream)
        groups = {}
        for drift in stream.drifts:
            status = drift.snapshot()
            groups[drift.reference.group] = asdict(status) | {"alarms": status.alarms}
        return {"model": name, "version": stream.model.detector.manifest.version, "groups": groups}

    def reset(self, name: str, test: TestName | Literal["all"]) -> None:
        """Start a test of a model anew, in every group; it outlives a restart.

        Raises:
            KeyError: the model is not watched.
            StateUnwritable: it could not be remembered, so nothing was changed.
        """
        stream = self._streams[name]
        self._feed(stream)
        before = [(drift.state(), drift.reference) for drift in stream.drifts]
        for drift in stream.drifts:
            drift.reset(test)
        try:
            write_whole(self._path(name), _states(stream))
        except StateUnwritable:
            stream.drifts = [Drift.from_state(state, reference) for state, reference in before]
            raise
        self._show(stream)

    def writes(self) -> list[Callable[[], None]]:
        """What puts on disk what the tests know now, one for each model; for any thread, since a disk may be slow."""
        for stream in self._streams.values():
            self._feed(stream)
        return [partial(_kept, self._path(name), _states(stream)) for name, stream in self._streams.items()]

    def save(self) -> None:
        """Put what the tests know on disk; a failure is told in the log and costs a restart its memory, no more."""
        for write in self.writes():
            write()

    def _feed(self, stream: _Stream) -> None:
        if not stream.waiting:
            return
        group, score, deferred = (np.array(column) for column in zip(*stream.waiting, strict=True))
        stream.waiting.clear()
        for index in np.unique(group):
            mine = group == index
            stream.drifts[index].update(score[mine].astype(np.float64), deferred[mine])

    def _show(self, stream: _Stream) -> None:
        self._metrics.show_drift(stream.model.detector.manifest, [drift.snapshot() for drift in stream.drifts])

    def _read(self, name: str) -> dict[str, Any]:
        try:
            stored: dict[str, Any] = json.loads(self._path(name).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.error("the drift state cannot be read; the tests start anew", extra={"model": name}, exc_info=error)
            return {}
        return stored if isinstance(stored, dict) else {}

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def references(manifest: Manifest, decider: Decider) -> list[Reference]:
    """What the streams of a model under a policy are compared with: one for each calibration group."""
    calibration, policy = decider.calibration, decider.policy
    return [
        Reference(
            calibration.scores[policy.score_name][group],
            cut.rank,
            manifest.model_digest,
            policy.score_name,
            policy.target_id_acceptance,
            name,
        )
        for group, (cut, name) in enumerate(zip(decider.thresholds, calibration.grouping.names, strict=True))
    ]


def _states(stream: _Stream) -> str:
    return json.dumps({drift.reference.group: drift.state() for drift in stream.drifts})


def _kept(path: Path, states: str) -> None:
    try:
        write_whole(path, states)
    except StateUnwritable as error:
        log.error("%s", error)


def _resumed(name: str, stored: Any, reference: Reference) -> Drift:
    if isinstance(stored, dict):
        try:
            return Drift.from_state(stored, reference)
        except DriftStateMismatch as error:
            log.warning("the drift tests start anew: %s", error, extra={"model": name, "group": reference.group})
    return Drift(reference, seed=secrets.randbits(32))
