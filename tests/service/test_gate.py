# SPDX-License-Identifier: Apache-2.0
"""The reverse proxy between real servers: what passes, what does not, and how it looks on the other side."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError

from service import Settings
from service.schemas import VerdictBody, VerdictList
from tests.helpers import GOOD
from tests.service.conftest import Running, serving
from tests.service.test_security import bearer, sha256
from tests.service.test_verdict import NOISE, PNG, assert_problem


@dataclass
class Seen:
    """A request as it reached the app."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


@dataclass
class App:
    """A small real app: it keeps what it gets, and answers as it is told."""

    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("content-type", "text/plain")])
    parts: tuple[bytes, ...] = (b"the ", b"app")
    silent: bool = False
    stuck: bool = False  # before the last part
    before_last: threading.Event | None = None
    break_off: bool = False
    seen: list[Seen] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    url: str = ""


def handler_of(app: App) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            app.seen.append(Seen(self.command, self.requestline.split()[1], self.headers.items(), body))
            app.arrived.set()
            if app.silent:
                self.wait_for_the_end()
            else:
                self.answer()

        do_PUT = do_POST  # noqa: N815

        def answer(self) -> None:
            self.send_response(app.status)
            for name, value in app.headers:
                self.send_header(name, value)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for number, part in enumerate(app.parts, start=1):
                if number == len(app.parts) and app.stuck:
                    self.wait_for_the_end()
                    return
                if number == len(app.parts) and app.before_last is not None:
                    assert app.before_last.wait(20)
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            if app.break_off:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        def wait_for_the_end(self) -> None:
            self.connection.settimeout(20)
            if self.connection.recv(1) == b"":  # the gate hung up: nobody waits any more
                app.let_go.set()
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@contextmanager
def app_running(**how: Any) -> Iterator[App]:
    app = App(**how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(app))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    app.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield app
    finally:
        server.shutdown()
        server.server_close()
        thread.join(20)


@contextmanager
def gated(
    models: Path, base: str = "", app: dict[str, Any] | None = None, **more: Any
) -> Iterator[tuple[Running, App]]:
    with app_running(**(app or {})) as upstream:
        settings = Settings(models=models, gate_upstream=upstream.url + base, **more)
        with serving(settings) as running:
            yield running, upstream


@pytest.fixture(scope="module")
def pair(toy_models: Path) -> Iterator[tuple[Running, App]]:
    """A gate and an app for tests that only ask."""
    with gated(toy_models) as both:
        yield both


@pytest.fixture(scope="module")
def opened(toy_models: Path) -> Iterator[tuple[Running, App]]:
    """The same, failing open."""
    with gated(toy_models, gate_fail_policy="open") as both:
        yield both


def outcome(running: Running, name: str) -> float:
    return running.metric("oodgate_gate_requests_total", outcome=name)


