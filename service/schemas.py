# SPDX-License-Identifier: Apache-2.0
"""The shapes of the API's answers, for its OpenAPI document and for the people who read it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, Field

from detector.artifact import CALIBRATION, SPLITS
from detector.errors import OodgateError
from detector.explain import Explanation, heat_png, png
from detector.images import Pixels
from detector.policy import Decision, Policy, Reason
from service.judging import Judged
from service.problems import problem
from service.registry import Registry
from service.served import ServedModel


class ModelRef(BaseModel):
    name: str
    version: str
    digest: str = Field(description="SHA-256 over everything in the model that influences a verdict.")


class PredictionBody(BaseModel):
    index: int
    label: str
    confidence: float = Field(description="Softmax probability of the prediction, 0-1.")


class ShadowBody(BaseModel):
    score: float
    p_value: float


class OodBody(BaseModel):
    score_name: str
    score: float = Field(description="Larger = more OOD.")
    threshold: float
    p_value: float = Field(description="Conformal p-value; small = unlike the calibration images.")
    p_cutoff: float = Field(description="Deferred as OOD iff p_value <= p_cutoff iff score > threshold.")
    group: str = Field(description="The calibration group that judged: all, a class, or other.")
    target_id_acceptance: float
    borderline: bool = Field(
        description="Score, confidence or class lie so near a limit that rounding could change the decision."
    )
    shadow: dict[str, ShadowBody] = Field(description="What other scores say; they decide nothing.")


class TimingBody(BaseModel):
    decode: float
    queue: float
    forward: float = Field(description="Of the whole batch this image was in.")
    score: float = Field(description="Of the whole batch this image was in.")
    total: float


class VerdictBody(BaseModel):
    request_id: str
    model: ModelRef
    decision: Decision
    reason: Reason
    prediction: PredictionBody
    ood: OodBody | None = Field(default=None, description="Absent where the server exposes decisions alone.")
    timing_ms: TimingBody


class ClassDistanceBody(BaseModel):
    index: int
    label: str
    distance: float = Field(description="Euclidean, between penultimate features and the mean of the class.")


class OodPrototypeBody(BaseModel):
    distance: float
    pi: float = Field(description="Share of the OOD prototype in the softmax over all prototypes.")


class ExplanationBody(BaseModel):
    nearest: list[ClassDistanceBody] = Field(description="Nearest first; empty where grood is not fitted.")
    ood_prototype: OodPrototypeBody | None
    score_without: float = Field(description="The lowest deciding score with one window of the image hidden.")
    input_png: str = Field(description="What the network saw, base64.")
    heat_png: str = Field(description="Which part raises the deciding score, base64, to lay over input_png.")


class ExplainedBody(VerdictBody):
    explanation: ExplanationBody


class Problem(BaseModel):
    type: str
    title: str
    status: int
    detail: str
    code: str
    error: str
    instance: str = ""
    request_id: str = ""
    index: int | None = None
    retry_after_s: int | None = None


class ItemProblem(BaseModel):
    problem: Problem


class VerdictList(BaseModel):
    verdicts: list[VerdictBody | ItemProblem]


class CalibrationBody(BaseModel):
    n: int
    unit: str
    source: str
    timestamp: float
    target_id_acceptance: float
    guarantee: dict[str, Any]
    expected_acceptance_interval: tuple[float, float]
    promise: str
    scores_digest: str = Field(description="Of the file of calibration scores.")
    splits_digest: str = Field(description="Of the file with the digests of the images in each split.")


class ForwardBody(BaseModel):
    device: str
    precision: str
    mode: str = Field(description="eager, compiled, or recorded as CUDA graphs.")
    settled: bool = Field(description="Whether it stays so; until then a faster form is being made and proven.")


class FailedUpdate(BaseModel):
    version: str
    code: str
    detail: str


class ModelCard(BaseModel):
    name: str
    version: str
    digest: str
    created: str
    ready: bool
    classes: list[str]
    preprocessing: dict[str, Any]
    score: str
    shadow_scores: list[str]
    calibration: CalibrationBody
    forward: ForwardBody
    report: dict[str, Any]
    failed_update: FailedUpdate | None = Field(
        description="The newest version that could not be loaded when last tried, and why; null where none is."
    )


class ModelList(BaseModel):
    models: list[ModelCard]


def verdict_body(judged: Judged, model: ServedModel, request_id: str, *, evidence: bool = True) -> dict[str, Any]:
    """One verdict as JSON; VerdictBody says what it holds. Without `evidence`, it holds no scores."""
    manifest, verdict, timing = model.detector.manifest, judged.answer.verdict, judged.answer.timing
    body = {
        "request_id": request_id,
        "model": {"name": manifest.name, "version": manifest.version, "digest": manifest.model_digest},
        "decision": verdict.decision,
        "reason": verdict.reason,
        "prediction": verdict.prediction,
        "ood": verdict.ood,
        "timing_ms": {
            "decode": round(1000 * judged.decode_s, 3),
            "queue": round(1000 * timing.queue, 3),
            "forward": round(1000 * timing.forward, 3),
            "score": round(1000 * timing.score, 3),
            "total": round(1000 * judged.total_s, 3),
        },
    }
    if not evidence:
        del body["ood"]
    return body


def item_body(
    index: int, result: Judged | OodgateError, model: ServedModel, request_id: str, *, evidence: bool
) -> dict[str, Any]:
    """One result of several as JSON: a verdict, or the problem of the image at this place."""
    if isinstance(result, OodgateError):
        return {"problem": problem(result, index=index)}
    return verdict_body(result, model, request_id, evidence=evidence)


def explanation_body(explanation: Explanation, image: Pixels) -> dict[str, Any]:
    """An explanation of the network's input as JSON; ExplanationBody says what it holds."""
    ood = explanation.ood_prototype
    return {
        "nearest": [asdict(distance) for distance in explanation.nearest],
        "ood_prototype": None if ood is None else asdict(ood),
        "score_without": explanation.score_without,
        "input_png": b64encode(png(image)).decode(),
        "heat_png": b64encode(heat_png(explanation.heat)).decode(),
    }


