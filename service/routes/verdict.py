# SPDX-License-Identifier: Apache-2.0
"""An image in, a verdict out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from detector.errors import OodgateError
from service import problems
from service.context import Context, Ctx
from service.errors import ServiceError
from service.judging import (
    Asker,
    Judged,
    count_rejection,
    counting_rejections,
    judge_all,
    read_in_time,
    shows_evidence,
    while_the_caller_waits,
)
from service.reading import IMAGES_BODY, read_images
from service.schemas import Problem, VerdictBody, VerdictList, item_body, verdict_body
from service.served import ServedModel

router = APIRouter(tags=["verdict"], default_response_class=Response)

DOCUMENTED: dict[str, Any] = {
    "openapi_extra": {"requestBody": IMAGES_BODY},
    "responses": {
        200: {"model": VerdictBody | VerdictList, "description": "One verdict, or `verdicts` for several files."},
        **{status: {"model": Problem} for status in (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)},
    },
}


@router.post("/v1/verdict", operation_id="verdict", summary="Judge images by the default model", **DOCUMENTED)
async def verdict(request: Request, context: Ctx) -> Response:
    """One image as the raw body, or one or more `file` parts of a form. A deferred image is a 200 too."""
    return await _respond(request, context, None, None)


@router.post(
    "/v1/models/{name}/verdict", operation_id="model_verdict", summary="Judge images by a named model", **DOCUMENTED
)
async def model_verdict(name: str, request: Request, context: Ctx) -> Response:
    """As /v1/verdict."""
    return await _respond(request, context, name, None)


@router.post(
    "/v1/models/{name}/versions/{version}/verdict",
    operation_id="version_verdict",
    summary="Judge images by one version of a model",
    **DOCUMENTED,
)
async def version_verdict(name: str, version: str, request: Request, context: Ctx) -> Response:
    """As /v1/verdict; 404 where that version is not loaded."""
    return await _respond(request, context, name, version)


async def _respond(request: Request, context: Context, name: str | None, version: str | None) -> Response:
    with counting_rejections(context), while_the_caller_waits(request):
        model = context.registry.get(name, version)
        started = time.monotonic()
        deadline = started + context.settings.request_timeout_s
        files, several = await read_in_time(context, deadline, partial(read_images, request, context.settings))
        results = await judge_all(context, Asker.of(request), model, files, started, deadline)
    responding = time.monotonic()
    answer = _body(request, context, model, results) if several else _single(request, context, model, results[0])
    context.metrics.stage["respond"].observe(time.monotonic() - responding)
    return answer


def _single(request: Request, context: Context, model: ServedModel, result: Judged | OodgateError) -> Response:
    if isinstance(result, OodgateError):
        count_rejection(context, result)
        return problems.response(result, request, index=0)
    evidence = shows_evidence(context, Asker.of(request))
    return _json(
        verdict_body(result, model, request.scope["request_id"], evidence=evidence), accepted=_accepted(result)
    )


def _body(request: Request, context: Context, model: ServedModel, results: Sequence[Judged | OodgateError]) -> Response:
    failures = [result for result in results if isinstance(result, OodgateError)]
    for failure in failures:
        count_rejection(context, failure)
    if len(failures) == len(results) and all(isinstance(failure, ServiceError) for failure in failures):
        raise failures[0]  # the server failed, not the images: say so in the status
    evidence = shows_evidence(context, Asker.of(request))
    bodies = [
        item_body(index, result, model, request.scope["request_id"], evidence=evidence)
        for index, result in enumerate(results)
    ]
    # The strictest decision of all: a caller that reads the header alone forwards only what is wholly accepted.
    return _json({"verdicts": bodies}, accepted=all(map(_accepted, results)))


def _accepted(result: Judged | OodgateError) -> bool:
    return isinstance(result, Judged) and result.answer.verdict.decision == "accept"


def _json(body: dict[str, Any], *, accepted: bool) -> Response:
    headers = {"X-OODGate-Decision": "accept" if accepted else "defer"}
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)
