# SPDX-License-Identifier: Apache-2.0
"""W3C trace context: the caller's trace id in the access log and on the latency histogram."""

from __future__ import annotations

import logging
import re

import pytest

from tests.helpers import GOOD
from tests.service.conftest import Running

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}


def ask(server: Running, traceparent: str) -> None:
    headers = {"content-type": "image/png", "traceparent": traceparent}
    assert server.client.post("/v1/verdict", content=GOOD, headers=headers).status_code == 200


def logged_traces(caplog: pytest.LogCaptureFixture) -> list[str | None]:
    return [getattr(record, "trace_id", None) for record in caplog.records if record.name == "service.access"]


def test_the_access_log_carries_the_callers_trace_id(shared_server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "service.access"):
        ask(shared_server, f"00-{TRACE}-00f067aa0ba902b7-01")
        shared_server.client.get("/v2/health/live")  # one round trip later the record has been written
    assert logged_traces(caplog) == [TRACE]


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
    ],
)
def test_a_malformed_traceparent_is_ignored(
    shared_server: Running, caplog: pytest.LogCaptureFixture, traceparent: str
) -> None:
    with caplog.at_level(logging.INFO, "service.access"):
        ask(shared_server, traceparent)
        shared_server.client.get("/v2/health/live")
    assert logged_traces(caplog) == [None]


def test_openmetrics_shows_the_trace_as_an_exemplar_and_the_plain_text_does_not(shared_server: Running) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    ask(shared_server, f"00-{trace}-b7ad6b7169203331-01")
    exemplar = rf'oodgate_http_request_duration_seconds_bucket\{{.*\}} \S+ # \{{trace_id="{trace}"\}}'
    assert re.search(exemplar, shared_server.client.get("/metrics", headers=OPENMETRICS).text)
    assert trace not in shared_server.client.get("/metrics").text