def raw(running: Running, head: str, body: bytes = b"") -> bytes:
    """The answer to a request that no client library would send."""
    address = urlsplit(running.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=20) as connection:
        connection.sendall(head.encode() + b"\r\nhost: gate\r\nconnection: close\r\n\r\n" + body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_an_accepted_image_reaches_the_app_byte_for_byte_and_its_answer_comes_back(pair: tuple[Running, App]) -> None:
    running, app = pair
    before = outcome(running, "forwarded")
    answer = running.client.post("/gate/v1/classify%20this?top=3&x=%2F", content=GOOD, headers=PNG)
    assert (answer.status_code, answer.text) == (200, "the app")
    assert (answer.headers["x-oodgate-decision"], answer.headers["x-oodgate-reason"]) == ("accept", "none")
    seen = app.seen[-1]
    assert (seen.method, seen.target, seen.body) == ("POST", "/v1/classify%20this?top=3&x=%2F", GOOD)
    assert outcome(running, "forwarded") == before + 1
    assert running.metric("oodgate_stage_duration_seconds_count", stage="upstream") >= 1


def test_put_is_judged_and_forwarded_too(pair: tuple[Running, App]) -> None:
    running, app = pair
    assert running.client.put("/gate/photos/1", content=GOOD, headers=PNG).text == "the app"
    assert (app.seen[-1].method, app.seen[-1].target) == ("PUT", "/photos/1")


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_do_not_pass(pair: tuple[Running, App], method: str) -> None:
    running, app = pair
    known = len(app.seen)
    assert_problem(running.client.request(method, "/gate/photos/1"), 405, "method_not_allowed")
    assert len(app.seen) == known


def test_a_deferred_image_never_reaches_the_app(pair: tuple[Running, App]) -> None:
    running, app = pair
    known, before = len(app.seen), outcome(running, "deferred")
    answer = running.client.post("/gate/classify", content=NOISE, headers=PNG)
    assert answer.status_code == 422
    verdict = VerdictBody.model_validate(answer.json())
    assert (verdict.decision, verdict.reason) == ("defer", "ood")
    assert (answer.headers["x-oodgate-decision"], answer.headers["x-oodgate-reason"]) == ("defer", "ood")
    assert verdict.ood is not None
    assert float(answer.headers["x-oodgate-score"]) == verdict.ood.score
    assert float(answer.headers["x-oodgate-p-value"]) == verdict.ood.p_value
    assert (len(app.seen), outcome(running, "deferred")) == (known, before + 1)


def test_the_answer_to_what_is_deferred_is_a_setting(toy_models: Path) -> None:
    with gated(toy_models, gate_defer_status=200, gate_defer_body={"label": None}) as (running, app):
        answer = running.client.post("/gate/classify", content=NOISE, headers=PNG)
        assert (answer.status_code, answer.json(), answer.headers["x-oodgate-decision"]) == (
            200,
            {"label": None},
            "defer",
        )
        assert not app.seen


def test_scores_stay_behind_where_only_decisions_are_exposed(toy_models: Path) -> None:
    with gated(toy_models, expose="decision") as (running, app):
        for image in (GOOD, NOISE):
            answer = running.client.post("/gate/classify", content=image, headers=PNG)
            told = {name for name in answer.headers if name.startswith("x-oodgate-")}
            assert told == {"x-oodgate-decision", "x-oodgate-reason"}
        assert "ood" not in answer.json()
        assert not app.seen[0].header("x-oodgate-score")


def test_several_images_pass_only_if_all_are_accepted(pair: tuple[Running, App]) -> None:
    running, app = pair
    known = len(app.seen)

    def send(*images: bytes) -> httpx.Response:
        files = [("photo" if i else "file", (f"{i}.png", image)) for i, image in enumerate(images)]
        return running.client.post("/gate/album", files=files, data={"title": "mine"})

    assert send(GOOD, GOOD).text == "the app"
    assert len(app.seen) == known + 1
    assert app.seen[-1].body.count(GOOD) == 2
    assert b"title" in app.seen[-1].body
    mixed = send(GOOD, NOISE, GOOD)
    assert mixed.status_code == 422
    VerdictList.model_validate(mixed.json())
    assert [item["decision"] for item in mixed.json()["verdicts"]] == ["accept", "defer", "accept"]
    assert mixed.headers["x-oodgate-decision"] == "defer"
    assert "image 1" in assert_problem(send(GOOD, b"no image", NOISE), 422, "undecodable_image")
    assert len(app.seen) == known + 1


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "image/png", 400, "empty_request"),
        (b'{"image": "data:"}', "application/json", 415, "unsupported_media_type"),
        (b"hello", "image/png", 422, "undecodable_image"),
        (bytes(30_000_000), "image/png", 413, "body_too_large"),
        (b"nonsense", "multipart/form-data; boundary=x", 400, "malformed_form"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_refused_even_where_the_gate_fails_open(
    opened: tuple[Running, App], body: bytes, kind: str, status: int, code: str
) -> None:
    running, app = opened
    before = outcome(running, "refused")
    assert_problem(running.client.post("/gate/x", content=body, headers={"content-type": kind}), status, code)
    assert not app.seen
    assert outcome(running, "refused") == before + 1


def part(head: bytes, body: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + body + b"\r\n"


FORM = {"content-type": "multipart/form-data; boundary=x"}
FILE, HIDDEN = (part(b'name="file"; filename="a.png"', image) for image in (GOOD, NOISE))
END = b"--x--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        FILE + part(b"name=\"file\"; filename*=utf-8''b.png", NOISE) + END,
        FILE + part(b'name="file"; filename*0="b.png"', NOISE) + END,
        FILE + part(b'name="a\\\\"; filename="b.png"', NOISE) + END,
        FILE + part(b'name="a; filename=b.png"', NOISE) + END,
        FILE + part(b'name="file"\r\nContent-Type: application/octet-stream', NOISE) + END,
        FILE + part(b'name="f"; filename="b.png"\r\nContent-Disposition: form-data; name="a"', NOISE) + END,
        FILE + part(b'name="a"\r\nX-A: b\nContent-Disposition: form-data; name="f"; filename="b.png"', NOISE) + END,
        part(b'name="file"; filename="a.png"\r\nContent-Transfer-Encoding: base64', GOOD) + END,
        FILE + part(b'name="a"', b"text" + HIDDEN) + END,
        FILE + END + HIDDEN + END,
        FILE + HIDDEN,
        FILE + HIDDEN.removesuffix(b"\r\n") + END,
    ],
    ids=[
        "extended name", "continued name", "escape", "semicolon", "type", "header twice", "line feed",
        "transfer encoding", "within a field", "behind the end", "no end", "no line before the end",
    ],
)  # fmt: skip
def test_no_form_passes_that_is_other_files_to_another_parser(pair: tuple[Running, App], body: bytes) -> None:
    running, app = pair
    known = len(app.seen)
    assert_problem(running.client.post("/gate/album", content=body, headers=FORM), 400, "malformed_form")
    assert len(app.seen) == known


