# SPDX-License-Identifier: Apache-2.0
"""The client against the real server, and against answers that the real server rarely gives."""

from __future__ import annotations

import asyncio
import io
import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import oodgate_client
from oodgate_client import (
    AsyncClient,
    Client,
    DeadlinePassed,
    ImageRefused,
    NotFound,
    OodgateError,
    Overloaded,
    RequestRefused,
    Retry,
    ServerFailed,
    TokenRefused,
    Unanswered,
    Unavailable,
    Unreachable,
    Verdict,
)
from tests.client.conftest import VERDICT, Scripted, problem
from tests.e2e.server import free_port
from tests.helpers import GOOD, HUGE_PNG, ROOT, TOY_CLASSES, encoded, photo, toy_images
from tests.service.conftest import Running

ONCE = Retry(attempts=1)


def kinds(items: list[Verdict | OodgateError]) -> list[str]:
    return [type(item).__name__ for item in items]


def test_an_image_is_judged_as_bytes_as_a_path_and_as_a_file(served: Running, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(GOOD)
    with Client(served.url) as client, path.open("rb") as file:
        answers = [client.verdict(image) for image in (GOOD, str(path), path, file, io.BytesIO(GOOD))]
        assert file.read() == GOOD  # what reads the file next finds it as it was
    assert {answer.decision for answer in answers} == {"accept"}
    assert answers[0].accepted
    assert answers[0].prediction.label in TOY_CLASSES
    assert answers[0].ood is not None
    assert answers[0].ood.p_value is not None
    assert answers[0].timing_ms["total"] > 0


def test_the_async_client_does_what_the_other_does(served: Running, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(GOOD)

    async def ask() -> None:
        async with AsyncClient(served.url) as client:
            assert (await client.verdict(path)).accepted
            assert kinds(await client.verdicts([GOOD, b"junk"])) == ["Verdict", "ImageRefused"]
            assert kinds(await client.verdicts([b"junk"])) == ["ImageRefused"]
            assert await client.verdicts([]) == []
            assert [card.name for card in await client.models()] == ["toy"]
            assert (await client.model("toy")).version == "1"
            assert await client.ready()
            with pytest.raises(NotFound):
                await client.verdict(GOOD, model="absent")

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("image_format", "kind"), [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")]
)
def test_the_content_type_is_read_from_the_bytes(scripted: Scripted, image_format: str, kind: str) -> None:
    scripted.script = [(200, {}, VERDICT)]
    Client(scripted.url).verdict(encoded(photo(40, 30), image_format))
    assert scripted.seen[0][1]["content-type"] == kind


def test_each_image_of_a_batch_has_its_verdict_and_a_bad_one_its_own_problem(served: Running) -> None:
    images = [encoded(image) for image in toy_images(3, seed=51)[0]]
    with Client(served.url) as client:
        alone = [client.verdict(image).prediction.index for image in images]
        items = client.verdicts([images[0], b"junk", images[1], HUGE_PNG, images[2]])
    assert [item.prediction.index for item in items if isinstance(item, Verdict)] == alone
    assert len(set(alone)) > 1
    bad = {place: item for place, item in enumerate(items) if isinstance(item, ImageRefused)}
    assert {place: error.code for place, error in bad.items()} == {1: "undecodable_image", 3: "too_many_pixels"}
    assert [error.index for error in bad.values()] == [1, 3]
    assert all(error.request_id for error in bad.values())


def test_a_batch_of_one_is_a_batch_too(served: Running) -> None:
    with Client(served.url) as client:
        assert kinds(client.verdicts([GOOD])) == ["Verdict"]
        assert kinds(client.verdicts([b"junk"])) == ["ImageRefused"]
        assert client.verdicts([]) == []


def test_more_images_than_the_server_takes_are_refused_as_a_whole(served: Running) -> None:
    with Client(served.url) as client, pytest.raises(RequestRefused, match="64 images") as raised:
        client.verdicts([GOOD] * 65)
    assert raised.value.code == "too_many_images"


def test_a_model_and_a_version_can_be_chosen(served: Running) -> None:
    with Client(served.url, model="toy", version="1") as client:
        assert client.verdict(GOOD).model.version == "1"
        assert client.verdict(GOOD, model="toy").model.name == "toy"
        with pytest.raises(NotFound) as raised:
            client.verdict(GOOD, version="9")
        with pytest.raises(NotFound):
            client.verdict(GOOD, model="../v1")
    assert (raised.value.code, raised.value.status) == ("model_not_found", 404)
    assert raised.value.request_id


@pytest.mark.parametrize("options", [{"url": "localhost:8000"}, {"url": "http://"}, {"version": "1"}])
def test_a_client_that_could_never_ask_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"address|version"):
        Client(**{"url": "http://localhost", **options})


@pytest.mark.parametrize("image", [12, io.StringIO("text")])
def test_what_is_no_image_at_all_is_a_type_error(image: Any) -> None:
    with pytest.raises(TypeError):
        Client("http://localhost").verdict(image)


def test_models_are_described(served: Running) -> None:
    with Client(served.url) as client:
        (card,) = client.models()
        assert client.model("toy") == card
        assert client.ready()
    assert card.classes == TOY_CLASSES
    assert card.calibration.n > 0


def test_a_server_that_is_not_there_is_not_ready() -> None:
    with Client(f"http://127.0.0.1:{free_port()}", retry=ONCE) as client:
        assert not client.ready()
        with pytest.raises(Unreachable) as raised:
            client.verdict(GOOD)
    assert (raised.value.code, raised.value.status) == ("unreachable", None)


def test_a_server_that_says_so_is_not_ready(scripted: Scripted) -> None:
    scripted.script = [(503, {}, {"ready": False})]
    assert not Client(scripted.url).ready()


def test_the_token_goes_with_every_request(scripted: Scripted) -> None:
    scripted.script = [(200, {}, VERDICT), (200, {}, {"models": []}), (200, {}, {})]
    client = Client(scripted.url, token="s3cret")
    client.verdict(GOOD), client.models(), client.ready()
    assert [headers["authorization"] for _, headers, _ in scripted.seen] == ["Bearer s3cret"] * 3


@pytest.mark.parametrize("token", ["", "s3cret\n", "s3 cret", "sécret"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(ValueError, match="strip it") as raised:
        Client("http://localhost", token=token)
    assert "cret" not in str(raised.value)


def test_a_redirect_is_not_followed(scripted: Scripted) -> None:
    scripted.script = [(307, {"Location": "http://127.0.0.1:9/elsewhere"}, "")]
    with pytest.raises(ServerFailed, match="HTTP 307"):
        Client(scripted.url, token="s3cret").verdict(GOOD)


def test_what_a_newer_server_adds_is_ignored(scripted: Scripted) -> None:
    newer = VERDICT | {"reason": "drift", "heat": {"map": ""}, "ood": VERDICT["ood"] | {"extra": 1}}
    scripted.script = [(200, {}, newer)]
    assert Client(scripted.url).verdict(GOOD).reason == "drift"


def test_what_a_server_withholds_is_none(scripted: Scripted) -> None:
    scripted.script = [(200, {}, {name: value for name, value in VERDICT.items() if name not in ("ood", "timing_ms")})]
    assert Client(scripted.url).verdict(GOOD).ood is None


def test_a_verdict_cannot_be_changed(served: Running) -> None:
    with Client(served.url) as client:
        verdict = client.verdict(GOOD)
    with pytest.raises(ValidationError):
        verdict.decision = "defer"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestRefused),
        (401, TokenRefused),
        (403, TokenRefused),
        (404, NotFound),
        (408, DeadlinePassed),
        (413, ImageRefused),
        (415, ImageRefused),
        (422, ImageRefused),
        (429, Overloaded),
        (500, ServerFailed),
        (503, Unavailable),
        (504, DeadlinePassed),
    ],
)
def test_a_problem_becomes_the_error_of_its_name(scripted: Scripted, status: int, kind: type[OodgateError]) -> None:
    scripted.script = [(status, {}, problem(status, "the_word"))]
    with pytest.raises(OodgateError) as raised:
        Client(scripted.url, retry=ONCE).verdict(GOOD)
    error = raised.value
    assert type(error) is kind
    assert (error.code, error.status, error.request_id) == ("the_word", status, "r-2")
    assert str(error) == f"because of the_word (the_word, HTTP {status}, request r-2)"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    "answer",
    [(200, {}, "<html>"), (200, {}, {"hello": 1}), (200, {}, VERDICT | {"decision": "maybe"}), (502, {}, "<html>")],
)
def test_an_answer_that_oodgate_does_not_give_is_no_verdict(scripted: Scripted, answer: Any) -> None:
    scripted.script = [answer, answer]
    client = Client(scripted.url)
    with pytest.raises(ServerFailed) as raised:
        client.verdict(GOOD)
    assert raised.value.code == "unexpected_answer"
    with pytest.raises(Unanswered):
        client.verdicts([GOOD, GOOD])


def test_the_client_has_the_version_of_the_product() -> None:
    product = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert oodgate_client.__version__ == product
