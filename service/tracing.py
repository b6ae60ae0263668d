# SPDX-License-Identifier: Apache-2.0
"""Spans of requests, for an OpenTelemetry collector; what sends them is imported only where one is named.

    POST /v1/verdict -> decode, queue, forward, score of each image; upstream, behind the gate

The stages are known when they are over, so nothing is measured twice and no thread carries a context.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from starlette.types import Scope

from detector import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
SPAN = "oodgate.span"  # in a request's scope, where requests are traced
EXPORT_S = 3.0  # for one batch of spans, attempts included; a stop waits for two at most

_CONTEXT = (b"traceparent", b"tracestate")


def can_export() -> bool:
    """Whether the packages of the extra `otel` are installed."""
    try:
        return find_spec(EXPORTER) is not None
    except ModuleNotFoundError:
        return False


class Tracing:
    """Sends spans from a thread of its own; a collector that cannot be reached costs spans and lines in the log.

    Sampling, headers and resource attributes are set as in every OpenTelemetry program, by `OTEL_*` variables.

    Args:
        endpoint: URL that takes traces by OTLP over HTTP.
    """

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = Resource({"service.name": "oodgate", "service.version": __version__})
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_S)))
        self._tracer = self._provider.get_tracer("oodgate", __version__)

    def begin(self, scope: Scope) -> RequestSpan:
        """Begin the span of a request, below the caller's; from here on the request names this one as its parent."""
        return RequestSpan(self._tracer, scope)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class RequestSpan:
    """A request under way.

    Args:
        tracer: makes spans.
        scope: of the request; its trace context is replaced.
    """

    def __init__(self, tracer: Tracer, scope: Scope) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        w3c = TraceContextTextMapPropagator()
        sent = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT}
        about = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "oodgate.request_id": scope["request_id"],
        }
        self._tracer = tracer
        self._span = tracer.start_span(scope["method"], w3c.extract(sent), SpanKind.SERVER, about)
        self._inside = set_span_in_context(self._span)
        onward: dict[str, str] = {}
        w3c.inject(onward, self._inside)
        if onward:
            others = [(name, value) for name, value in scope["headers"] if name not in _CONTEXT]
            scope["headers"] = others + [(name.encode(), value.encode()) for name, value in onward.items()]

    def stages(self, seconds: Mapping[str, float], about: Mapping[str, str]) -> None:
        """Spans below this one, each after the other, the last of them ending now."""
        at = time.time_ns() - round(1e9 * sum(seconds.values()))
        for name, length in seconds.items():
            span = self._tracer.start_span(name, self._inside, attributes=dict(about), start_time=at)
            at += round(1e9 * length)
            span.end(at)

    def end(self, handler: str, method: str, status: int) -> None:
        """The request has its answer."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {handler}")
        self._span.set_attributes({"http.route": handler, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
