# SPDX-License-Identifier: Apache-2.0
"""Spans as they reach a collector: a real server sends them over HTTP to one that keeps what it gets."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pydantic import ValidationError

from service import Settings
from service.tracing import EXPORT_S, EXPORTER
from tests.helpers import GOOD
from tests.service.conftest import Running, serving
from tests.service.test_gate import app_running
from tests.service.test_tracing import TRACE, ask, logged_traces
from tests.service.test_verdict import PNG

PARENT = "00f067aa0ba902b7"
STAGES = ("decode", "queue", "forward", "score")


def collected(models: Path, during: Callable[[Running], object], **settings: Any) -> list[Span]:
    """The spans of a server's life; it has sent all of them when it has stopped."""
    with app_running(headers=[], parts=()) as collector:
        endpoint = f"{collector.url}/v1/traces"
        with serving(Settings(models=models, otlp_endpoint=endpoint, **settings)) as running:
            during(running)
    batches = [ExportTraceServiceRequest.FromString(seen.body) for seen in collector.seen]
    assert {seen.target for seen in collector.seen} <= {"/v1/traces"}
    resources = [resource for batch in batches for resource in batch.resource_spans]
    names = {(a.key, a.value.string_value) for resource in resources for a in resource.resource.attributes}
    assert not resources or ("service.name", "oodgate") in names
    return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


def nobody() -> str:
    """A URL where no one listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def attributes(span: Span) -> dict[str, str | int]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


@pytest.fixture(scope="module")
def spans(toy_models: Path) -> dict[str, Span]:
    """By name, of one image sent by a caller that is traced itself."""
    found = collected(toy_models, lambda running: ask(running, f"00-{TRACE}-{PARENT}-01"))
    assert len(found) == 5
    return {span.name: span for span in found}


def test_a_request_is_a_span_below_its_callers(spans: dict[str, Span]) -> None:
    request = spans["POST /v1/verdict"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.kind == Span.SPAN_KIND_SERVER
    told = attributes(request)
    assert told["http.route"] == "/v1/verdict"
    assert told["http.response.status_code"] == 200


def test_its_stages_are_spans_below_it_one_after_the_other(spans: dict[str, Span]) -> None:
    ordered = [spans[name] for name in STAGES]
    assert {span.parent_span_id for span in ordered} == {spans["POST /v1/verdict"].span_id}
    for earlier, later in pairwise(ordered):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in ordered)
    assert attributes(spans["score"]) == {
        "oodgate.model": "toy",
        "oodgate.version": "1",
        "oodgate.decision": "accept",
    }


def test_a_request_without_a_trace_begins_one_that_the_log_names(
    toy_models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "service.access"):
        found = collected(toy_models, lambda running: running.client.post("/v1/verdict", content=GOOD, headers=PNG))
    [trace] = {span.trace_id.hex() for span in found}
    assert logged_traces(caplog) == [trace]


def test_probes_and_scrapes_are_not_traced(toy_models: Path) -> None:
    def probe(running: Running) -> None:
        for path in ("/v2/health/ready", "/metrics"):
            assert running.client.get(path).status_code == 200

    assert collected(toy_models, probe) == []


def test_the_app_behind_the_gate_is_told_of_the_span_in_front_of_it(toy_models: Path) -> None:
    headers = PNG | {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with app_running() as app:
        found = collected(
            toy_models,
            lambda running: running.client.post("/gate/predict", content=GOOD, headers=headers),
            gate_upstream=app.url,
        )
    [request] = [span for span in found if span.kind == Span.SPAN_KIND_SERVER]
    assert app.seen[0].header("traceparent") == [f"00-{TRACE}-{request.span_id.hex()}-01"]
    assert {span.name for span in found} == {request.name, "upstream", *STAGES}


def test_a_failure_behind_the_callers_is_an_error_and_a_callers_own_is_not(toy_models: Path) -> None:
    def fail(running: Running) -> None:
        running.client.post("/v1/verdict", content=b"no image", headers=PNG)
        running.client.post("/gate/predict", content=GOOD, headers=PNG)

    found = collected(toy_models, fail, gate_upstream=nobody())
    failed = {
        attributes(span)["http.response.status_code"]: span.status.code == Status.STATUS_CODE_ERROR
        for span in found
        if span.kind == Span.SPAN_KIND_SERVER
    }
    assert failed == {422: False, 502: True}


def test_a_collector_that_is_not_there_delays_no_answer_and_no_stop_for_long(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, otlp_endpoint=nobody())) as running:
        assert running.client.post("/v1/verdict", content=GOOD, headers=PNG).status_code == 200
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 2 * EXPORT_S + 5


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ValidationError, match="http://collector:4318/v1/traces"):
        Settings(otlp_endpoint="collector:4317")


def test_without_the_extra_an_endpoint_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(ValidationError, match=r"pip install 'oodgate\[otel\]'"):
        Settings(otlp_endpoint="http://collector:4318/v1/traces")
