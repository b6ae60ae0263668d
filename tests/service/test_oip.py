# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from detector import Detector, __version__
from detector.images import Pixels
from service import Settings
from service.engine import MOST_RESTARTS
from service.oip_schemas import InferResponse
from service.tensors import MAX_JSON_VALUES, OUTPUTS
from tests.helpers import GOOD, HUGE_PNG, encoded, photo, toy_images
from tests.service.conftest import Running, serving
from tests.service.test_verdict import NOISE, assert_problem

INFER = "/v2/models/toy/infer"
LENGTH = "Inference-Header-Content-Length"
DTYPES = {"INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "BOOL": "?"}


def in_base64(*images: bytes) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    return {"name": "image_bytes", "shape": [len(images)], "datatype": "BYTES", "data": data}


def of_pixels(images: Pixels, data: object) -> dict[str, Any]:
    return {"name": "image", "shape": list(images.shape), "datatype": "UINT8", "data": data}


def infer(client: httpx.Client, *inputs: dict[str, Any], **members: Any) -> httpx.Response:
    return client.post(INFER, json={"inputs": list(inputs), **members})


def infer_binary(
    client: httpx.Client, tensor: dict[str, Any], data: bytes, length: str | None = None, **members: Any
) -> httpx.Response:
    parameters = {"binary_data_size": len(data)}
    document = json.dumps({"inputs": [{"parameters": parameters, **tensor}], **members}).encode()
    return client.post(INFER, content=document + data, headers={LENGTH: length or str(len(document))})


def prefixed(*images: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def columns(response: httpx.Response) -> dict[str, list[Any]]:
    """Outputs by name, wherever their data lie."""
    assert response.status_code == 200, response.text
    length = int(response.headers.get(LENGTH, len(response.content)))
    document, behind = json.loads(response.content[:length]), response.content[length:]
    result = {}
    for output in document["outputs"]:
        if "data" in output:
            values = output["data"]
        else:
            size = output["parameters"]["binary_data_size"]
            blob, behind = behind[:size], behind[size:]
            values = unpack(blob) if output["datatype"] == "BYTES" else np.frombuffer(blob, DTYPES[output["datatype"]])
        assert output["shape"] == [len(values)]
        result[output["name"]] = list(values)
    assert behind == b""
    return result


def unpack(blob: bytes) -> list[str]:
    elements, at = [], 0
    while at < len(blob):
        (length,) = struct.unpack_from("<I", blob, at)
        elements.append(blob[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return elements


def test_metadata_names_the_server_its_models_and_their_tensors(client: httpx.Client) -> None:
    server = client.get("/v2").json()
    assert server == {
        "name": "oodgate", "version": __version__, "extensions": ["model_repository", "binary_tensor_data"]
    }  # fmt: skip
    assert client.get("/v2/models").json() == {"models": ["toy"]}
    metadata = client.get("/v2/models/toy").json()
    assert metadata == client.get("/v2/models/toy/versions/1").json()
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("toy", ["1"], "oodgate")
    assert metadata["inputs"] == [
        {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
        {"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
    ]
    assert {output["name"]: output["datatype"] for output in metadata["outputs"]} == {
        "index": "INT64", "label": "BYTES", "confidence": "FP32", "ood_score": "FP64", "p_value": "FP64",
        "is_ood": "BOOL", "decision": "BYTES", "reason": "BYTES",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["", "/versions/1"])
def test_a_loaded_model_is_ready(client: httpx.Client, path: str) -> None:
    assert client.get(f"/v2/models/toy{path}/ready").json() == {"name": "toy", "ready": True}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models/nope"),
        ("GET", "/v2/models/nope/ready"),
        ("GET", "/v2/models/toy/versions/9"),
        ("GET", "/v2/models/toy/versions/9/ready"),
        ("POST", "/v2/models/nope/infer"),
        ("POST", "/v2/models/toy/versions/9/infer"),
    ],
)
def test_an_unknown_model_is_a_404(client: httpx.Client, method: str, path: str) -> None:
    assert_problem(client.request(method, path), 404, "model_not_found")


def test_a_model_is_not_ready_once_the_engine_is_lost(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:

        def die(*args: object) -> None:
            raise SystemExit

        running.context.engine._launch = die  # type: ignore[method-assign,assignment]
        for _ in range(1 + MOST_RESTARTS):
            assert_problem(infer(running.client, in_base64(GOOD)), 503, "engine_lost")
        running.context.engine._thread.join(10)
        response = running.client.get("/v2/models/toy/ready")
        assert (response.status_code, response.json()) == (503, {"name": "toy", "ready": False})


def test_the_repository_index_lists_the_models(client: httpx.Client) -> None:
    for body in (b"", b'{"ready": true}'):
        index = client.post("/v2/repository/index", content=body).json()
        assert index == [{"name": "toy", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_loading_and_unloading_are_disabled_without_an_admin_token(client: httpx.Client, verb: str) -> None:
    assert_problem(client.post(f"/v2/repository/models/toy/{verb}", json={}), 403, "admin_disabled")


def test_the_outputs_are_the_detectors_own_verdicts(client: httpx.Client, toy: Path) -> None:
    images = np.concatenate(
        [toy_images(20, seed=51)[0], np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)]
    )
    expected = Detector.load(toy).verdicts(images)
    got = columns(infer(client, in_base64(*map(encoded, images))))
    assert list(got) == list(OUTPUTS)
    for i, verdict in enumerate(expected):
        assert got["index"][i] == verdict.prediction.index
        assert got["label"][i] == verdict.prediction.label
        assert got["confidence"][i] == pytest.approx(verdict.prediction.confidence, rel=1e-4)
        assert got["ood_score"][i] == pytest.approx(verdict.ood.score, rel=1e-4)
        assert got["p_value"][i] == pytest.approx(verdict.ood.p_value, abs=0.01)
        assert got["decision"][i] == verdict.decision
        assert got["reason"][i] == verdict.reason
        assert got["is_ood"][i] == (verdict.reason == "ood")
    assert set(got["decision"]) == {"accept", "defer"}


def test_every_way_to_send_an_image_gives_the_same_answer(client: httpx.Client) -> None:
    images, _ = toy_images(3, seed=52)
    files = [encoded(image) for image in images]
    shape = {"name": "image", "shape": list(images.shape), "datatype": "UINT8"}
    answers = [
        infer(client, in_base64(*files)),
        infer_binary(client, {"name": "image_bytes", "shape": [3], "datatype": "BYTES"}, prefixed(*files)),
        infer(client, of_pixels(images, images.ravel().tolist())),
        infer(client, of_pixels(images, images.tolist())),
        infer_binary(client, shape, images.tobytes()),
    ]
    first = columns(answers[0])
    for answer in map(columns, answers[1:]):
        assert answer["label"] == first["label"]
        assert answer["ood_score"] == pytest.approx(first["ood_score"], rel=1e-4)


def test_pixels_of_any_size_are_resized_as_a_file_is(client: httpx.Client) -> None:
    picture = photo(300, 200)[None]
    as_pixels = columns(infer_binary(client, of_pixels(picture, None), picture.tobytes()))
    as_file = columns(infer(client, in_base64(encoded(picture[0]))))
    assert as_pixels["ood_score"] == pytest.approx(as_file["ood_score"], rel=1e-4)


def test_binary_outputs_say_the_same_as_json(client: httpx.Client) -> None:
    in_json = infer(client, in_base64(GOOD, NOISE))
    binary = infer(client, in_base64(GOOD, NOISE), parameters={"binary_data_output": True})
    assert in_json.headers["content-type"] == "application/json"
    assert LENGTH not in in_json.headers
    assert binary.headers["content-type"] == "application/octet-stream"
    wanted, got = columns(in_json), columns(binary)
    for name in ("index", "label", "is_ood", "decision", "reason"):
        assert got[name] == wanted[name]
    for name in ("confidence", "ood_score", "p_value"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-6)


def test_only_the_outputs_asked_for_come_each_as_it_was_asked(client: httpx.Client) -> None:
    response = infer(
        client,
        in_base64(GOOD),
        outputs=[{"name": "p_value", "parameters": {"binary_data": False}}, {"name": "label"}],
        parameters={"binary_data_output": True},
    )
    assert list(columns(response)) == ["p_value", "label"]
    p_value, label = json.loads(response.content[: int(response.headers[LENGTH])])["outputs"]
    assert ("data" in p_value, "data" in label) == (True, False)


def test_a_body_of_one_image_alone_is_a_request_too(client: httpx.Client) -> None:
    response = client.post(INFER, content=GOOD, headers={LENGTH: "0"})
    assert LENGTH in response.headers
    assert columns(response)["label"] == columns(infer(client, in_base64(GOOD)))["label"]


def test_the_id_is_echoed_and_the_parameters_are_plain(client: httpx.Client) -> None:
    response = infer(client, in_base64(GOOD), id="caf\u00e9 42", parameters={"priority": 3, "any": "thing"})
    body = response.json()
    InferResponse.model_validate(body, extra="forbid")
    assert (body["id"], body["model_name"], body["model_version"]) == ("caf\u00e9 42", "toy", "1")
    verdict = client.post("/v1/verdict", content=GOOD, headers={"content-type": "image/png"}).json()
    assert body["parameters"] == {
        "score_name": "grood",
        "target_id_acceptance": 0.95,
        "digest": verdict["model"]["digest"],
        "threshold": verdict["ood"]["threshold"],
    }


def test_without_an_id_the_request_id_stands_in(client: httpx.Client) -> None:
    response = infer(client, in_base64(GOOD))
    assert response.json()["id"] == response.headers["x-request-id"]


def test_a_version_answers_and_the_header_has_the_strictest_decision(client: httpx.Client) -> None:
    request = {"inputs": [in_base64(GOOD, NOISE)]}
    response = client.post("/v2/models/toy/versions/1/infer", json=request)
    assert columns(response)["decision"] == ["accept", "defer"]
    assert response.headers["x-oodgate-decision"] == "defer"
    assert infer(client, in_base64(GOOD)).headers["x-oodgate-decision"] == "accept"


def test_members_that_other_servers_know_are_ignored(client: httpx.Client) -> None:
    tensor = in_base64(GOOD) | {"parameters": {"content_type": "base64"}, "extra": [1]}
    assert infer(client, tensor, model_name="toy", outputs=[], parameters=None).status_code == 200


@pytest.mark.parametrize(
    ("bad", "status", "code"),
    [
        (b"hello", 422, "undecodable_image"),
        (b"", 422, "undecodable_image"),
        (HUGE_PNG, 413, "too_many_pixels"),
        (encoded(photo(8, 8), "GIF"), 415, "unsupported_image_format"),
    ],
)
def test_one_bad_image_fails_its_request_and_is_named(client: httpx.Client, bad: bytes, status: int, code: str) -> None:
    response = infer(client, in_base64(GOOD, bad, GOOD, b"junk"))
    assert assert_problem(response, status, code).startswith("image 1: ")
    assert response.json()["index"] == 1
    assert infer(client, in_base64(GOOD)).status_code == 200


def test_a_bad_image_costs_other_requests_nothing(shared_server: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(i: int) -> int:
        images = (GOOD, GOOD[:60]) if i % 3 == 0 else (GOOD, NOISE)
        return infer(shared_server.client, in_base64(*images)).status_code

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(48))) == [422 if i % 3 == 0 else 200 for i in range(48)]


BYTES_1 = {"name": "image_bytes", "shape": [1], "datatype": "BYTES"}
IMAGE_1 = {"name": "image", "shape": [1, 2, 2, 3], "datatype": "UINT8"}
DEEP: list[Any] = [1]
for _ in range(150):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "one of the two"),
        ([in_base64(GOOD), in_base64(GOOD)], "one of the two"),
        ([in_base64(GOOD), IMAGE_1 | {"data": [0] * 12}], "one of the two"),
        ([in_base64(GOOD) | {"name": "pixels"}], "one of the two"),
        ([in_base64(GOOD)] * 9, "at most 8"),
        ([in_base64(GOOD) | {"datatype": "UINT8"}], "has datatype BYTES"),
        ([IMAGE_1 | {"datatype": "FP32", "data": [0.5] * 12}], "has datatype UINT8"),
        ([in_base64(GOOD) | {"shape": [1, 1]}], "has shape [-1]"),
        ([IMAGE_1 | {"shape": [1, 3, 2, 2], "data": [0] * 12}], "has shape [-1, -1, -1, 3]"),
        ([in_base64(GOOD) | {"shape": [-1]}], "inputs.0.shape.0"),
        ([in_base64(GOOD) | {"shape": [True]}], "inputs.0.shape.0"),
        ([in_base64(GOOD) | {"shape": [10**30]}], "inputs.0.shape.0"),
        ([in_base64(GOOD) | {"shape": ["1"]}], "inputs.0.shape.0"),
        ([in_base64(GOOD) | {"shape": 1}], "inputs.0.shape"),
        ([in_base64(GOOD) | {"shape": [1] * 1000}], "at most 8"),
        ([in_base64(GOOD) | {"shape": [2]}], "flat list of 2 strings"),
        ([BYTES_1 | {"data": [[base64.b64encode(GOOD).decode()]]}], "not base64: it is no string"),
        ([BYTES_1 | {"data": base64.b64encode(GOOD).decode()}], "flat list of 1 strings"),
        ([BYTES_1 | {"data": ["not base64!"]}], "image_bytes[0] is not base64"),
        ([BYTES_1 | {"data": ["abcde"]}], "image_bytes[0] is not base64"),
        ([BYTES_1 | {"data": ["caf\u00e9"]}], "image_bytes[0] is not base64"),
        ([BYTES_1 | {"data": [7]}], "it is no string"),
        ([BYTES_1], "needs `data`"),
        ([BYTES_1 | {"data": None}], "needs `data`"),
        ([in_base64(GOOD) | {"parameters": {"binary_data_size": 4}}], "one of the two"),
        ([BYTES_1 | {"parameters": {"shared_memory_region": "r"}}], "Shared memory is not supported"),
        ([BYTES_1 | {"parameters": [1]}], "inputs.0.parameters"),
        ([BYTES_1 | {"parameters": {"binary_data_size": 4}}], "0 bytes follow the JSON"),
        ([BYTES_1 | {"parameters": {"binary_data_size": -4}}], "0 bytes follow the JSON"),
        ([BYTES_1 | {"parameters": {"binary_data_size": 10**30}}], "0 bytes follow the JSON"),
        ([BYTES_1 | {"parameters": {"binary_data_size": "4"}}], "whole number"),
        ([BYTES_1 | {"parameters": {"binary_data_size": True}}], "whole number"),
        ([IMAGE_1 | {"data": [0] * 11}], "list of 12 numbers"),
        ([IMAGE_1 | {"data": [[0] * 6] * 2}], "list of 12 numbers"),
        ([IMAGE_1 | {"data": [[1], [1, 2]]}], "list of 12 numbers"),
        ([IMAGE_1 | {"data": DEEP}], "list of 12 numbers"),
        ([IMAGE_1 | {"data": {"0": 1}}], "list of 12 numbers"),
        ([IMAGE_1 | {"data": "0" * 12}], "list of 12 numbers"),
        ([IMAGE_1 | {"data": [0] * 11 + [256]}], "from 0 to 255"),
        ([IMAGE_1 | {"data": [0] * 11 + [-1]}], "from 0 to 255"),
        ([IMAGE_1 | {"data": [0] * 11 + [10**40]}], "from 0 to 255"),
        ([IMAGE_1 | {"data": [0] * 11 + [0.5]}], "from 0 to 255"),
        ([IMAGE_1 | {"data": [0] * 11 + ["0"]}], "from 0 to 255"),
        ([IMAGE_1 | {"data": [0] * 11 + [None]}], "from 0 to 255"),
        ([IMAGE_1 | {"data": [False] * 12}], "from 0 to 255"),
        ([IMAGE_1 | {"shape": [1, 0, 2, 3], "data": []}], "no pixels"),
        ([IMAGE_1 | {"shape": [1, 2**62, 2**62, 3], "data": [0] * 12}], "numbers"),
        ("image", "inputs"),
        ([7], "inputs.0"),
        (None, "inputs"),
    ],
)
def test_malformed_tensors_are_a_400_that_says_what_to_do(client: httpx.Client, inputs: Any, says: str) -> None:
    assert says in assert_problem(client.post(INFER, json={"inputs": inputs}), 400, "malformed_request")


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"outputs": [{"name": "logits"}]}, "takes index, label"),
        ({"outputs": [{"name": "label"}, {"name": "label"}]}, "once at most"),
        ({"outputs": [{"name": "x" * 100_000}]}, "takes index, label"),
        ({"outputs": [{"name": "label"}] * 17}, "at most 16"),
        ({"outputs": ["label"]}, "outputs.0"),
        ({"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]}, "must be true or false"),
        ({"parameters": {"binary_data_output": "yes"}}, "must be true or false"),
        ({"parameters": "fast"}, "parameters"),
        ({"id": 42}, "id"),
    ],
)
def test_malformed_members_are_a_400_that_says_what_to_do(
    client: httpx.Client, members: dict[str, Any], says: str
) -> None:
    detail = assert_problem(infer(client, in_base64(GOOD), **members), 400, "malformed_request")
    assert says in detail
    assert len(detail) < 1000


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"id": "\xff", "inputs": []}',
        b'{"id": "\\ud800", "inputs": []}',
        b'{"inputs": [{"name": "image", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": [0, NaN, 0]}]}',
        b'{"parameters": {"x": Infinity}, "inputs": []}',
        b'{"inputs": ' + b"[" * 100_000,
        b'{"inputs": [{"name": "image", "shape": [' + b"9" * 5000 + b"]}]}",
        GOOD,
    ],
    ids=["cut", "list", "null", "bytes", "utf8", "surrogate", "nan", "infinity", "deep", "digits", "image"],
)
def test_what_is_not_a_json_object_is_a_400(client: httpx.Client, body: bytes) -> None:
    assert_problem(client.post(INFER, content=body), 400, "malformed_request")


