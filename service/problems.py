# SPDX-License-Identifier: Apache-2.0
"""Errors -> RFC 9457 problem documents, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from detector.errors import (
    ArtifactError,
    ArtifactNotFound,
    CalibrationError,
    ImageError,
    OodgateError,
    ScoreError,
    TooManyBytes,
    TooManyPixels,
    UnsupportedImageFormat,
)
from service.errors import MalformedRequest, ServiceError

MEDIA_TYPE = "application/problem+json"
_STATUS: Mapping[type[OodgateError], int] = {
    TooManyBytes: 413,
    TooManyPixels: 413,
    UnsupportedImageFormat: 415,
    ImageError: 422,
    ArtifactNotFound: 404,
    ArtifactError: 422,
    CalibrationError: 422,
    ScoreError: 422,
}


def status_of(error: OodgateError) -> int:
    """The HTTP status of an error."""
    return status_of_kind(type(error))


def status_of_kind(kind: type[OodgateError]) -> int:
    """The HTTP status of a class of errors."""
    if issubclass(kind, ServiceError):
        return kind.status
    return next((status for known, status in _STATUS.items() if issubclass(kind, known)), 500)


def problem(error: OodgateError, *, index: int | None = None) -> dict[str, Any]:
    """The problem document of an error; `index` is the image's place in its request.

    Besides the members of RFC 9457 it has `code`, a stable word, and `error`, as the Open Inference Protocol asks.
    """
    retry = error.retry_after_s if isinstance(error, ServiceError) else None
    detail = str(error) if index is None else f"image {index}: {error}"
    extra = {"index": index, "retry_after_s": retry}
    return _document(status_of(error), error.code, detail) | {k: v for k, v in extra.items() if v is not None}


def example(kind: type[OodgateError]) -> dict[str, Any]:
    """A problem document of a class of errors, with what the class says of itself for detail."""
    told = (kind.__doc__ or "").partition("\n")[0]
    return _document(status_of_kind(kind), kind.code, told) | {"request_id": "gate-7-000123"}


def response(error: OodgateError, request: Request, *, index: int | None = None) -> JSONResponse:
    """The HTTP answer of an error."""
    return _answer(problem(error, index=index), request)


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document."""

    @app.exception_handler(OodgateError)
    async def on_known(request: Request, error: OodgateError) -> JSONResponse:
        return response(error, request)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return response(MalformedRequest(told), request)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTPStatus(error.status_code).name.lower()
        answer = _answer(_document(error.status_code, code, str(error.detail)), request)
        answer.headers.update(error.headers or {})
        return answer


def unexpected(request: Request) -> JSONResponse:
    """The answer to an error that nobody foresaw; the log has it under the request's id."""
    return _answer(_document(500, "internal_error", "unexpected error; the log has more under this id"), request)


def _document(status: int, code: str, detail: str) -> dict[str, Any]:
    title = HTTPStatus(status).phrase
    kind = f"urn:oodgate:error:{code}"
    return {"type": kind, "title": title, "status": status, "detail": detail, "code": code, "error": detail}


def _answer(document: dict[str, Any], request: Request) -> JSONResponse:
    whole = document | {"instance": request.url.path, "request_id": request.scope.get("request_id", "")}
    retry = document.get("retry_after_s")
    headers = {} if retry is None else {"Retry-After": str(retry)}
    if document["status"] == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="oodgate"'
    return JSONResponse(whole, document["status"], headers, media_type=MEDIA_TYPE)
