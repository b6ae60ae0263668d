# SPDX-License-Identifier: Apache-2.0
"""Make the JSON Schemas of this folder from the packages that README.md names; run it in an environment of its own."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Schema = dict[str, Any]

PLAIN: dict[str, Schema] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {},
    "datetime": {"type": "string", "format": "date-time"},
    "ResourceQuantity": {"type": ["string", "number"]},
    "IntOrString": {"type": ["string", "integer"]},
}


def strict(node: Any) -> Any:
    """A pydantic schema as the API server would apply it: unknown fields are errors, absent is not null."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    options = [each for each in node.get("anyOf", []) if each != {"type": "null"}]
    if len(options) == 1:
        return strict(options[0])
    kept = {key: value for key, value in node.items() if key not in ("title", "default", "description")}
    if options:
        kept["anyOf"] = options
    properties = kept.pop("properties", None)
    kept = {key: strict(value) for key, value in kept.items()}
    if properties is not None:
        kept["properties"] = {name: strict(value) for name, value in properties.items()}
        kept["additionalProperties"] = False
    return kept


def of_sdk(kind: str) -> Schema:
    """The schema of one class of the KServe SDK and of all that it is made of."""
    modules = [importlib.import_module(name) for name in ("kserve.models", "kubernetes.client")]
    definitions: dict[str, Schema] = {}

    def schema(name: str) -> Schema:
        if name in PLAIN:
            return PLAIN[name]
        if inside := re.fullmatch(r"list\[(.*)\]", name):
            return {"type": "array", "items": schema(inside[1])}
        if inside := re.fullmatch(r"dict\(str, (.*)\)", name):
            return {"type": "object", "additionalProperties": schema(inside[1])}
        if name not in definitions:
            model = next((getattr(module, name) for module in modules if hasattr(module, name)), None)
            definitions[name] = {"type": "object"}
            if model is not None and hasattr(model, "model_json_schema"):  # the classes of Kubernetes itself
                made = strict(model.model_json_schema(by_alias=True))
                definitions.update(made.pop("$defs", {}))
                definitions[name] = made
            elif model is not None:
                definitions[name] |= members(model)
        return {"$ref": f"#/$defs/{name}"}

    def members(model: Any) -> Schema:
        names, types = model.attribute_map, model.openapi_types
        needed = [key for key in types if "must not be `None`" in inspect.getsource(getattr(model, key).fset)]
        found: Schema = {
            "properties": {names[key]: schema(types[key]) for key in types},
            "additionalProperties": False,
        }
        return found | ({"required": [names[key] for key in needed]} if needed else {})

    return schema(kind) | {"$defs": definitions}


def write(name: str, schema: Schema) -> None:
    text = json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema, indent=1, sort_keys=True)
    (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    keda = importlib.import_module("cloudcoil.models.keda.v1alpha1")
    operator = importlib.import_module("cloudcoil.models.prometheus_operator.v1")
    write("ScaledObject.keda.sh-v1alpha1", strict(keda.ScaledObject.model_json_schema(by_alias=True)))
    write("ServiceMonitor.monitoring.coreos.com-v1", strict(operator.ServiceMonitor.model_json_schema(by_alias=True)))
    write("InferenceService.serving.kserve.io-v1beta1", of_sdk("V1beta1InferenceService"))