def test_an_empty_body_and_an_empty_tensor_are_empty_requests(client: httpx.Client) -> None:
    empty = {"name": "image", "shape": [0, 2, 2, 3], "datatype": "UINT8", "data": []}
    for response in (
        client.post(INFER, content=b""),
        client.post(INFER, content=b"", headers={LENGTH: "0"}),
        infer(client, in_base64()),
        infer(client, empty),
    ):
        assert_problem(response, 400, "empty_request")


@pytest.mark.parametrize("length", [b"-1", b"many", b"99999999", b"1" * 30, b"1_0", "\u00b2".encode(), b""])
def test_a_header_length_that_cannot_be_is_a_400(client: httpx.Client, length: bytes) -> None:
    request = json.dumps({"inputs": [in_base64(GOOD)]}).encode()
    response = client.post(INFER, content=request, headers=[(LENGTH.encode(), length)])
    assert_problem(response, 400, "malformed_request")


@pytest.mark.parametrize(
    ("tensor", "data", "says"),
    [
        (BYTES_1, b"", "image_bytes[0] ends beyond"),
        (BYTES_1, b"\x01\x00", "image_bytes[0] ends beyond"),
        (BYTES_1, struct.pack("<I", 2**32 - 1) + GOOD, "image_bytes[0] ends beyond"),
        (BYTES_1, prefixed(GOOD)[:-1], "image_bytes[0] ends beyond"),
        (BYTES_1, prefixed(GOOD, GOOD), "bytes are left"),
        (BYTES_1 | {"shape": [2]}, prefixed(GOOD), "image_bytes[1] ends beyond"),
        (IMAGE_1, bytes(11), "takes 12 bytes"),
        (IMAGE_1, bytes(13), "takes 12 bytes"),
        (IMAGE_1 | {"shape": [1, 2**62, 2**62, 3]}, bytes(12), "takes"),
        (IMAGE_1 | {"parameters": {"binary_data_size": 11}}, bytes(12), "12 bytes follow"),
        (IMAGE_1 | {"data": [0] * 12, "parameters": {}}, bytes(12), "12 bytes follow"),
    ],
)
def test_malformed_binary_tensors_are_a_400(
    client: httpx.Client, tensor: dict[str, Any], data: bytes, says: str
) -> None:
    assert says in assert_problem(infer_binary(client, tensor, data), 400, "malformed_request")


