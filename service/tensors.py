# SPDX-License-Identifier: Apache-2.0
"""Open Inference Protocol v2 on the wire: requests to images, verdicts to tensors.

Tensors lie in the JSON or, by Triton's binary tensor extension, behind it. Layout after
https://github.com/kserve/open-inference-protocol and Triton's docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import base64
import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json

from detector.images import Pixels
from detector.policy import Verdict
from service.errors import EmptyRequest, MalformedRequest, TooManyImages, TooManyValues
from service.oip_schemas import InferRequest, InputTensor, Parameters, RequestedOutput, TensorSpec

MAX_JSON_VALUES = 1_000_000  # parsing holds the interpreter: 20 MiB of small numbers would stall all others for 0.5 s


@dataclass(frozen=True)
class Output:
    """One output tensor: its datatype, and its value for one image."""

    datatype: str
    of: Callable[[Verdict], str | float | bool]


INPUTS = (
    TensorSpec(name="image_bytes", datatype="BYTES", shape=[-1]),
    TensorSpec(name="image", datatype="UINT8", shape=[-1, -1, -1, 3]),
)
OUTPUTS: Mapping[str, Output] = {
    "index": Output("INT64", lambda verdict: verdict.prediction.index),
    "label": Output("BYTES", lambda verdict: verdict.prediction.label),
    "confidence": Output("FP32", lambda verdict: verdict.prediction.confidence),
    "ood_score": Output("FP64", lambda verdict: verdict.ood.score),
    "p_value": Output("FP64", lambda verdict: verdict.ood.p_value),
    "is_ood": Output("BOOL", lambda verdict: verdict.reason == "ood"),
    "decision": Output("BYTES", lambda verdict: verdict.decision),
    "reason": Output("BYTES", lambda verdict: verdict.reason),
}
EVIDENCE = ("ood_score", "p_value")  # left out where OODGATE_EXPOSE keeps them from the caller
_DTYPES = {"INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "BOOL": "?"}


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Args:
        id: to be echoed; None where the caller gave none.
        images: encoded files, or uint8 [H, W, 3] arrays of one size.
        outputs: names in the order asked for, and whether each goes behind the JSON.
    """

    id: str | None
    images: Sequence[bytes] | Sequence[Pixels]
    outputs: Mapping[str, bool]


def parse(body: bytes, header_length: str | None, max_images: int) -> Asked:
    """Read an inference request.

    Args:
        body: the whole HTTP body.
        header_length: Inference-Header-Content-Length, the bytes of JSON; 0 says that the body is one encoded image.
        max_images: most images in one request.

    Raises:
        EmptyRequest, MalformedRequest, TooManyImages, TooManyValues
    """
    length = _json_length(header_length, len(body))
    if not body:
        raise EmptyRequest("the body is empty; send an inference request")
    if length == 0:
        return Asked(None, [body], dict.fromkeys(OUTPUTS, True))
    request = _read_json(body[:length])
    tensor = _only(request.inputs)
    binary = _binary_data(tensor, memoryview(body)[length:])
    read = _encoded_images if tensor.datatype == "BYTES" else _pixels
    return Asked(request.id, read(tensor, binary, max_images), _requested(request))


def render(head: Mapping[str, Any], verdicts: Sequence[Verdict], outputs: Mapping[str, bool]) -> tuple[bytes, int]:
    """Write an inference response.

    Args:
        head: its members beside the outputs.
        verdicts: one an image, in order.
        outputs: names, and whether each goes behind the JSON.

    Returns:
        The body, and the length of the JSON it starts with.
    """
    tensors, blobs = [], []
    for name, binary in outputs.items():
        output = OUTPUTS[name]
        tensor: dict[str, Any] = {"name": name, "datatype": output.datatype, "shape": [len(verdicts)]}
        values = [output.of(verdict) for verdict in verdicts]
        if binary:
            blobs.append(_to_binary(values, output.datatype))
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = _to_json(values, output.datatype)
        tensors.append(tensor)
    document = json.dumps(
        {**head, "outputs": tensors}, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    ).encode()
    return b"".join([document, *blobs]), len(document)


def _json_length(header: str | None, size: int) -> int:
    if header is None:
        return size
    if not (header.isascii() and header.isdigit() and len(header) < 20):
        raise MalformedRequest("Inference-Header-Content-Length must be the number of bytes of JSON in the body")
    if int(header) > size:
        raise MalformedRequest(f"Inference-Header-Content-Length is {header}, but the body has {size} bytes")
    return int(header)


def _read_json(document: bytes) -> InferRequest:
    if document.count(b",") >= MAX_JSON_VALUES:
        raise TooManyValues(MAX_JSON_VALUES)
    try:
        return InferRequest.model_validate(from_json(document, allow_inf_nan=False, cache_strings="keys"))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise MalformedRequest(f"{where}: {first['msg']}") from None
    except ValueError as error:
        raise MalformedRequest(
            f"the request is not JSON: {error}. Where tensors follow it, give its length in the header "
            "Inference-Header-Content-Length."
        ) from None