@pytest.mark.parametrize("parameters", ["boundary*=utf-8''y; boundary=x", "boundary=y; boundary=x", "a=b; boundary=x"])
def test_no_form_passes_that_may_have_another_boundary(pair: tuple[Running, App], parameters: str) -> None:
    running, app = pair
    known, kind = len(app.seen), f"multipart/form-data; {parameters}"
    answer = running.client.post("/gate/album", content=FILE + END, headers={"content-type": kind})
    assert_problem(answer, 400, "malformed_form")
    assert len(app.seen) == known


def test_a_form_as_clients_of_other_languages_build_it_passes(pair: tuple[Running, App]) -> None:
    running, app = pair
    body = (
        part(b'name="a title"\r\nContent-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit', b"mine")
        + part(b"name=tag", b"sea")
        + part(b'name="meta"\r\nContent-Type: application/json', b"{}")
        + part(b"name=photo; filename=\"a.png\"; filename*=utf-8''a.png\r\nContent-Type: image/png", GOOD)
        + END
    )
    kind = 'Multipart/Form-Data; charset=UTF-8; boundary="x"'
    assert running.client.post("/gate/album", content=body, headers={"content-type": kind}).text == "the app"
    assert app.seen[-1].body == body


@pytest.mark.parametrize(
    "more",
    [
        ("content-type", FORM["content-type"]),
        ("content_type", FORM["content-type"]),
        ("content-encoding", "gzip"),
        ("content_encoding", "gzip"),
        ("content-encoding", "identity, gzip"),
    ],
    ids=" ".join,
)
def test_no_body_passes_that_may_be_of_another_kind(pair: tuple[Running, App], more: tuple[str, str]) -> None:
    running, app = pair
    known = len(app.seen)
    answer = running.client.post("/gate/x", content=GOOD, headers=[*PNG.items(), more])
    assert_problem(answer, 415, "unsupported_media_type")
    assert len(app.seen) == known


