# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document: how errors are really answered, and an example of everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from detector import errors as detector_errors
from detector.errors import ArtifactError, CalibrationError, ImageError, OodgateError, ScoreError
from service import errors as service_errors
from service.errors import ServiceError
from service.examples import ANSWERS, BODIES
from service.problems import MEDIA_TYPE, example, status_of_kind
from service.security import is_open_path

_PROBLEM: dict[str, Any] = {"schema": {"$ref": "#/components/schemas/Problem"}}
_UNPROCESSABLE = {"$ref": "#/components/schemas/HTTPValidationError"}
_GATE_ALONE = {"path_refused", "gate_disabled", "upstream_failed", "not_scored", "upstream_timeout"}
_IMAGES_ALONE = {
    "empty_request", "malformed_form", "too_many_images", "unsupported_media_type", "queue_full",
    "scoring_failed", "not_ready", "engine_lost", "deadline_passed",
}  # fmt: skip
_TENSORS_ALONE = {"too_many_values"}
_MODELS_ALONE = {"state_unwritable"}  # beside what is wrong with a model itself
_ANSWERED = (ImageError, ArtifactError, CalibrationError, ScoreError, ServiceError)


def document(app: FastAPI) -> None:
    """Complete the document that FastAPI writes of an app."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        described = plain()
        if "examples" in described["components"]:
            return described  # FastAPI keeps it
        described["components"]["examples"] = {kind.code: {"value": example(kind)} for kind in _kinds()}
        for path, operations in described["paths"].items():
            for operation in operations.values():
                _complete(path, operation)
        return described

    app.openapi = complete  # type: ignore[method-assign]


def _complete(path: str, operation: dict[str, Any]) -> None:
    responses, name = operation["responses"], operation["operationId"]
    if not is_open_path(path):
        responses.setdefault("401", {"description": "No token, or an unknown one", "content": {MEDIA_TYPE: _PROBLEM}})
    for status, response in list(responses.items()):
        answer = response.get("content", {}).get("application/json", {})
        if answer.get("schema") == _UNPROCESSABLE:
            del responses[status]  # FastAPI's own, which is answered with a 400
            continue
        if answer.get("schema") == _PROBLEM["schema"]:
            response["content"] = {MEDIA_TYPE: _PROBLEM}
        if MEDIA_TYPE in response.get("content", {}):
            refs = {code: {"$ref": f"#/components/examples/{code}"} for code in _codes(path, int(status))}
            response["content"] = {MEDIA_TYPE: _PROBLEM | {"examples": refs}}
        elif status == "200" and name in ANSWERS:
            answer["example"] = ANSWERS[name]
    if name in BODIES:
        operation["requestBody"]["content"]["application/json"]["example"] = BODIES[name]


def _codes(path: str, status: int) -> Iterator[str]:
    """The errors of a status that an operation can end in."""
    judges = path.startswith("/gate/") or path.endswith(("/verdict", "/explain", "/infer"))
    for kind in _kinds():
        of_images = kind.code in _IMAGES_ALONE or issubclass(kind, ImageError)
        of_models = kind.code in _MODELS_ALONE or issubclass(kind, ArtifactError | CalibrationError | ScoreError)
        elsewhere = (
            (of_images and not judges)
            or (of_models and judges)
            or (kind.code in _GATE_ALONE and not path.startswith("/gate/"))
            or (kind.code in _TENSORS_ALONE and not path.endswith("/infer"))
        )
        if status_of_kind(kind) == status and not elsewhere:
            yield kind.code


def _kinds() -> list[type[OodgateError]]:
    """Every error that a request can be answered with, once."""
    known = [*vars(detector_errors).values(), *vars(service_errors).values()]
    kinds = dict.fromkeys(kind for kind in known if isinstance(kind, type) and issubclass(kind, _ANSWERED))
    return [kind for kind in kinds if kind not in (ImageError, ServiceError)]  # raised in no form but their own kinds
