# SPDX-License-Identifier: Apache-2.0
"""The reverse proxy: what is accepted goes on to the app, what is deferred never reaches it.

POST and PUT alone. Nothing passes the gate unjudged, so other methods are a 405: send them to the app itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from detector.errors import OodgateError
from detector.policy import Verdict
from service import problems
from service.context import Context, Ctx
from service.errors import GateDisabled, ModelNotFound, NotScored, QueueFull, UpstreamFailed, UpstreamTimeout
from service.judging import (
    Asker,
    Judged,
    count_rejection,
    counting_rejections,
    in_time,
    judge_all,
    read_in_time,
    shows_evidence,
    while_the_caller_waits,
)
from service.reading import IMAGES_BODY, read_images
from service.schemas import Problem, VerdictBody, VerdictList, item_body
from service.served import ServedModel
from service.tracing import SPAN

if TYPE_CHECKING:
    from service.upstream import Upstream

router = APIRouter(tags=["gate"], default_response_class=Response)

Outcome = Literal["forwarded", "deferred", "unscored", "refused", "left", "upstream_error"]
_DOCUMENTED: dict[str, Any] = {
    "summary": "Forward to the app what is accepted",
    "openapi_extra": {"requestBody": IMAGES_BODY},
    "responses": {
        200: {"description": "Accepted: the app's own answer, whatever its status, with `X-OODGate-Decision: accept`."},
        422: {
            "model": VerdictBody | VerdictList | Problem,
            "description": "Deferred, with `X-OODGate-Decision: defer` (status and body are settings); or no image.",
        },
        **{status: {"model": Problem} for status in (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504)},
    },
}


@router.post("/gate/{path:path}", operation_id="gate_post", **_DOCUMENTED)
async def gate_post(path: str, request: Request, context: Ctx) -> Response:
    """One image as the raw body, or a form with one or more files; forwarded, as it came, if all are accepted."""
    return await _respond(request, context)


@router.put("/gate/{path:path}", operation_id="gate_put", **_DOCUMENTED)
async def gate_put(path: str, request: Request, context: Ctx) -> Response:
    """As for POST."""
    return await _respond(request, context)


@dataclass(frozen=True, slots=True)
class _Judgement:
    """The verdicts on the images of a request, or what kept them from being judged."""

    model: ServedModel | None
    results: Sequence[Judged | OodgateError]
    several: bool = False

    @property
    def verdicts(self) -> list[Verdict]:
        return [result.answer.verdict for result in self.results if isinstance(result, Judged)]

    @property
    def deferred(self) -> bool:
        return any(verdict.decision == "defer" for verdict in self.verdicts)

    @property
    def refused(self) -> tuple[int, OodgateError] | None:
        """The first image that the client itself must mend."""
        errors = ((index, result) for index, result in enumerate(self.results) if isinstance(result, OodgateError))
        return next(((index, error) for index, error in errors if not _is_ours(error)), None)

    @property
    def failure(self) -> OodgateError | None:
        return next((result for result in self.results if isinstance(result, OodgateError)), None)


async def _respond(request: Request, context: Context) -> Response:
    outcome: Outcome = "refused"
    try:
        if context.upstream is None:
            raise GateDisabled
        target = context.upstream.target(request)
        judgement = await _judge(request, context)
        if judgement.refused is not None:
            index, error = judgement.refused
            return problems.response(error, request, index=index)
        if judgement.deferred:
            outcome = "deferred"
            return _deferred(request, context, judgement)
        if judgement.failure is not None:
            _fail(request, context, judgement.failure)
        outcome = "forwarded" if judgement.failure is None else "unscored"
        return await _forward(request, context, context.upstream, target, _headers(request, context, judgement))
    except (UpstreamFailed, UpstreamTimeout):
        outcome = "upstream_error"
        raise
    except ClientDisconnect:
        outcome = "left"
        raise
    finally:
        context.metrics.gate_requests.labels(outcome).inc()


async def _judge(request: Request, context: Context) -> _Judgement:
    started = time.monotonic()
    deadline = started + context.settings.request_timeout_s
    asker = Asker.of(request)

    async def read() -> tuple[list[bytes], bool]:
        await request.body()  # kept, so that it goes on as it came
        return await read_images(request, context.settings, part=None)

    try:
        with counting_rejections(context), while_the_caller_waits(request):
            # Who fails open needs the body even where it cannot be judged.
            reader = in_time if context.settings.gate_fail_policy == "open" else read_in_time
            files, several = await reader(context, deadline, read)
            model = context.registry.get()
            results = await judge_all(context, asker, model, files, started, deadline)
    except OodgateError as error:
        if not _is_ours(error):
            raise
        return _Judgement(None, [error])
    for result in results:
        if isinstance(result, OodgateError):
            count_rejection(context, result)
    return _Judgement(model, results, several)


def _is_ours(error: OodgateError) -> bool:
    """Whether the server failed, not the client."""
    return problems.status_of(error) >= 500 or isinstance(error, QueueFull | ModelNotFound)


def _fail(request: Request, context: Context, failure: OodgateError) -> None:
    """Let pass what could not be judged, on record, or refuse it."""
    if context.settings.gate_fail_policy == "closed":
        raise failure if isinstance(failure, QueueFull) else NotScored(failure)
    asker = Asker.of(request)
    context.audit.write(
        {
            "event": "unscored",
            "request_id": asker.request_id,
            "caller": asker.caller.name,
            "code": failure.code,
        }
    )


async def _forward(
    request: Request, context: Context, upstream: Upstream, target: bytes, told: dict[str, str]
) -> Response:
    response, seconds = await upstream.forward(request, target, await request.body(), told)
    context.metrics.stage["upstream"].observe(seconds)
    if SPAN in request.scope:
        request.scope[SPAN].stages({"upstream": seconds}, {})
    return response


def _deferred(request: Request, context: Context, judgement: _Judgement) -> Response:
    settings, asker = context.settings, Asker.of(request)
    content = settings.gate_defer_body
    if content is None:
        assert judgement.model is not None  # nothing is deferred without one
        evidence = shows_evidence(context, asker)
        items = [
            item_body(index, result, judgement.model, asker.request_id, evidence=evidence)
            for index, result in enumerate(judgement.results)
        ]
        content = {"verdicts": items} if judgement.several else items[0]
    headers = _headers(request, context, judgement)
    return Response(orjson.dumps(content), settings.gate_defer_status, headers, media_type="application/json")


def _headers(request: Request, context: Context, judgement: _Judgement) -> dict[str, str]:
    """What client and app are told: of several images, about the one most in doubt."""
    if judgement.failure is not None and not judgement.deferred:
        return {"X-OODGate-Decision": "unscored"}
    verdict = min(judgement.verdicts, key=lambda verdict: (verdict.decision == "accept", verdict.ood.p_value))
    headers: dict[str, str] = {"X-OODGate-Decision": verdict.decision, "X-OODGate-Reason": verdict.reason}
    if shows_evidence(context, Asker.of(request)):
        headers |= {"X-OODGate-Score": repr(verdict.ood.score), "X-OODGate-P-Value": repr(verdict.ood.p_value)}
    return headers