def model_card(registry: Registry, name: str) -> ModelCard:
    """What a model is, what calibrated it and what that promises; and why an update of it failed."""
    model, failure = registry.get(name), registry.failure(name)
    manifest, decider = model.detector.manifest, model.decider
    interval = decider.expected_acceptance()
    return ModelCard(
        name=manifest.name,
        version=manifest.version,
        digest=manifest.model_digest,
        created=manifest.created,
        ready=True,
        classes=list(manifest.class_names),
        preprocessing=manifest.preprocessing.model_dump(),
        score=decider.policy.score_name,
        shadow_scores=list(decider.shadows),
        calibration=CalibrationBody(
            n=manifest.calibration.n,
            unit="groups" if manifest.calibration.grouped else "images",
            source=manifest.calibration.source,
            timestamp=manifest.calibration.timestamp,
            target_id_acceptance=decider.policy.target_id_acceptance,
            guarantee=decider.policy.guarantee.model_dump(),
            expected_acceptance_interval=interval,
            promise=promise(decider.policy, decider.calibration.grouping.names, interval),
            scores_digest=f"sha256:{manifest.files[CALIBRATION]}",
            splits_digest=f"sha256:{manifest.files[SPLITS]}",
        ),
        forward=ForwardBody(**asdict(registry.forward(name))),
        report=manifest.report,
        failed_update=None if failure is None else FailedUpdate(**asdict(failure)),
    )


def promise(policy: Policy, groups: Sequence[str], interval: tuple[float, float]) -> str:
    """The guarantee in one sentence, with the 95 % interval of what such calibrations accept."""
    share = (
        f"at least {policy.target_id_acceptance:.4g} of the images distributed as the calibration images are accepted"
    )
    where = "" if len(groups) == 1 else ", in each calibration group"
    sure = f"in {1 - policy.guarantee.delta:.4g} of calibrations"
    how = {"pac": sure, "simultaneous": f"for every target at once, {sure}", "marginal": "on average over calibrations"}
    low, high = interval
    spread = f"95 % of such calibrations accept {low:.4f} to {high:.4f}"
    return f"{share}{where}, {how[policy.guarantee.kind]} ({spread}); nothing is promised about OOD images."
