# SPDX-License-Identifier: Apache-2.0
"""Open Inference Protocol v2, with Triton's binary tensors and repository index: for clients written for others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from detector import __version__
from detector.errors import ImageError, OodgateError
from detector.policy import Verdict
from service import problems, tensors
from service.context import Context, Ctx
from service.errors import UnsupportedMediaType
from service.judging import (
    Asker,
    Judged,
    count_rejection,
    counting_rejections,
    in_decoder,
    judge_all,
    read_in_time,
    shows_evidence,
    while_the_caller_waits,
)
from service.oip_schemas import (
    INFER,
    LENGTH_HEADER,
    ModelMetadata,
    ModelNames,
    ModelReady,
    ServerMetadata,
    TensorSpec,
)
from service.schemas import Problem
from service.served import ServedModel

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such model or version."}}
_READY: dict[str, Any] = {"responses": {**_UNKNOWN, 503: {"model": ModelReady, "description": "Not now."}}}


@router.get("", operation_id="oip_server", summary="The server's name, version and protocol extensions")
async def server_metadata() -> ServerMetadata:
    """What a client of the Open Inference Protocol asks first."""
    return ServerMetadata(name="oodgate", version=__version__, extensions=["model_repository", "binary_tensor_data"])


@router.get("/models", operation_id="oip_models", summary="Names of the loaded models")
async def list_models(context: Ctx) -> ModelNames:
    """As KServe lists them; /v1/models has the cards."""
    return ModelNames(models=context.registry.names)


@router.get("/models/{name}", operation_id="oip_model", summary="Tensors of a model", responses=_UNKNOWN)
async def model_metadata(name: str, context: Ctx) -> ModelMetadata:
    """Its inputs, of which a request gives exactly one, and its outputs; -1 is any length."""
    return _metadata(context.registry.get(name))


@router.get(
    "/models/{name}/versions/{version}",
    operation_id="oip_version",
    summary="Tensors of one version of a model",
    responses=_UNKNOWN,
)
async def version_metadata(name: str, version: str, context: Ctx) -> ModelMetadata:
    """As for the model."""
    return _metadata(context.registry.get(name, version))


@router.get(
    "/models/{name}/ready", operation_id="oip_model_ready", summary="Does the model answer?",
    response_model=ModelReady, **_READY,
)  # fmt: skip
async def model_ready(name: str, context: Ctx) -> JSONResponse:
    """200 while the model is loaded and the server takes work."""
    return _ready(context, context.registry.get(name))


@router.get(
    "/models/{name}/versions/{version}/ready",
    operation_id="oip_version_ready",
    summary="Does this version answer?",
    response_model=ModelReady,
    **_READY,
)
async def version_ready(name: str, version: str, context: Ctx) -> JSONResponse:
    """200 while the version is loaded and the server takes work."""
    return _ready(context, context.registry.get(name, version))


@router.post(
    "/models/{name}/infer", operation_id="oip_infer", summary="Judge the images of a tensor", response_model=None,
    **INFER,
)  # fmt: skip
async def infer(name: str, request: Request, context: Ctx) -> Response:
    """One image that cannot be judged fails the whole request: a tensor has no place for its problem."""
    return await _infer(request, context, name, None)


@router.post(
    "/models/{name}/versions/{version}/infer",
    operation_id="oip_version_infer",
    summary="Judge the images of a tensor by one version of a model",
    response_model=None,
    **INFER,
)
async def version_infer(name: str, version: str, request: Request, context: Ctx) -> Response:
    """As for the model; 404 where that version is not loaded."""
    return await _infer(request, context, name, version)


def _metadata(model: ServedModel) -> ModelMetadata:
    manifest = model.detector.manifest
    return ModelMetadata(
        name=manifest.name,
        versions=[manifest.version],
        platform="oodgate",
        inputs=list(tensors.INPUTS),
        outputs=[
            TensorSpec(name=name, datatype=output.datatype, shape=[-1]) for name, output in tensors.OUTPUTS.items()
        ],
    )


def _ready(context: Context, model: ServedModel) -> JSONResponse:
    ready = context.engine.accepting and context.engine.alive
    return JSONResponse({"name": model.detector.manifest.name, "ready": ready}, 200 if ready else 503)


async def _infer(request: Request, context: Context, name: str, version: str | None) -> Response:
    with counting_rejections(context), while_the_caller_waits(request):
        model = context.registry.get(name, version)
        started = time.monotonic()
        deadline = started + context.settings.request_timeout_s
        body = await read_in_time(context, deadline, partial(_read, request))
        length, most = request.headers.get(LENGTH_HEADER), context.settings.max_images
        asked = await in_decoder(context, deadline, lambda: tensors.parse(body, length, most))
        results = await judge_all(context, Asker.of(request), model, asked.images, started, deadline)
    responding = time.monotonic()
    answer = _failure(request, context, results) or _response(request, context, model, asked, _verdicts(results))
    context.metrics.stage["respond"].observe(time.monotonic() - responding)
    return answer


async def _read(request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"content encoding {encoding!r} is not supported; send the body uncompressed")
    return await request.body()


def _failure(request: Request, context: Context, results: Sequence[Judged | OodgateError]) -> Response | None:
    """The problem of the first image that failed."""
    for index, result in enumerate(results):
        if isinstance(result, OodgateError):
            count_rejection(context, result)
            return problems.response(result, request, index=index if isinstance(result, ImageError) else None)
    return None


def _verdicts(results: Sequence[Judged | OodgateError]) -> list[Verdict]:
    return [result.answer.verdict for result in results if isinstance(result, Judged)]


def _response(
    request: Request, context: Context, model: ServedModel, asked: tensors.Asked, verdicts: Sequence[Verdict]
) -> Response:
    shown = shows_evidence(context, Asker.of(request))
    manifest, evidence = model.detector.manifest, verdicts[0].ood
    parameters: dict[str, str | float | bool] = {
        "score_name": evidence.score_name,
        "target_id_acceptance": evidence.target_id_acceptance,
        "digest": manifest.model_digest,
    }
    if shown and len(model.decider.thresholds) == 1:  # with groups, each image has the threshold of its own
        parameters["threshold"] = evidence.threshold
    head = {
        "model_name": manifest.name,
        "model_version": manifest.version,
        "id": request.scope["request_id"] if asked.id is None else asked.id,
        "parameters": parameters,
    }
    outputs = {name: binary for name, binary in asked.outputs.items() if shown or name not in tensors.EVIDENCE}
    body, json_length = tensors.render(head, verdicts, outputs)
    accepted = all(verdict.decision == "accept" for verdict in verdicts)
    headers = {"X-OODGate-Decision": "accept" if accepted else "defer"}
    if json_length == len(body):
        return Response(body, headers=headers, media_type="application/json")
    headers[LENGTH_HEADER] = str(json_length)
    return Response(body, headers=headers, media_type="application/octet-stream")
