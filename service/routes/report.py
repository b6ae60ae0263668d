# SPDX-License-Identifier: Apache-2.0
"""What was measured of a model, and what other targets would mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from detector.artifact import read_manifest, read_report
from detector.errors import ArtifactError, TooFewSamples
from detector.metrics import histogram, histogram_edges
from detector.policy import Decider, Policy
from service.context import Ctx
from service.errors import AdminOnly
from service.judging import Asker, in_decoder, shows_evidence
from service.schemas import Problem
from service.served import ServedModel

router = APIRouter(prefix="/v1/models", tags=["models"])

BINS = 40
TARGETS = tuple(round(0.8 + 0.005 * step, 3) for step in range(40))  # 0.80 to 0.995


@router.get(
    "/{name}/report",
    operation_id="get_report",
    summary="Calibration, evaluation, and what other targets would mean",
    responses={403: {"model": Problem}, 404: {"model": Problem}},
)
async def report(name: str, request: Request, context: Ctx) -> dict[str, Any]:
    """Histograms of the calibration scores, the stored evaluation, and expected deferrals at other targets."""
    if not shows_evidence(context, Asker.of(request)):
        raise AdminOnly("scores and thresholds are shown to the admin alone here")
    model = context.registry.get(name)
    manifest = model.detector.manifest
    directory = context.settings.models / manifest.name / manifest.version
    return await in_decoder(context, float("inf"), partial(_report, model, directory))


def _report(model: ServedModel, directory: Path) -> dict[str, Any]:
    decider = model.decider
    name = decider.policy.score_name
    stored = _stored(model, directory)
    of_score = stored.get("scores", {}).get(name, {})
    return {
        "score": name,
        "policy": decider.policy.model_dump(),
        "calibration": calibration(decider),
        "evaluation": {
            "id": stored.get("id"),
            "decisions": stored.get("decisions", {}),
            "ood": of_score.get("ood", {}),
            "shifted": stored.get("shifted", {}),
            "p_values": of_score.get("p_values"),
        },
        "targets": targets(model, of_score.get("p_values")),
    }


def _stored(model: ServedModel, directory: Path) -> dict[str, Any]:
    """The evaluation on disk; empty where there is none, a damaged one, or one of another model than is served."""
    try:
        manifest = read_manifest(directory)  # as it is now: `oodgate evaluate` replaces it with the report
    except (ArtifactError, OSError):
        return {}
    return read_report(directory, manifest) if manifest.model_digest == model.detector.manifest.model_digest else {}


def calibration(decider: Decider) -> list[dict[str, Any]]:
    """By group: its threshold, and a histogram of its calibration scores, the end bins holding what lies beyond."""
    name, groups = decider.policy.score_name, decider.calibration.grouping.names
    found = []
    for group, scores, cut in zip(groups, decider.calibration.scores[name], decider.thresholds, strict=True):
        edges = histogram_edges([scores], BINS)
        counts = histogram(scores, edges).tolist()
        found.append({"group": group, "n": cut.n, "threshold": cut.value, "edges": edges.tolist(), "counts": counts})
    return found


def targets(model: ServedModel, p_values: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What each target would defer: of the calibration images, and of the OOD sets of the stored evaluation.

    Other targets than the calibrated one are promised by the `simultaneous` guarantee; those that the calibration
    cannot promise are left out.
    """
    policy = model.decider.policy
    found = []
    for target in sorted({*TARGETS, policy.target_id_acceptance}):
        try:
            decider = model.detector.with_policy(_at(model, target), ())
        except TooFewSamples:
            continue
        cuts = decider.thresholds
        total = sum(cut.n for cut in cuts)
        cutoff = sum(cut.n * float(cut.p_cutoff) for cut in cuts) / total
        found.append(
            {
                "target_id_acceptance": target,
                "guarantee": decider.policy.guarantee.model_dump(),
                "threshold": max(cut.value for cut in cuts),
                "id_deferral": sum(cut.n - cut.rank for cut in cuts) / total,
                "caught": {}
                if p_values is None
                else {
                    name: _share_up_to(cutoff, p_values["edges"], counts) for name, counts in p_values["ood"].items()
                },
            }
        )
    return found


def _at(model: ServedModel, target: float) -> Policy:
    policy = model.decider.policy
    if target == policy.target_id_acceptance:
        return policy
    guarantee = policy.guarantee.model_copy(update={"kind": "simultaneous"})
    return policy.model_copy(update={"target_id_acceptance": target, "guarantee": guarantee, "alpha_conf": 0.0})


def _share_up_to(cutoff: float, edges: list[float], counts: list[int]) -> float:
    """Share of p-values up to a cut-off, interpolated within a bin."""
    return float(np.interp(cutoff, edges, np.concatenate([[0], np.cumsum(counts)])) / sum(counts))