def test_headers_of_the_request_go_on_and_those_of_the_connection_do_not(toy_models: Path) -> None:
    tokens: dict[str, Any] = {"tokens": {"camera": sha256("one")}, "gate_upstream_authorization": "Bearer app"}
    with gated(toy_models, "/base/", **tokens) as (running, app):
        sent = bearer("one") | {
            "host": "photos.example",
            "connection": "keep-alive, x-private",
            "x-private": "for this hop",
            "keep-alive": "timeout=5",
            "te": "trailers",
            "proxy-authorization": "Basic b25l",
            "x-forwarded-for": "192.0.2.7",
            "x-forwarded-host": "elsewhere",
            "forwarded": "for=192.0.2.8",
            "x-oodgate-decision": "accept",
            "x_oodgate_score": "-99",
            "x-request-id": "r-1",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "cookie": "session=1",
            "accept-language": "fr",
        }
        answer = running.client.post("/gate/classify", content=GOOD, headers=sent)
        (seen,) = app.seen
        assert seen.target == "/base/classify"
        assert seen.header("authorization") == ["Bearer app"]
        assert seen.header("host") == [app.url.removeprefix("http://")]
        assert seen.header("x-forwarded-host") == ["photos.example"]
        assert seen.header("x-forwarded-proto") == ["http"]
        assert seen.header("x-forwarded-for")[0].split(", ")[0] == "192.0.2.7"
        assert seen.header("x-request-id") == [answer.headers["x-request-id"]] == ["r-1"]
        assert seen.header("traceparent") == [sent["traceparent"]]
        assert (seen.header("cookie"), seen.header("accept-language")) == (["session=1"], ["fr"])
        assert seen.header("content-type") == ["image/png"]
        assert seen.header("content-length") == [str(len(GOOD))]
        assert seen.header("x-oodgate-decision") == ["accept"]
        assert len(seen.header("x-oodgate-score")) == 1
        gone = ("x-private", "keep-alive", "te", "proxy-authorization", "forwarded", "x_oodgate_score", "connection")
        assert {name: seen.header(name) for name in gone} == {name: [] for name in gone}
        assert_problem(running.client.post("/gate/classify", content=GOOD, headers=PNG), 401, "unauthorized")


def test_headers_of_the_answer_come_back_and_those_of_the_connection_do_not(toy_models: Path) -> None:
    headers = [
        ("content-type", "application/x-mine"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("x-request-id", "the app's"),
        ("X-OODGate-Decision", "defer"),
    ]
    with gated(toy_models, app={"headers": headers, "status": 201}) as (running, _):
        answer = running.client.post("/gate/classify", content=GOOD, headers=PNG | {"x-request-id": "r-1"})
        assert (answer.status_code, answer.headers["content-type"]) == (201, "application/x-mine")
        assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
        assert "x-hop" not in answer.headers
        for name, value in (("x-request-id", "r-1"), ("x-oodgate-decision", "accept")):
            assert answer.headers.get_list(name) == [value]
        assert len(answer.headers.get_list("date")) == 1


def test_a_redirect_of_the_app_is_the_clients_to_follow(toy_models: Path) -> None:
    how = {"status": 307, "headers": [("location", "http://127.0.0.1:9/elsewhere")]}
    with gated(toy_models, app=how) as (running, app):
        answer = running.client.post("/gate/classify", content=GOOD, headers=PNG)
        assert (answer.status_code, answer.headers["location"]) == (307, "http://127.0.0.1:9/elsewhere")
        assert len(app.seen) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/gate/../admin",
        "/gate/a/../../admin",
        "/gate/%2e%2e/admin",
        "/gate/.%2E/admin",
        "/gate/%252e%252e/admin",
        "/gate/%2525252525252e%2525252525252e/admin",
        "/gate/a%2f..%2fadmin",
        "/gate/..;x=1/admin",
        "/gate/..%5cadmin",
        "/gate/a%00b",
        "/gate/a%01b",
        "/gate/.",
        "/%67ate/x",
    ],
)
def test_no_path_leads_out_of_the_app(pair: tuple[Running, App], path: str) -> None:
    running, app = pair
    known = len(app.seen)
    head = f"POST {path} HTTP/1.1\r\ncontent-type: image/png\r\ncontent-length: {len(GOOD)}"
    answer = raw(running, head, GOOD)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "path_refused"
    assert len(app.seen) == known


