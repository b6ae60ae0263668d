# SPDX-License-Identifier: Apache-2.0
"""`oodgate whatif`: another policy over past traffic, from the audit log; no image and no network is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import log, nan
from pathlib import Path
from typing import Literal

import orjson
from pydantic import BaseModel, ValidationError

from detector import artifact as artifacts
from detector.artifact import Artifact
from detector.backbone import Precision
from detector.calibration import Guarantee, GuaranteeKind
from detector.detector import calibration_scores, check_target
from detector.errors import ArtifactError, CalibrationError, DataError
from detector.policy import Decider, Decision, Policy
from service.versions import all_versions


# JSON has null where a number was none.
class _Prediction(BaseModel):
    index: int
    confidence: float | None


class _Shadow(BaseModel):
    score: float | None


class _Ood(_Shadow):
    score_name: str
    shadow: dict[str, _Shadow]


class Line(BaseModel):
    """What a replay needs of a decision in the audit log."""

    event: Literal["decision"]
    caller: str
    model: str
    version: str
    digest: str
    precision: Precision
    decision: Decision
    prediction: _Prediction
    ood: _Ood

    @property
    def scores(self) -> dict[str, float | None]:
        """Every score that was recorded, by name."""
        return {self.ood.score_name: self.ood.score} | {name: one.score for name, one in self.ood.shadow.items()}


@dataclass
class Tally:
    """Decisions then and under the new policy.

    Args:
        images: replayed.
        deferred_then: as recorded.
        accept_to_defer: accepted then, deferred under the new policy.
        defer_to_accept: the other way.
    """

    images: int = 0
    deferred_then: int = 0
    accept_to_defer: int = 0
    defer_to_accept: int = 0

    def add(self, then: bool, now: bool) -> None:
        """Count an image by whether it was and would be deferred."""
        self.images += 1
        self.deferred_then += then
        self.accept_to_defer += now and not then
        self.defer_to_accept += then and not now

    def as_dict(self) -> dict[str, int]:
        """Its numbers by name."""
        return {
            "images": self.images,
            "deferred_then": self.deferred_then,
            "deferred_now": self.deferred_then + self.accept_to_defer - self.defer_to_accept,
            "accept_to_defer": self.accept_to_defer,
            "defer_to_accept": self.defer_to_accept,
        }


@dataclass
class Replay:
    """What came of a replay.

    Args:
        all: every image.
        by_model, by_caller: the same by model and version, and by caller.
        policies: the policy asked for, by model and version.
        unknown_digests: decisions of models that are not in the folder.
        without_score: decisions by model and version where the asked score was not recorded.
        recorded: scores that were recorded.
        broken: places of lines that are no audit lines, the last one of a crash say.
    """

    all: Tally = field(default_factory=Tally)
    by_model: dict[str, Tally] = field(default_factory=dict)
    by_caller: dict[str, Tally] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)
    unknown_digests: Counter[str] = field(default_factory=Counter)
    without_score: Counter[str] = field(default_factory=Counter)
    recorded: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)

    def count(self, line: Line, deferred: bool) -> None:
        """Count one image."""
        then = line.decision == "defer"
        for tally in (
            self.all,
            self.by_model.setdefault(f"{line.model} {line.version}", Tally()),
            self.by_caller.setdefault(line.caller, Tally()),
        ):
            tally.add(then, deferred)


@dataclass(frozen=True)
class Asked:
    """The part of a policy that was asked for; what is None stays as the model has it."""

    target: float | None = None
    score: str | None = None
    guarantee: GuaranteeKind | None = None
    delta: float | None = None
    alpha_conf: float | None = None

    def of(self, own: Policy) -> Policy:
        """The whole policy for a model; a moved target asks for the simultaneous guarantee where none is given."""
        moved = self.target is not None and self.target != own.target_id_acceptance
        guarantee = Guarantee(
            kind=self.guarantee or ("simultaneous" if moved else own.guarantee.kind),
            delta=own.guarantee.delta if self.delta is None else self.delta,
        )
        return Policy(
            target_id_acceptance=own.target_id_acceptance if self.target is None else self.target,
            guarantee=guarantee,
            score_name=self.score or own.score_name,
            alpha_conf=own.alpha_conf if self.alpha_conf is None else self.alpha_conf,
        )


class _Models:
    """The models of a folder by digest, and a decider for each, built when the first line asks for it."""

    def __init__(self, folder: Path, asked: Asked) -> None:
        self._asked = asked
        self._where: dict[str, Path] = {}
        for directory in all_versions(folder):
            with suppress(ArtifactError):  # a broken neighbour keeps nobody's past from being replayed
                self._where[artifacts.read_manifest(directory).model_digest] = directory
        self._artifacts: dict[str, Artifact] = {}
        self._policies: dict[str, Policy] = {}
        self._deciders: dict[tuple[str, Precision], Decider] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._where

    def policy(self, digest: str) -> Policy:
        if digest not in self._policies:
            self._policies[digest] = self._asked.of(self._artifact(digest).manifest.policy)
        return self._policies[digest]

    def decider(self, digest: str, precision: Precision) -> Decider:
        key = digest, precision
        if key not in self._deciders:
            artifact, policy = self._artifact(digest), self.policy(digest)
            check_target(policy, artifact.manifest)
            calibration = calibration_scores(artifact, precision)
            self._deciders[key] = Decider(policy, calibration, artifact.manifest.class_names)
        return self._deciders[key]

    def _artifact(self, digest: str) -> Artifact:
        if digest not in self._artifacts:
            self._artifacts[digest] = artifacts.load(self._where[digest])
        return self._artifacts[digest]


def replay(files: Sequence[Path], models: Path, asked: Asked) -> Replay:
    """Decide every recorded image again under another policy, from its recorded score and confidence.

    Args:
        files: audit logs.
        models: folder of models, NAME/VERSION/; those that the lines name by their digest.
        asked: the policy.

    Raises:
        CalibrationError: the score was never recorded; or the server, too, would refuse this policy.
        TooFewSamples: the calibration cannot keep the promise.
        ArtifactCorrupt: a model that is needed is damaged.
        DataError: the files hold no decision of a model in the folder.
    """
    known, result = _Models(models, asked), Replay()
    for line in _decisions(files, result.broken):
        if line.digest not in known:
            result.unknown_digests[line.digest] += 1
            continue
        policy, scores = known.policy(line.digest), line.scores
        result.policies[f"{line.model} {line.version}"] = policy
        result.recorded |= scores.keys()
        if policy.score_name not in scores:
            result.without_score[f"{line.model} {line.version}"] += 1
            continue
        decider = known.decider(line.digest, line.precision)
        result.count(line, _deferred(decider, line, scores[policy.score_name]))
    if not result.all.images:
        raise _nothing_replayed(result, models)
    return result


def _deferred(decider: Decider, line: Line, score: float | None) -> bool:
    index, confidence = line.prediction.index, line.prediction.confidence
    group = decider.calibration.grouping.of_class[index]
    doubt = nan if confidence is None else -log(confidence)
    return decider.reason(group, nan if score is None else score, doubt) != "none"


def _decisions(files: Sequence[Path], broken: list[str]) -> Iterator[Line]:
    for path in files:
        with path.open("rb") as lines:
            for number, text in enumerate(lines, start=1):
                try:
                    record = orjson.loads(text)
                    if record["event"] == "decision":
                        yield Line.model_validate(record)
                except (orjson.JSONDecodeError, KeyError, TypeError, ValidationError):
                    broken.append(f"{path}:{number}")


def _nothing_replayed(result: Replay, models: Path) -> Exception:
    if result.without_score:
        wanted = ", ".join(sorted({policy.score_name for policy in result.policies.values()}))
        return CalibrationError(f"no line recorded the score {wanted}; recorded: {', '.join(sorted(result.recorded))}")
    if result.unknown_digests:
        digests = ", ".join(sorted(result.unknown_digests))
        return DataError(f"{models} holds none of the models that decided: {digests}; give their folder with --models")
    return DataError("the files hold no decision that can be read; give audit.jsonl of OODGATE_STATE_DIR/audit")