def _only(tensors: Sequence[InputTensor]) -> InputTensor:
    names = [tensor.name for tensor in tensors]
    spec = next((spec for spec in INPUTS if names == [spec.name]), None)
    if spec is None:
        raise MalformedRequest(f"`inputs` must hold image_bytes or image, one of the two, once; it is {_brief(names)}")
    tensor = tensors[0]
    if tensor.datatype != spec.datatype:
        raise MalformedRequest(f"{spec.name} has datatype {spec.datatype}, not {_brief(tensor.datatype)}")
    fits = len(tensor.shape) == len(spec.shape)
    if not fits or any(wanted not in (-1, length) for wanted, length in zip(spec.shape, tensor.shape, strict=True)):
        raise MalformedRequest(f"{spec.name} has shape {spec.shape}, where -1 is any length; not {tensor.shape}")
    return tensor


def _binary_data(tensor: InputTensor, behind: memoryview) -> memoryview | None:
    size = (tensor.parameters or {}).get("binary_data_size")
    if (size is None) == (tensor.data is None):
        raise MalformedRequest(
            f"{tensor.name} needs `data`, or `binary_data_size` among its parameters: one of the two. "
            "Shared memory is not supported."
        )
    if size is not None and type(size) is not int:
        raise MalformedRequest(f"binary_data_size of {tensor.name} must be a whole number of bytes")
    if (size or 0) != len(behind):
        raise MalformedRequest(
            f"{len(behind)} bytes follow the JSON, but binary_data_size is {_brief(size or 0)}. "
            "Inference-Header-Content-Length must be the length of the JSON alone."
        )
    return None if size is None else behind


def _check_count(images: int, max_images: int) -> None:
    if images == 0:
        raise EmptyRequest("the tensor holds no image; send one or more")
    if images > max_images:
        raise TooManyImages(max_images)


def _encoded_images(tensor: InputTensor, binary: memoryview | None, max_images: int) -> list[bytes]:
    count = tensor.shape[0]
    _check_count(count, max_images)
    if binary is not None:
        return _split(binary, count)
    if not isinstance(tensor.data, list) or len(tensor.data) != count:
        raise MalformedRequest(f"`data` of image_bytes must be a flat list of {count} strings, as its shape says")
    return [_from_base64(index, element) for index, element in enumerate(tensor.data)]


def _from_base64(index: int, element: object) -> bytes:
    try:
        if not isinstance(element, str):
            raise ValueError("it is no string")
        return base64.b64decode(element, validate=True)
    except ValueError as error:
        raise MalformedRequest(
            f"image_bytes[{index}] is not base64: {error}. In JSON an image is base64 without line breaks; as binary "
            "data it is sent as it is."
        ) from None


def _split(data: memoryview, count: int) -> list[bytes]:
    elements, at = [], 0
    for index in range(count):
        start = at + 4
        end = start + int.from_bytes(data[at:start], "little")
        if start > len(data) or end > len(data):
            raise MalformedRequest(
                f"image_bytes[{index}] ends beyond the {len(data)} bytes of the tensor. Each element is its length in "
                "4 bytes, little-endian, then its bytes."
            )
        elements.append(bytes(data[start:end]))
        at = end
    if at != len(data):
        raise MalformedRequest(f"{len(data) - at} bytes are left after the {count} elements of image_bytes")
    return elements


def _pixels(tensor: InputTensor, binary: memoryview | None, max_images: int) -> list[Pixels]:
    _check_count(tensor.shape[0], max_images)
    size = math.prod(tensor.shape)
    if size == 0:
        raise MalformedRequest(f"an image of shape {tensor.shape[1:]} has no pixels")
    if binary is None:
        flat = _numbers(tensor.data, tensor.shape)
    elif len(binary) == size:
        flat = np.frombuffer(binary, np.uint8)
    else:
        raise MalformedRequest(f"shape {tensor.shape} takes {size} bytes; binary_data_size is {len(binary)}")
    return list(flat.reshape(tensor.shape))


def _numbers(data: object, shape: Sequence[int]) -> NDArray[np.uint8]:
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):
        values = np.array([None])
    if values.shape not in ((math.prod(shape),), tuple(shape)):
        raise MalformedRequest(f"`data` of image must be a list of {math.prod(shape)} numbers, or nested as {shape}")
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        raise MalformedRequest("`data` of image must be whole numbers from 0 to 255")
    return values.astype(np.uint8)


def _requested(request: InferRequest) -> dict[str, bool]:
    binary = _flag(request.parameters, "binary_data_output", False)
    outputs = request.outputs or [RequestedOutput(name=name) for name in OUTPUTS]
    asked = {output.name: _flag(output.parameters, "binary_data", binary) for output in outputs}
    if len(asked) < len(outputs) or not asked.keys() <= OUTPUTS.keys():
        names = _brief([output.name for output in outputs])
        raise MalformedRequest(f"`outputs` takes {', '.join(OUTPUTS)}, each once at most; it is {names}")
    return asked


def _flag(parameters: Parameters | None, name: str, default: bool) -> bool:
    value = (parameters or {}).get(name, default)
    if not isinstance(value, bool):
        raise MalformedRequest(f"the parameter {name} must be true or false")
    return value


def _brief(value: object) -> str:
    return reprlib.repr(value)  # a caller's text of any length, cut


def _to_binary(values: Sequence[str | float | bool], datatype: str) -> bytes:
    if datatype != "BYTES":
        return np.array(values, _DTYPES[datatype]).tobytes()
    encoded = [str(value).encode() for value in values]
    return b"".join(len(element).to_bytes(4, "little") + element for element in encoded)


def _to_json(values: Sequence[str | float | bool], datatype: str) -> list[Any]:
    if datatype == "BYTES":
        return list(values)
    same_as_in_binary: list[Any] = np.array(values, _DTYPES[datatype]).tolist()
    return same_as_in_binary
