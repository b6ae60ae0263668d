# SPDX-License-Identifier: Apache-2.0
"""Clients of other projects, unmodified, against the real server process."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from detector import __version__
from detector.images import Pixels
from service.tensors import OUTPUTS
from tests.e2e.server import Process, running
from tests.helpers import EMBEDDED, GOOD, ROOT, encoded, photo, toy_images

KSERVE = "kserve==0.21.0"
KSERVE_ENVIRONMENT = ROOT / "build" / "kserve"
PAGE = (ROOT / "docs" / "open-inference-protocol.md").read_text()
KSERVE_SCRIPT = """
import asyncio, base64, json, pathlib, sys
import httpx, numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

url, picture = sys.argv[1], pathlib.Path(sys.argv[2]).read_bytes()

async def main():
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        async def ask(tensor, **more):
            request = InferRequest("cifar10", [tensor], **more)
            answer = await client.infer(url, request, model_name="cifar10")
            return {"id": answer.id, "parameters": answer.parameters, **{o.name: o.data for o in answer.outputs}}

        in_json = InferInput("image_bytes", [1], "BYTES", [base64.b64encode(picture).decode()])
        binary = InferInput("image_bytes", [1], "BYTES")
        binary.set_data_from_numpy(np.array([picture], dtype=object))
        pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        image = InferInput("image", list(pixels.shape), "UINT8")
        image.set_data_from_numpy(pixels)
        image_json = InferInput("image", list(pixels.shape), "UINT8")
        image_json.set_data_from_numpy(pixels, binary_data=False)
        outputs = [RequestedOutput("decision"), RequestedOutput("p_value", {"binary_data": True})]
        results = {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model_ready": await client.is_model_ready(url, "cifar10"),
            "unknown_ready": await client.is_model_ready(url, "nope"),
            "json": await ask(in_json, request_id="k-1"),
            "binary": await ask(binary, parameters={"binary_data_output": True}),
            "image": await ask(image, parameters={"binary_data_output": True}),
            "image_json": await ask(image_json),
            "selected": await ask(binary, request_outputs=outputs),
        }
        try:
            await ask(InferInput("image_bytes", [1], "BYTES", [base64.b64encode(b"junk").decode()]))
        except httpx.HTTPStatusError as error:
            results["error"] = [error.response.status_code, error.response.json()["error"]]
        print(json.dumps(results))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with running(EMBEDDED.parents[1]) as process:
        yield process


@pytest.fixture
def client(server: Process) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="session")
def kserve_python() -> Path:
    """The interpreter of an environment that holds KServe's client, whose pins are not ours."""
    python = KSERVE_ENVIRONMENT / "bin" / "python"
    if not (KSERVE_ENVIRONMENT / KSERVE).exists():
        venv.create(KSERVE_ENVIRONMENT, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", KSERVE]
        if subprocess.run(install, capture_output=True, timeout=600).returncode != 0:
            pytest.skip(f"{KSERVE} cannot be installed here")
        (KSERVE_ENVIRONMENT / KSERVE).touch()
    return python


def of_files(files: Sequence[bytes], *, binary: bool = True) -> Any:
    elements = files if binary else [base64.b64encode(file) for file in files]
    tensor = triton.InferInput("image_bytes", [len(files)], "BYTES")
    return tensor.set_data_from_numpy(np.array(elements, dtype=object), binary_data=binary)


def of_pixels(images: Pixels, *, binary: bool = True) -> Any:
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    return tensor.set_data_from_numpy(images, binary_data=binary)


def test_triton_reads_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("cifar10")
    assert client.is_model_ready("cifar10", "1")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata()["version"] == __version__
    metadata = client.get_model_metadata("cifar10", "1")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["image_bytes", "image"]
    assert [tensor["name"] for tensor in metadata["outputs"]] == list(OUTPUTS)


def test_triton_reads_the_repository_and_may_not_change_it(client: Any) -> None:
    assert client.get_model_repository_index() == [{"name": "cifar10", "version": "1", "state": "READY", "reason": ""}]
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match=r"\[403\] no admin token is configured"):
            change("cifar10")
    assert client.is_model_ready("cifar10")


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_triton_gets_the_verdicts_whichever_way_tensors_travel(
    server: Process, client: Any, binary_in: bool, binary_out: bool
) -> None:
    images, _ = toy_images(4, seed=70)
    files = [encoded(image) for image in images]
    form = [("file", (f"{i}.png", file)) for i, file in enumerate(files)]
    expected = server.client.post("/v1/verdict", files=form).json()["verdicts"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in OUTPUTS]
    for tensor in (of_files(files, binary=binary_in), of_pixels(images, binary=binary_in)):
        answer = client.infer("cifar10", [tensor], model_version="1", outputs=outputs, request_id="caller-7")
        got = {name: answer.as_numpy(name).tolist() for name in OUTPUTS}
        assert answer.get_response()["id"] == "caller-7"
        assert got["index"] == [verdict["prediction"]["index"] for verdict in expected]
        for name in ("decision", "reason"):
            assert [str(value, "utf-8") if binary_out else value for value in got[name]] == [
                verdict[name] for verdict in expected
            ]
        assert got["ood_score"] == pytest.approx([verdict["ood"]["score"] for verdict in expected], rel=1e-3)
        assert got["is_ood"] == [verdict["reason"] == "ood" for verdict in expected]