def test_no_path_ends_the_line_it_is_sent_in(pair: tuple[Running, App]) -> None:
    running, app = pair
    known = len(app.seen)
    assert_problem(running.client.post("/gate/a%0d%0aX-Injected:%201", content=GOOD, headers=PNG), 404, "not_found")
    assert len(app.seen) == known


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/gate//evil.example/x", "//evil.example/x"),
        ("/gate/http://evil.example/x", "/http://evil.example/x"),
        ("/gate/@evil.example", "/@evil.example"),
        ("/gate/a..b/...", "/a..b/..."),
        ("/gate/", "/"),
        ("/gate/x?next=../admin", "/x?next=../admin"),
    ],
)
def test_no_path_leads_to_another_host(pair: tuple[Running, App], path: str, target: str) -> None:
    running, app = pair
    head = f"POST {path} HTTP/1.1\r\ncontent-type: image/png\r\ncontent-length: {len(GOOD)}"
    assert raw(running, head, GOOD).startswith(b"HTTP/1.1 200 ")
    assert app.seen[-1].target == target
    assert app.seen[-1].header("host") == [app.url.removeprefix("http://")]


def test_a_chunked_upload_goes_on_as_one_body_of_known_length(pair: tuple[Running, App]) -> None:
    running, app = pair
    known = len(app.seen)
    parts = iter([GOOD[:100], GOOD[100:]])
    assert running.client.post("/gate/x", content=parts, headers=PNG).status_code == 200
    seen = app.seen[-1]
    assert (seen.body, seen.header("content-length"), seen.header("transfer-encoding")) == (GOOD, [str(len(GOOD))], [])
    assert len(app.seen) == known + 1


def test_a_second_request_hidden_in_the_body_is_no_request(pair: tuple[Running, App]) -> None:
    running, app = pair
    known = len(app.seen)
    hidden = b"0\r\n\r\nPOST /admin HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    head = f"POST /gate/x HTTP/1.1\r\ncontent-type: image/png\r\ncontent-length: {len(hidden)}"
    raw(running, head + "\r\ntransfer-encoding: chunked", hidden)
    raw(running, head + "\r\ntransfer-encoding: xchunked", hidden)
    assert "/admin" not in [seen.target for seen in app.seen]
    assert len(app.seen) == known


def test_the_answer_streams_as_the_app_sends_it(toy_models: Path) -> None:
    last = threading.Event()
    with (
        gated(toy_models, app={"before_last": last}) as (running, _),
        running.client.stream("POST", "/gate/x", content=GOOD, headers=PNG) as answer,
    ):
        parts = answer.iter_raw()
        assert next(parts) == b"the "
        last.set()
        assert b"".join(parts) == b"app"


def test_an_app_that_breaks_off_breaks_the_answer_off(toy_models: Path) -> None:
    with gated(toy_models, app={"break_off": True}) as (running, _):
        with pytest.raises(httpx.RemoteProtocolError):
            running.client.post("/gate/x", content=GOOD, headers=PNG)
        assert running.client.get("/v2/health/ready").status_code == 200


def test_a_slow_app_is_a_504(toy_models: Path) -> None:
    with gated(toy_models, app={"silent": True}, gate_timeout_s=0.3) as (running, app):
        assert_problem(running.client.post("/gate/x", content=GOOD, headers=PNG), 504, "upstream_timeout")
        assert app.let_go.wait(20)
        assert (outcome(running, "upstream_error"), outcome(running, "forwarded")) == (1, 0)


def test_an_app_that_is_down_is_a_502_and_deferral_goes_on(toy_models: Path) -> None:
    with app_running() as app:
        url = app.url
    with serving(Settings(models=toy_models, gate_upstream=url)) as running:
        told = assert_problem(running.client.post("/gate/x", content=GOOD, headers=PNG), 502, "upstream_failed")
        assert url not in told
        assert running.client.post("/gate/x", content=NOISE, headers=PNG).headers["x-oodgate-decision"] == "defer"
        assert outcome(running, "upstream_error") == 1


def test_without_an_app_the_gate_says_so(client: httpx.Client) -> None:
    told = assert_problem(client.post("/gate/x", content=GOOD, headers=PNG), 404, "gate_disabled")
    assert "OODGATE_GATE_UPSTREAM" in told


