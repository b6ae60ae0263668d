# SPDX-License-Identifier: Apache-2.0
"""Who is let in, and who may change something."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from service import Settings, create_app
from service.cli.token import token
from service.errors import AdminDisabled, AdminOnly, Unauthorized
from service.security import ANONYMOUS, BadTokens, Caller, Tokens, read_tokens
from tests.helpers import GOOD
from tests.service.conftest import Running, serving


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}", "content-type": "image/png"}


@pytest.fixture(scope="module")
def guarded(toy_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(f"# cameras\n\ngate-2: {sha256('two')}\n")
    settings = Settings(
        models=toy_models, tokens={"gate-1": sha256("one")}, tokens_file=file, admin_token_sha256=sha256("boss")
    )
    with serving(settings) as running:
        yield running


@pytest.mark.parametrize("text", ["one", "two", "boss"])
def test_every_known_token_gets_a_verdict(guarded: Running, text: str) -> None:
    assert guarded.client.post("/v1/verdict", content=GOOD, headers=bearer(text)).status_code == 200


@pytest.mark.parametrize("sent", [None, "Bearer three", "Bearer", "Basic b25l", "one", "Bearer " + sha256("one")])
def test_nobody_else_gets_anything(guarded: Running, sent: str | None) -> None:
    headers = {} if sent is None else {"authorization": sent}
    for method, path in (("POST", "/v1/verdict"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/nowhere")):
        answer = guarded.client.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/metrics"])
def test_probes_and_scrapers_need_no_token(guarded: Running, path: str) -> None:
    assert guarded.client.get(path).status_code == 200


def test_a_refused_request_is_counted(guarded: Running) -> None:
    before = guarded.metric("oodgate_http_requests_total", handler="unmatched", method="GET", status="401")
    guarded.client.get("/v1/models")
    after = guarded.metric("oodgate_http_requests_total", handler="unmatched", method="GET", status="401")
    assert after == before + 1


def test_without_tokens_everybody_may_ask_and_nobody_may_change() -> None:
    tokens = Tokens({})
    assert tokens.open
    assert tokens.caller(None) == ANONYMOUS
    with pytest.raises(AdminDisabled):
        tokens.require_admin(ANONYMOUS)


def test_an_admin_alone_leaves_asking_open() -> None:
    tokens = Tokens({}, sha256("boss"))
    assert tokens.caller(None) == ANONYMOUS
    assert tokens.caller(b"Bearer boss") == Caller("admin", admin=True)
    with pytest.raises(Unauthorized):
        tokens.caller(b"Bearer other")
    with pytest.raises(AdminOnly):
        tokens.require_admin(ANONYMOUS)
    tokens.require_admin(Caller("admin", admin=True))


@pytest.mark.parametrize("users", [{"a": "short"}, {"a b": sha256("x")}, {"": sha256("x")}, {"a": sha256("x").upper()}])
def test_tokens_that_are_not_of_the_form_stop_the_start(users: dict[str, str], toy_models: Path) -> None:
    with pytest.raises(BadTokens, match="oodgate token"):
        create_app(Settings(models=toy_models, tokens=users))


@pytest.mark.parametrize("content", ["no colon", f"a:{sha256('x')}\na:{sha256('y')}", b"\xff\xfe"])
def test_a_token_file_that_cannot_be_read_says_where(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BadTokens, match=str(file)):
        read_tokens(file)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_open_server_stays_on_this_machine_unless_told(host: str) -> None:
    with pytest.raises(ValidationError, match="OODGATE_ALLOW_OPEN"):
        Settings(host=host)
    assert Settings(host=host, allow_open=True).host == host
    assert Settings(host=host, tokens={"a": sha256("x")}).host == host


@pytest.mark.parametrize("content", ["", "# cameras\n\n"])
def test_a_token_file_that_names_nobody_does_not_open_the_server(
    content: str, toy_models: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    with pytest.raises(BadTokens, match="OODGATE_ALLOW_OPEN"):
        create_app(Settings(models=toy_models, host="0.0.0.0", tokens_file=file))
    create_app(Settings(models=toy_models, host="0.0.0.0", tokens_file=file, allow_open=True))
    create_app(Settings(models=toy_models, host="127.0.0.1", tokens_file=file))


def test_a_callers_token_that_is_the_admins_does_not_open_the_server(toy_models: Path) -> None:
    tokens, admin = {"a": sha256("x")}, sha256("x")
    with pytest.raises(BadTokens, match="OODGATE_ALLOW_OPEN"):
        create_app(Settings(models=toy_models, host="0.0.0.0", tokens=tokens, admin_token_sha256=admin))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert Settings(host=host).host == host


def test_the_token_command_prints_a_token_and_its_hash() -> None:
    lines = CliRunner().invoke(token).output.split()
    assert lines[0::2] == ["token", "sha256"]
    assert Tokens({"new": lines[3]}).caller(f"Bearer {lines[1]}".encode()) == Caller("new")


def test_a_wrong_token_is_refused_even_where_all_is_open(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers=bearer("guess")).status_code == 401
