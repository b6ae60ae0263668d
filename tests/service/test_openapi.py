# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document: complete, stable, and true to its own schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from service.problems import MEDIA_TYPE

# Clients are generated after these names: to change one is to break them.
OPERATIONS = [
    "console",
    "console_asset",
    "explain",
    "gate_post",
    "gate_put",
    "get_drift",
    "get_model",
    "get_policy",
    "get_report",
    "list_models",
    "live",
    "metrics",
    "model_explain",
    "model_verdict",
    "monitor",
    "oip_infer",
    "oip_load",
    "oip_model",
    "oip_model_ready",
    "oip_models",
    "oip_repository_index",
    "oip_server",
    "oip_unload",
    "oip_version",
    "oip_version_infer",
    "oip_version_ready",
    "put_policy",
    "ready",
    "reset_drift",
    "verdict",
    "version_explain",
    "version_verdict",
]


@pytest.fixture(scope="module")
def document(shared_server: Any) -> dict[str, Any]:
    found: dict[str, Any] = shared_server.client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def contents(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of every body asked or answered as JSON: its operation, its status or `body`, and what is said of it."""
    for operation in operations(document):
        described = {"body": operation.get("requestBody", {})} | operation["responses"]
        for status, one in described.items():
            for kind, content in one.get("content", {}).items():
                if kind in ("application/json", MEDIA_TYPE):
                    yield operation["operationId"], status, content


def test_the_names_of_operations_are_stable(document: dict[str, Any]) -> None:
    assert sorted(operation["operationId"] for operation in operations(document)) == OPERATIONS


def test_all_that_is_asked_or_answered_as_json_has_an_example_of_its_schema(document: dict[str, Any]) -> None:
    lacking = []
    for name, status, content in contents(document):
        examples = [content["example"]] if "example" in content else []
        for example in content.get("examples", {}).values():
            examples.append(document["components"]["examples"][example["$ref"].rpartition("/")[2]]["value"])
        if not examples:
            lacking.append((name, status))
        schema = content["schema"] | {"components": document["components"]}
        for example in examples:
            jsonschema.validate(example, schema, jsonschema.Draft202012Validator)
    assert not [(name, status) for name, status in lacking if status in ("body", "200")]
    assert {status for _, status in lacking} <= {"422", "503"}  # the gate's deferral, and what is not ready


def test_errors_are_shown_where_they_happen_with_their_own_status(document: dict[str, Any]) -> None:
    shown = {
        (name, status): set(content["examples"])
        for name, status, content in contents(document)
        if "examples" in content
    }
    for (_, status), codes in shown.items():
        for code in codes:
            assert document["components"]["examples"][code]["value"]["status"] == int(status)
    assert shown["verdict", "429"] == {"queue_full", "buffers_full"}
    assert shown["verdict", "422"] == {"undecodable_image"}
    assert (shown["put_policy", "413"], shown["put_policy", "429"]) == ({"body_too_large"}, {"buffers_full"})
    assert shown["put_policy", "404"] == {"model_not_found", "artifact_not_found"}
    assert {"upstream_failed", "path_refused"} & shown["verdict", "400"] == set()
    assert {code for codes in shown.values() for code in codes} == document["components"]["examples"].keys()
