# SPDX-License-Identifier: Apache-2.0
"""Liveness, readiness, metrics. None of them touches the model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder

from service.context import Ctx
from service.metrics import WithoutEvidence

router = APIRouter(tags=["health"])

_TEXT = {"schema": {"type": "string"}}
_EXPOSED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT}}
}


@router.get("/v2/health/live", operation_id="live", summary="Is the process worth keeping?")
async def live(context: Ctx) -> JSONResponse:
    """200 while the inference thread shows life, however busy it is; 503 asks for a restart."""
    alive = context.engine.alive
    return JSONResponse({"live": alive}, 200 if alive else 503)


@router.get("/v2/health/ready", operation_id="ready", summary="May traffic be sent here?")
async def ready(context: Ctx) -> JSONResponse:
    """200 once a model is loaded, proven and warm, while batches succeed, until the server begins to stop."""
    is_ready = context.ready
    return JSONResponse({"ready": is_ready, "live": context.engine.alive}, 200 if is_ready else 503)


@router.get(
    "/metrics", operation_id="metrics", summary="Prometheus metrics", response_class=Response, responses=_EXPOSED
)
async def metrics(context: Ctx, request: Request) -> Response:
    """The text format, or OpenMetrics where the scraper asks for it. No token is needed; where the server exposes
    decisions alone, the metrics that tell scores and p-values are for the admin's."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    registry = context.metrics.registry
    authorization = request.headers.get("authorization", "").encode("latin-1")
    if context.settings.expose == "all" or context.tokens.is_admin(authorization):
        return Response(encode(registry), media_type=content_type)
    return Response(encode(WithoutEvidence(registry)), media_type=content_type)
