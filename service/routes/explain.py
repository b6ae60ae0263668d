# SPDX-License-Identifier: Apache-2.0
"""One image in; its verdict out, and what stands behind it."""

from __future__ import annotations

import hashlib
import time
from functools import partial

import orjson
import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response

from detector.errors import NonFiniteFeatures
from detector.explain import Explanation, explain
from detector.images import Pixels, decode
from service.context import Context, Ctx
from service.errors import AdminOnly, ScoringFailed, TooManyImages
from service.judging import (
    Asker,
    Judged,
    by,
    counting_rejections,
    read_in_time,
    shows_evidence,
    while_the_caller_waits,
)
from service.reading import read_images
from service.routes.verdict import DOCUMENTED
from service.schemas import ExplainedBody, Problem, explanation_body, verdict_body
from service.served import Answer, ServedModel, Timing

router = APIRouter(tags=["verdict"])
_ANSWERS = {200: {"model": ExplainedBody, "description": "A verdict and what explains it."}, 403: {"model": Problem}}
_DOCUMENTED = DOCUMENTED | {"responses": DOCUMENTED["responses"] | _ANSWERS}


@router.post("/v1/explain", operation_id="explain", summary="Judge one image and say why", **_DOCUMENTED)
async def explained(request: Request, context: Ctx) -> Response:
    """The verdict of the default model, the nearest class prototypes, and a heat map. It counts in no metric of
    verdicts."""
    return await _respond(request, context, None, None)


@router.post(
    "/v1/models/{name}/explain",
    operation_id="model_explain",
    summary="Judge one image by a named model and say why",
    **_DOCUMENTED,
)
async def model_explained(name: str, request: Request, context: Ctx) -> Response:
    """As /v1/explain."""
    return await _respond(request, context, name, None)


@router.post(
    "/v1/models/{name}/versions/{version}/explain",
    operation_id="version_explain",
    summary="Judge one image by one version of a model and say why",
    **_DOCUMENTED,
)
async def version_explained(name: str, version: str, request: Request, context: Ctx) -> Response:
    """As /v1/explain; 404 where that version is not loaded."""
    return await _respond(request, context, name, version)


async def _respond(request: Request, context: Context, name: str | None, version: str | None) -> Response:
    if not shows_evidence(context, Asker.of(request)):
        raise AdminOnly("scores, and what explains them, are shown to the admin alone here")
    with counting_rejections(context), while_the_caller_waits(request):
        model = context.registry.get(name, version)
        started = time.monotonic()
        deadline = started + context.settings.request_timeout_s
        files, _ = await read_in_time(context, deadline, partial(read_images, request, context.settings))
        if len(files) > 1:
            raise TooManyImages(1)
        work = partial(_explained, context, model, files[0], started, time.monotonic())
        judged, explanation, image = await by(context, deadline, context.explainer.run(work))
    body = verdict_body(judged, model, request.scope["request_id"])
    body["explanation"] = explanation_body(explanation, image)
    headers = {"X-OODGate-Decision": judged.answer.verdict.decision}
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")


def _explained(
    context: Context, model: ServedModel, data: bytes, started: float, queued: float
) -> tuple[Judged, Explanation, Pixels]:
    """What runs on the explainer's thread; the decoding too, so that nothing is decoded that finds no place there."""
    began = time.monotonic()
    image = decode(data, model.detector.manifest.preprocessing, context.settings.limits, context.jpegs)
    decoded = time.monotonic()
    try:
        outputs = model.detector.outputs(torch.from_numpy(image)[None])
        forwarded = time.monotonic()
        verdict = model.detector.judge(outputs, model.decider)[0]
        timing = Timing(began - queued, forwarded - decoded, time.monotonic() - forwarded)
        if not verdict.ood.sound:
            raise ScoringFailed("the image could not be explained: its score is no number")
        explanation = explain(model.detector, image, verdict.ood.score_name)
    except NonFiniteFeatures as error:
        raise ScoringFailed(f"the image could not be explained: {error}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    return Judged(Answer(verdict, timing), sha256, decoded - began, time.monotonic() - started), explanation, image
