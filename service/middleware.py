# SPDX-License-Identifier: Apache-2.0
"""What happens to every request: an id, a body limit, an access record, its metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge
from service.metrics import Metrics

log = logging.getLogger("service.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


class Observe:
    """Give the request an id, hold its body to the limit, and record how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = scope["request_id"] = _request_id(scope)
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with self.metrics.in_progress.track_inprogress():
            try:
                await self.app(scope, _limited(scope, receive, self.max_body_bytes), send_with_id)
            finally:
                self._record(scope, status, time.monotonic() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        handler = getattr(route, "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.requests.labels(handler, method, str(status)).inc()
        self.metrics.request_seconds.labels(handler, method).observe(seconds)
        record = {
            "request_id": scope["request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": round(1000 * seconds, 3),
        }
        quiet = handler.startswith(("/v2/health", "/metrics"))
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra=record)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return uuid.uuid4().hex


def _limited(scope: Scope, receive: Receive, limit: int) -> Receive:
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        if announced.isdigit() and int(announced) > limit:
            raise BodyTooLarge(limit, int(announced))
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise BodyTooLarge(limit)
        return message

    return limited
