# SPDX-License-Identifier: Apache-2.0
"""What the server answers. Fields that a newer server adds are ignored; those that it may withhold are optional."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class ModelRef(_Answer):
    """The model that judged; `digest` covers everything in it that influences a verdict."""

    name: str
    version: str
    digest: str


class Prediction(_Answer):
    """What the guarded network sees; `confidence` is its softmax probability, 0-1."""

    index: int
    label: str
    confidence: float


class Shadow(_Answer):
    """What another score says of the image; it decides nothing."""

    score: float | None = None
    p_value: float | None = None


class Ood(_Answer):
    """Why the image counts as in-distribution or not.

    Args:
        score: larger = more OOD.
        p_value: conformal; small = unlike the calibration images.
        p_cutoff: deferred as OOD iff p_value <= p_cutoff iff score > threshold.
        borderline: so near a limit that rounding could change the decision.
    """

    score_name: str = ""
    score: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    p_cutoff: float | None = None
    group: str = ""
    target_id_acceptance: float | None = None
    borderline: bool = False
    shadow: dict[str, Shadow] = {}


class Verdict(_Answer):
    """May the model be trusted on this image? `reason` is `none`, `ood`, `low_confidence`, or one yet to come."""

    request_id: str
    model: ModelRef
    decision: Literal["accept", "defer"]
    reason: str
    prediction: Prediction
    ood: Ood | None = None
    timing_ms: dict[str, float] = {}

    @property
    def accepted(self) -> bool:
        """True where the model may be trusted."""
        return self.decision == "accept"


class Calibration(_Answer):
    """Where a model's promise comes from; `timestamp` is in seconds since 1970."""

    n: int
    unit: str
    source: str
    timestamp: float
    target_id_acceptance: float
    guarantee: dict[str, Any]
    expected_acceptance_interval: tuple[float, float]
    promise: str


class ModelCard(_Answer):
    """What a model is, what calibrated it and what that promises."""

    name: str
    version: str
    digest: str
    created: str
    ready: bool
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    score: str
    shadow_scores: tuple[str, ...]
    calibration: Calibration
    forward: dict[str, Any] = {}
    report: dict[str, Any] = {}


class ModelList(_Answer):
    """All models of a server."""

    models: tuple[ModelCard, ...]
