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

from detector.explain import Explanation, explain
from detector.images import Pixels, decode
from service.context import Ctx
from service.engine import Answer, ServedModel, Timing
from service.errors import AdminOnly, TooManyImages
from service.judging import Asker, Judged, counting_rejections, in_decoder, read_in_time, shows_evidence
from service.reading import read_images
from service.routes.verdict import DOCUMENTED
from service.schemas import ExplainedBody, Problem, explanation_body, verdict_body

router = APIRouter(tags=["verdict"])
_ANSWERS = {200: {"model": ExplainedBody, "description": "A verdict and what explains it."}, 403: {"model": Problem}}
_DOCUMENTED = DOCUMENTED | {"responses": DOCUMENTED["responses"] | _ANSWERS}


@router.post("/v1/explain", operation_id="explain", summary="Judge one image and say why", **_DOCUMENTED)
async def explained(request: Request, context: Ctx) -> Response:
    """The verdict of the default model, the nearest class prototypes, and a heat map. It counts in no metric of
    verdicts."""
    if not shows_evidence(context, Asker.of(request)):
        raise AdminOnly("scores, and what explains them, are shown to the admin alone here")
    with counting_rejections(context):
        model = context.registry.get()
        started = time.monotonic()
        files, _ = await read_in_time(context, partial(read_images, request, context.settings))
        if len(files) > 1:
            raise TooManyImages(1)
        timeout_s = context.settings.request_timeout_s
        work = partial(decode, files[0], model.detector.manifest.preprocessing, context.settings.limits)
        read = time.monotonic()
        image = await in_decoder(context, read + timeout_s, work)
        decoded = time.monotonic()
        answer, explanation = await context.explainer.run(partial(_explained, model, image, decoded), timeout_s)
    judged = Judged(answer, hashlib.sha256(files[0]).hexdigest(), decoded - read, time.monotonic() - started)
    body = verdict_body(judged, model, request.scope["request_id"])
    body["explanation"] = explanation_body(explanation, image)
    headers = {"X-OODGate-Decision": answer.verdict.decision}
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")


def _explained(model: ServedModel, image: Pixels, queued: float) -> tuple[Answer, Explanation]:
    """What runs on the explainer's thread."""
    began = time.monotonic()
    outputs = model.detector.outputs(torch.from_numpy(image)[None])
    forwarded = time.monotonic()
    verdict = model.detector.judge(outputs, model.decider)[0]
    timing = Timing(began - queued, forwarded - began, time.monotonic() - forwarded)
    return Answer(verdict, timing), explain(model.detector, image, verdict.ood.score_name)