def test_the_app_is_let_go_when_the_client_goes(toy_models: Path) -> None:
    with gated(toy_models, app={"silent": True}) as (running, app):
        address = urlsplit(running.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=20) as connection:
            head = f"POST /gate/x HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {len(GOOD)}\r\n\r\n"
            connection.sendall(head.encode() + GOOD)
            assert app.arrived.wait(20)
            assert not app.let_go.is_set()
        assert app.let_go.wait(20)
        assert running.client.post("/gate/x", content=NOISE, headers=PNG).headers["x-oodgate-decision"] == "defer"


def test_the_app_is_let_go_when_the_client_goes_in_the_middle_of_the_answer(toy_models: Path) -> None:
    with gated(toy_models, app={"stuck": True}) as (running, app):
        with running.client.stream("POST", "/gate/x", content=GOOD, headers=PNG) as answer:
            parts = answer.iter_raw()  # let go of, it closes the connection
            assert next(parts) == b"the "
            assert not app.let_go.is_set()
        assert app.let_go.wait(20)
        assert running.client.post("/gate/x", content=NOISE, headers=PNG).headers["x-oodgate-decision"] == "defer"


def fail_scoring(running: Running, patch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such kernel")

    patch.setattr(running.context.registry.get().detector, "finish_judging", fail)


def test_what_cannot_be_scored_stays_out_where_the_gate_fails_closed(
    toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gated(toy_models) as (running, app):
        fail_scoring(running, monkeypatch)
        answer = running.client.post("/gate/x", content=GOOD, headers=PNG)
        assert "scoring_failed" in assert_problem(answer, 503, "not_scored")
        assert int(answer.headers["retry-after"]) >= 1
        assert not app.seen
        assert outcome(running, "refused") == 1
        monkeypatch.undo()
        assert running.client.post("/gate/x", content=GOOD, headers=PNG).text == "the app"


def test_what_cannot_be_scored_passes_marked_and_on_record_where_the_gate_fails_open(
    toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gated(toy_models, gate_fail_policy="open", state_dir=tmp_path) as (running, app):
        fail_scoring(running, monkeypatch)
        answer = running.client.post("/gate/x", content=GOOD, headers=PNG | {"x-request-id": "r-1"})
        assert (answer.text, answer.headers["x-oodgate-decision"]) == ("the app", "unscored")
        assert "x-oodgate-reason" not in answer.headers
        assert (app.seen[0].body, app.seen[0].header("x-oodgate-decision")) == (GOOD, ["unscored"])
        assert (outcome(running, "unscored"), outcome(running, "forwarded")) == (1, 0)
    (line,) = map(json.loads, (tmp_path / "audit" / "audit.jsonl").read_text().splitlines())
    assert (line["event"], line["request_id"], line["code"]) == ("unscored", "r-1", "scoring_failed")


@pytest.mark.parametrize(("policy", "status"), [("closed", 429), ("open", 200)])
def test_a_full_queue_counts_as_not_scored(toy_models: Path, policy: str, status: int) -> None:
    settings: dict[str, Any] = {"gate_fail_policy": policy, "queue_capacity": 1, "max_images": 1}
    with gated(toy_models, **settings) as (running, app), running.context.engine.admit(1):
        answer = running.client.post("/gate/x", content=GOOD, headers=PNG)
        assert answer.status_code == status
        assert len(app.seen) == (policy == "open")
        assert (answer.headers.get("x-oodgate-decision") == "unscored") is (policy == "open")


@pytest.mark.parametrize(
    "wrong",
    [
        {"gate_upstream": "localhost:9000"},
        {"gate_upstream": "ftp://app"},
        {"gate_upstream": "http://user:secret@app"},
        {"gate_upstream": "http://app/?x=1"},
        {"gate_upstream": "http://app:99999"},
        {"gate_defer_status": 204},
        {"gate_defer_status": 100},
        {"gate_fail_policy": "ajar"},
    ],
    ids=str,
)
def test_settings_that_make_no_gate_stop_the_start(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)
