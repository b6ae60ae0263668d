# SPDX-License-Identifier: Apache-2.0
"""Requests that there is no room for, turned away at their head.

Under overload most requests are refused. Each costs the event loop time that those under way need, so it is answered
before it has a task, a route or a body. Servers without this door (another ASGI server, Ray's proxy) refuse the same
requests, at more cost, where the body would be read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import unquote

import orjson
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from service import problems
from service.engine import Engine
from service.errors import QueueFull, ServiceError, Unauthorized
from service.metrics import Metrics
from service.middleware import Headers, Recorder, header, request_id_of
from service.security import Tokens


class Refusal(NamedTuple):
    """An answer without its connection's own headers."""

    status: int
    headers: Headers
    body: bytes


class Door:
    """Knows, from the head of a request alone, whether it is refused for want of room.

    Args:
        routes: those of them that take POST are watched.
        engine: says whether there is room.
        tokens: who has none is not told so here.
        metrics: refusals count there as any answer does.
    """

    def __init__(self, routes: Sequence[BaseRoute], engine: Engine, tokens: Tokens, metrics: Metrics) -> None:
        self._handlers: list[tuple[re.Pattern[str], str]] = [
            (route.path_regex, route.path)
            for route in routes
            if isinstance(route, APIRoute) and "POST" in (route.methods or ())
        ]
        self._engine, self._tokens = engine, tokens
        self._recorder, self._refused = Recorder(metrics), metrics.rejected.labels("queue_full")

    def refusal(self, method: bytes, target: bytes, headers: Headers) -> Refusal | None:
        """What a request is answered at once; None where it is let in.

        Args:
            method: as sent.
            target: as sent, with its query.
            headers: names in lower case.
        """
        if method != b"POST":
            return None
        try:
            self._engine.check_room(1)
        except QueueFull as error:
            return self._refuse(target, headers, error)
        except ServiceError:
            pass  # told where every other error is
        return None

    def _refuse(self, target: bytes, headers: Headers, error: QueueFull) -> Refusal | None:
        started = time.monotonic()
        path = unquote(target.partition(b"?")[0].decode("latin-1"))
        handler = next((handler for pattern, handler in self._handlers if pattern.match(path)), None)
        if handler is None or not self._known(headers):
            return None
        request_id = request_id_of(headers)
        body = orjson.dumps(problems.problem(error) | {"instance": path, "request_id": request_id})
        self._refused.inc()
        seconds = time.monotonic() - started
        self._recorder.record(handler, "POST", path, error.status, seconds, request_id, headers)
        told = [
            (b"content-type", problems.MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"retry-after", b"%d" % (error.retry_after_s or 1)),
            (b"x-request-id", request_id.encode()),
        ]
        return Refusal(HTTPStatus.TOO_MANY_REQUESTS, told, body)

    def _known(self, headers: Headers) -> bool:
        try:
            self._tokens.caller(header(headers, b"authorization"))
        except Unauthorized:
            return False
        return True
