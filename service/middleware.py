# SPDX-License-Identifier: Apache-2.0
"""What happens to every request: an id, a caller, a body limit, an access record, its metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from prometheus_client import Counter, Histogram
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, BuffersFull, NotReady, Unauthorized
from service.logs import access
from service.metrics import Metrics
from service.problems import response, unexpected
from service.security import ANONYMOUS, Caller, Tokens, is_open_path
from service.tracing import SPAN, Tracing

log = logging.getLogger(__name__)

CLIENT_GONE = 499  # in metrics and the log, of a request whose client left: nobody saw a status

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# W3C Trace Context: version, trace id, parent id, flags; later versions may append more. All zeros are no id.
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


Headers = list[tuple[bytes, bytes]]  # names in lower case


class Recorder:
    """Counts an answer and writes its line of the access log."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def record(
        self, handler: str, method: str, path: str, status: int, seconds: float, request_id: str, headers: Headers
    ) -> None:
        """Keep how a request ended.

        Args:
            handler: the path of its route.
            method, path, headers: the request's own.
            status: of the answer.
            seconds: that it took.
            request_id: validated.
        """
        requests, request_seconds = self._counted(handler, method if method in _METHODS else "other", status)
        requests.inc()
        trace = _trace_id(headers)
        request_seconds.observe(seconds, trace or None)
        quiet = handler.startswith(("/v2/health", "/metrics"))
        access.write(
            logging.DEBUG if quiet else logging.INFO,
            {
                "request_id": request_id,
                "method": method,
                "path": path,
                "status": status,
                "duration_ms": round(1000 * seconds, 3),
                **trace,
            },
        )

    def _counted(self, handler: str, method: str, status: int) -> tuple[Counter, Histogram]:
        """The series of an answer; looking them up by their labels would cost more than counting."""
        key = handler, method, status
        if key not in self._series:
            metrics = self._metrics
            self._series[key] = metrics.requests.labels(*key), metrics.request_seconds.labels(handler, method)
        return self._series[key]


class Observe:
    """Give the request an id, hold its body to the limit, and record how it ended."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        tokens: Tokens,
        tracing: Tracing | None,
        max_body_bytes: int,
        max_buffered_bytes: int,
    ) -> None:
        self.app, self.metrics, self.tokens, self.tracing = app, metrics, tokens, tracing
        self.max_body_bytes, self.max_buffered_bytes = max_body_bytes, max_buffered_bytes
        self._recorder = Recorder(metrics)
        self._buffered = 0  # bytes of all bodies under way; the event loop alone touches it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = scope["request_id"] = request_id_of(scope["headers"])
        if self.tracing is not None and not is_open_path(scope["path"]):
            scope[SPAN] = self.tracing.begin(scope)
        status = 0
        body = _Body(self, scope, receive)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with self.metrics.in_progress.track_inprogress():
            try:
                scope["caller"] = self._caller(scope)
                await self.app(scope, body.receive, send_with_id)
            except Unauthorized as error:
                await response(error, Request(scope))(scope, body.receive, send_with_id)
            except ClientDisconnect:
                status = status or CLIENT_GONE
            except asyncio.CancelledError:  # the grace of a stop is over
                if status:
                    raise
                late = NotReady("the server stopped before it could answer. Send it again, or to another replica")
                await response(late, Request(scope))(scope, body.receive, send_with_id)
            except Exception as error:
                log.error("unexpected error", exc_info=error, extra={"request_id": request_id})
                if status:
                    raise  # the answer has begun; only the connection can tell now
                await unexpected(Request(scope))(scope, body.receive, send_with_id)
            finally:
                self._buffered -= body.seen
                self._record(scope, status, time.monotonic() - started)

    def _caller(self, scope: Scope) -> Caller:
        if is_open_path(scope["path"]):
            return ANONYMOUS
        return self.tokens.caller(header(scope["headers"], b"authorization"))

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        handler = getattr(scope.get("route"), "path", "unmatched")
        method, path, headers = scope["method"], scope["path"], scope["headers"]
        if SPAN in scope:
            scope[SPAN].end(handler, method if method in _METHODS else "other", status)
        self._recorder.record(handler, method, path, status, seconds, scope["request_id"], headers)


def header(headers: Headers, wanted: bytes) -> bytes | None:
    """The first header of a name in lower case; None where there is none."""
    for name, value in headers:
        if name == wanted:
            return value
    return None


def request_id_of(headers: Headers) -> str:
    """The caller's own id of a request where it is a plain word, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return uuid.uuid4().hex


def _trace_id(headers: Headers) -> dict[str, str]:
    """The caller's trace id, by its name in log and exemplar; empty where `traceparent` is missing or malformed."""
    found = _TRACEPARENT.fullmatch(header(headers, b"traceparent") or b"")
    return {"trace_id": found[1].decode()} if found else {}


class _Body:
    """A request's body as it arrives, held to the limit of one request and of all together."""

    def __init__(self, observer: Observe, scope: Scope, receive: Receive) -> None:
        self._observer, self._receive = observer, receive
        announced = dict(scope["headers"]).get(b"content-length", b"")
        self._announced = int(announced) if announced.isdigit() else 0
        self.seen = 0

    async def receive(self) -> Message:
        limit = self._observer.max_body_bytes
        if self._announced > limit:
            raise BodyTooLarge(limit, self._announced)
        message = await self._receive()
        size = len(message.get("body", b""))
        self.seen += size
        self._observer._buffered += size
        if self.seen > limit:
            raise BodyTooLarge(limit)
        if self._observer._buffered > self._observer.max_buffered_bytes:
            raise BuffersFull(self._observer.max_buffered_bytes)
        return message
