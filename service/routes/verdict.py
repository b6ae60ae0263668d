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
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from detector.errors import OodgateError
from service import problems
from service.context import Context, Ctx
from service.engine import ServedModel
from service.errors import EmptyRequest, MalformedForm, ServiceError, TooManyImages, UnsupportedMediaType
from service.judging import (
    Asker,
    Judged,
    count_rejection,
    counting_rejections,
    judge_all,
    read_in_time,
    shows_evidence,
)
from service.schemas import Problem, VerdictBody, VerdictList, verdict_body

router = APIRouter(tags=["verdict"], default_response_class=Response)

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
FORM_TYPE = "multipart/form-data"
_BYTES = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"file": {"type": "array", "items": _BYTES}}, "required": ["file"]}
_DOCUMENTED: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": _BYTES} for kind in IMAGE_TYPES} | {FORM_TYPE: {"schema": _FORM}},
        }
    },
    "responses": {
        200: {"model": VerdictBody | VerdictList, "description": "One verdict, or `verdicts` for several files."},
        **{status: {"model": Problem} for status in (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)},
    },
}


@router.post("/v1/verdict", operation_id="verdict", summary="Judge images by the default model", **_DOCUMENTED)
async def verdict(request: Request, context: Ctx) -> Response:
    """One image as the raw body, or one or more `file` parts of a form. A deferred image is a 200 too."""
    return await _respond(request, context, None, None)


@router.post(
    "/v1/models/{name}/verdict", operation_id="model_verdict", summary="Judge images by a named model", **_DOCUMENTED
)
async def model_verdict(name: str, request: Request, context: Ctx) -> Response:
    """As /v1/verdict."""
    return await _respond(request, context, name, None)


@router.post(
    "/v1/models/{name}/versions/{version}/verdict",
    operation_id="version_verdict",
    summary="Judge images by one version of a model",
    **_DOCUMENTED,
)
async def version_verdict(name: str, version: str, request: Request, context: Ctx) -> Response:
    """As /v1/verdict; 404 where that version is not loaded."""
    return await _respond(request, context, name, version)


async def _respond(request: Request, context: Context, name: str | None, version: str | None) -> Response:
    with counting_rejections(context):
        model = context.registry.get(name, version)
        started = time.monotonic()
        files, several = await read_in_time(context, partial(_read, request, context))
        deadline = time.monotonic() + context.settings.request_timeout_s
        results = await judge_all(context, Asker.of(request), model, files, started, deadline)
    responding = time.monotonic()
    answer = _body(request, context, model, results) if several else _single(request, context, model, results[0])
    context.metrics.stage["respond"].observe(time.monotonic() - responding)
    return answer


async def _read(request: Request, context: Context) -> tuple[list[bytes], bool]:
    """The encoded images of a request, and whether they are answered as a list."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM_TYPE:
        files = await _read_form(request, context.settings.max_images, context.settings.max_body_bytes)
        return files, len(files) > 1
    if kind not in IMAGE_TYPES:
        wanted = ", ".join((*IMAGE_TYPES, FORM_TYPE))
        raise UnsupportedMediaType(f"content type {kind or 'missing'!r} is not supported; send one of {wanted}")
    body = await request.body()
    if not body:
        raise EmptyRequest("the body is empty; send one image")
    return [body], False


async def _read_form(request: Request, max_images: int, max_bytes: int) -> list[bytes]:
    # One file more than allowed may pass the parser, so that the answer can be ours.
    parser = MultiPartParser(request.headers, request.stream(), max_files=max_images + 1, max_fields=100)
    parser.spool_max_size = max_bytes  # stay in memory: the body limit bounds it, and the disk may be read-only
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise TooManyImages(max_images) from error
        raise MalformedForm(f"the form cannot be parsed: {error.message}") from error
    except KeyError as error:
        raise MalformedForm("the form has no boundary in its content type") from error
    try:
        files = [
            await part.read() for name, part in form.multi_items() if isinstance(part, UploadFile) and name == "file"
        ]
    finally:
        await form.close()
    if not files:
        raise EmptyRequest("the form has no file part named `file`; send one or more")
    if len(files) > max_images:
        raise TooManyImages(max_images)
    return files


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
    if len(failures) == len(results) and all(isinstance(failure, ServiceError) for failure in failures):
        raise failures[0]  # the server failed, not the images: say so in the status
    for failure in failures:
        count_rejection(context, failure)
    evidence = shows_evidence(context, Asker.of(request))
    bodies = [
        {"problem": problems.problem(result, index=index)}
        if isinstance(result, OodgateError)
        else verdict_body(result, model, request.scope["request_id"], evidence=evidence)
        for index, result in enumerate(results)
    ]
    # The strictest decision of all: a caller that reads the header alone forwards only what is wholly accepted.
    return _json({"verdicts": bodies}, accepted=all(map(_accepted, results)))


def _accepted(result: Judged | OodgateError) -> bool:
    return isinstance(result, Judged) and result.answer.verdict.decision == "accept"


def _json(body: dict[str, Any], *, accepted: bool) -> Response:
    headers = {"X-OODGate-Decision": "accept" if accepted else "defer"}
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)