def test_triton_gets_every_output_in_binary_where_it_names_none(client: Any) -> None:
    answer = client.infer("cifar10", [of_pixels(photo(100, 60)[None])])
    datatypes = {name: answer.as_numpy(name).dtype.name for name in OUTPUTS}
    assert datatypes == {
        "index": "int64", "label": "object", "confidence": "float32", "ood_score": "float64", "p_value": "float64",
        "is_ood": "bool", "decision": "object", "reason": "object",
    }  # fmt: skip


def test_triton_shows_our_errors(client: Any) -> None:
    for tensors, model, message in (
        ([of_files([GOOD, b"junk"])], "cifar10", r"\[422\] image 1: the bytes are not"),
        ([of_files([GOOD]), of_pixels(toy_images(1, 0)[0])], "cifar10", r"\[400\] `inputs` must hold"),
        ([of_files([GOOD])], "nope", r"\[404\] there is no model"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            client.infer(model, tensors)
    with pytest.raises(InferenceServerException, match=r"\[400\] `outputs` takes index, label"):
        client.infer("cifar10", [of_files([GOOD])], outputs=[triton.InferRequestedOutput("logits")])
    with pytest.raises(InferenceServerException, match=r"\[415\] content encoding 'gzip'"):
        client.infer("cifar10", [of_files([GOOD])], request_compression_algorithm="gzip")


def test_triton_callers_at_once_get_their_own_answers(server: Process) -> None:
    images, _ = toy_images(40, seed=71)
    with triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as client:
        alone = [client.infer("cifar10", [of_pixels(image[None])]).as_numpy("ood_score")[0] for image in images]
        waiting = [client.async_infer("cifar10", [of_pixels(image[None])], request_id=str(i + 1)) for i, image in
                   enumerate(images)]  # fmt: skip
        answers = [handle.get_result() for handle in waiting]
    assert [answer.get_response()["id"] for answer in answers] == [str(i + 1) for i in range(40)]
    assert [answer.as_numpy("ood_score")[0] for answer in answers] == pytest.approx(alone, rel=1e-3)


def test_kserves_client_asks_and_understands(server: Process, kserve_python: Path) -> None:
    command = [str(kserve_python), "-c", KSERVE_SCRIPT, server.url, str(ROOT / "examples" / "cat.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [results[name] for name in ("live", "ready", "model_ready", "unknown_ready")] == [True, True, True, False]
    assert results["json"]["id"] == "k-1"
    assert results["json"]["parameters"]["target_id_acceptance"] == 0.95
    assert (results["json"]["label"], results["json"]["decision"]) == (["cat"], ["accept"])
    for way in ("binary", "selected"):
        assert results[way]["p_value"] == pytest.approx(results["json"]["p_value"], abs=1e-3)
    assert results["image"]["ood_score"] == pytest.approx(results["image_json"]["ood_score"], rel=1e-3)
    assert set(results["selected"]) == {"id", "parameters", "decision", "p_value"}
    assert results["error"][0] == 422
    assert results["error"][1].startswith("image 0: the bytes are not")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("script", blocks("sh"), ids=["json", "raw"])
def test_the_curl_examples_of_the_page_run(server: Process, script: str) -> None:
    command = ["bash", "-euc", script.replace("localhost:8000", server.url.removeprefix("http://"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"accept" in done.stdout
    assert b"cat" in done.stdout


@pytest.mark.parametrize("script", blocks("python"), ids=["triton", "kserve"])
def test_the_client_examples_of_the_page_run(server: Process, script: str, request: pytest.FixtureRequest) -> None:
    python = request.getfixturevalue("kserve_python") if "kserve" in script else sys.executable
    script = script.replace("localhost:8000", server.url.removeprefix("http://"))
    done = subprocess.run([python, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "accept" in done.stdout
    assert "cat" in done.stdout