def test_binary_data_without_the_header_is_a_400_that_names_it(client: httpx.Client) -> None:
    document = json.dumps({"inputs": [BYTES_1 | {"parameters": {"binary_data_size": 4}}]}).encode()
    response = client.post(INFER, content=document + bytes(4))
    assert LENGTH in assert_problem(response, 400, "malformed_request")


def test_the_limits_of_the_server_hold(client: httpx.Client) -> None:
    many = {"name": "image", "shape": [65, 2, 2, 3], "datatype": "UINT8"}
    assert_problem(infer(client, in_base64(*[GOOD] * 65)), 413, "too_many_images")
    assert_problem(infer_binary(client, many, bytes(65 * 12)), 413, "too_many_images")
    assert_problem(infer(client, BYTES_1 | {"shape": [10**18], "data": []}), 413, "too_many_images")
    assert_problem(client.post(INFER, content=bytes(30_000_000)), 413, "body_too_large")
    values = b'{"inputs": [' + b"0," * MAX_JSON_VALUES + b"0]}"
    assert_problem(client.post(INFER, content=values), 413, "too_many_values")
    compressed = client.post(INFER, content=b"x", headers={"content-encoding": "gzip"})
    assert_problem(compressed, 415, "unsupported_media_type")


def test_a_tensor_of_too_many_pixels_is_refused_before_they_are_resized(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, max_pixels=1000)) as running:
        images = np.zeros((1, 40, 30, 3), np.uint8)
        response = infer_binary(running.client, of_pixels(images, None), images.tobytes())
        assert "30 x 40 = 1,200 pixels" in assert_problem(response, 413, "too_many_pixels")


