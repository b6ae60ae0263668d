# SPDX-License-Identifier: Apache-2.0
"""The shapes of the Open Inference Protocol's requests and answers, read strictly and shown in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from service.schemas import Problem

LENGTH_HEADER = "Inference-Header-Content-Length"
Parameters = dict[str, Any]  # by the protocol strings, numbers and booleans; what is unknown is not read


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True)


class InputTensor(_Wire):
    name: str
    shape: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(max_length=8)
    datatype: str
    parameters: Parameters | None = Field(default=None, description="`binary_data_size`: bytes behind the JSON.")
    data: Any = Field(default=None, description="Flat, row-major, or nested as the shape; BYTES as base64.")


class RequestedOutput(_Wire):
    name: str
    parameters: Parameters | None = Field(default=None, description="`binary_data`: whether behind the JSON.")


class InferRequest(_Wire):
    id: str | None = None
    parameters: Parameters | None = Field(default=None, description="`binary_data_output`: default of `binary_data`.")
    inputs: list[InputTensor] = Field(max_length=8)
    outputs: list[RequestedOutput] | None = Field(default=None, max_length=16)


class OutputTensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters | None = None
    data: list[int | float | bool | str | None] | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str
    parameters: dict[str, str | float | bool]
    outputs: list[OutputTensor]


class TensorSpec(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class ModelNames(BaseModel):
    models: list[str]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class ModelReady(BaseModel):
    name: str
    ready: bool


class IndexEntry(BaseModel):
    name: str
    version: str
    state: str
    reason: str


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without `$defs`, which mean nothing inside an OpenAPI document."""
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(definitions[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items()}
        return [resolved(value) for value in node] if isinstance(node, list) else node

    result: dict[str, Any] = resolved(schema)
    return result


INFER: dict[str, Any] = {
    "openapi_extra": {
        "parameters": [
            {
                "name": LENGTH_HEADER,
                "in": "header",
                "description": "Bytes of JSON at the start of the body, where binary tensors follow it; 0 where the "
                "body is one encoded image.",
                "schema": {"type": "integer", "minimum": 0},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _inlined(InferRequest.model_json_schema()),
                    "example": {
                        "id": "42",
                        "inputs": [
                            {"name": "image_bytes", "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgo="]}
                        ],
                        "outputs": [{"name": "decision"}, {"name": "p_value"}],
                    },
                },
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
    },
    "responses": {
        200: {
            "model": InferResponse,
            "description": "One value an image in each output.",
            "content": {
                "application/json": {
                    "example": {
                        "model_name": "cifar10",
                        "model_version": "1",
                        "id": "42",
                        "parameters": {"score_name": "grood", "target_id_acceptance": 0.95, "threshold": 0.141},
                        "outputs": [
                            {"name": "decision", "datatype": "BYTES", "shape": [1], "data": ["accept"]},
                            {"name": "p_value", "datatype": "FP64", "shape": [1], "data": [0.87]},
                        ],
                    }
                },
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        **{status: {"model": Problem} for status in (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)},
    },
}