def test_a_full_queue_answers_429_and_rejections_are_counted(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, queue_capacity=2, max_images=2)) as running:
        with running.context.engine.admit(1):  # another request's image, still under way
            response = infer(running.client, in_base64(GOOD, GOOD))
        assert_problem(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert running.metric("oodgate_requests_rejected_total", reason="queue_full") == 1
        assert infer(running.client, in_base64(GOOD, GOOD[:60])).status_code == 422
        assert running.metric("oodgate_requests_rejected_total", reason="bad_image") == 1
        assert running.context.engine.depth == 0
        assert infer(running.client, in_base64(GOOD, GOOD)).status_code == 200
        labels = {"handler": "/v2/models/{name}/infer", "method": "POST"}
        assert running.metric("oodgate_http_requests_total", status="200", **labels) == 1
        for stage in ("read", "decode", "queue", "forward", "score", "respond"):
            assert running.metric("oodgate_stage_duration_seconds_count", stage=stage) >= 1, stage


def test_a_score_that_is_no_number_is_no_verdict(toy_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    with serving(Settings(models=toy_models)) as running:
        detector = running.context.registry.get().detector
        judge = detector.finish_judging

        def without_a_score(*args: Any) -> Any:
            verdicts = judge(*args)
            return [
                replace(v, ood=replace(v.ood, score=float("nan")), reason="ood", decision="defer") for v in verdicts
            ]

        monkeypatch.setattr(detector, "finish_judging", without_a_score)
        assert_problem(infer(running.client, in_base64(GOOD)), 500, "scoring_failed")


def test_the_openapi_document_shows_requests_answers_and_errors(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {"name", LENGTH}
    assert {"400", "404", "408", "413", "415", "422", "429", "500", "503", "504"} <= operation["responses"].keys()
    request = operation["requestBody"]["content"]["application/json"]
    assert "$ref" not in json.dumps(request)
    example = client.post(INFER, json=request["example"])
    assert_problem(example, 422, "undecodable_image")  # the example's image is cut short
    answer = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert InferResponse.model_validate(answer).outputs[0].data == ["accept"]
