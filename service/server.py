# SPDX-License-Identifier: Apache-2.0
"""uvicorn with what production needs beside it: bounded request heads, a drain before the end, and exit code 0."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import HANDLED_SIGNALS

MAX_HEAD_BYTES = 64 * 2**10  # request line and headers; a proxy in front allows 8 to 32 KiB
HEAD_SECONDS = 10.0  # in which a head must be complete, and a new connection must begin one
SURPLUS_SECONDS, SURPLUS_BYTES = 10.0, 64 * 2**20  # what is still taken of a body whose answer has been sent
ABANDON = "oodgate.abandon"  # in a request's scope: to be called when its caller is gone
DOOR = "oodgate.door"  # in the lifespan's state: see `service.door`


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose request heads, and bodies that nobody reads any more, are bounded in bytes and in time.

    The parser under it keeps a head, and trailers behind a body, of any length, for as long as a client takes to send
    them, and takes the rest of a body for ever once its answer was sent. Requests that the door turns away are answered
    here and go no further.
    """

    _head_bytes = 0
    _surplus_bytes = 0
    _unread_bytes = 0  # since the last of a body: heads of chunks, and trailers
    _in_head = False
    _in_body = False
    _refused = False
    _turned_away = False
    _keeps_alive = True
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)
        scope = cast(dict[str, Any] | None, self.scope)  # None where nothing was ever asked
        if scope is not None and ABANDON in scope:
            scope[ABANDON]()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        began_before, body_before = self._in_head, self._in_body
        self._unread_bytes += len(data) if body_before else 0
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self._in_body and self._unread_bytes > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LARGE)
            return
        if self._in_body and self._answered:
            self._take_surplus(len(data))
        if not self._in_head:
            return
        if began_before:  # else the head shares this chunk with the request before it
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LARGE)
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def on_message_begin(self) -> None:
        self._in_head, self._turned_away = True, False
        self._head_bytes = self._surplus_bytes = self._unread_bytes = 0
        self._unset_keepalive_if_required()  # the request before it may have ended in the same chunk
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._cancel_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LARGE)
        elif not self._turn_away():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        if not (self._refused or self._turned_away):
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        if self._refused:
            return
        self._cancel_timer()
        if not self._answered:
            super().on_message_complete()
        elif self._turned_away and not self._keeps_alive:
            self._end()
        else:  # the timer that the answer had set ended with the rest of the body
            self._unset_keepalive_if_required()
            handler = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, handler)

    @property
    def _answered(self) -> bool:
        """Whether the answer to the request whose body is arriving has been sent."""
        return self._turned_away or (self.cycle is not None and self.cycle.response_complete)

    def _turn_away(self) -> bool:
        """Answer what there is no room for; whether there was none."""
        door = self.app_state.get(DOOR)
        earlier_is_answered = self.cycle is None or self.cycle.response_complete
        if door is None or not earlier_is_answered or self.flow.write_paused:
            return False
        refusal = door.refusal(self.parser.get_method(), self.url, self.headers)
        if refusal is None:
            return False
        self._turned_away = True
        # Who waits to be told to continue may send the body or not: only a new connection is sure to be understood.
        lasting = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        self._keeps_alive = lasting and not self.expect_100_continue
        headers = [*self.server_state.default_headers, *refusal.headers]
        if not self._keeps_alive:
            headers.append((b"connection", b"close"))
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[refusal.status] + lines + b"\r\n" + refusal.body)
        self.server_state.total_requests += 1
        if self.expect_100_continue:
            self._end()
        return True

    def _end(self) -> None:
        """Close, and hear no more."""
        self._refused = True
        self.transport.close()

    def _take_surplus(self, size: int) -> None:
        self._surplus_bytes += size
        if self._surplus_bytes > SURPLUS_BYTES:
            self.transport.close()
        elif self._late is None:
            self._late = self.loop.call_later(SURPLUS_SECONDS, self.transport.close)

    def _head_is_late(self) -> None:
        self._late = None
        if self._in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's head was not complete within {HEAD_SECONDS:g} s")
        else:
            self.transport.close()

    def _cancel_timer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        self._refused = True
        self._cancel_timer()
        if self.cycle is None or self.cycle.response_complete:  # else an earlier request is being answered
            code = status.name.lower()
            problem = {
                "type": f"urn:oodgate:error:{code}",
                "title": status.phrase,
                "status": int(status),
                "detail": detail,
                "code": code,
                "error": detail,
            }
            body = json.dumps(problem).encode()
            head = (
                f"HTTP/1.1 {int(status)} {status.phrase}\r\ncontent-type: application/problem+json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


_TOO_LARGE = f"the request line and headers are longer than {MAX_HEAD_BYTES:,} bytes; send fewer or shorter headers"


class Server(uvicorn.Server):
    """Ends in order: not ready, drained, listener closed, everything admitted answered, exit code 0.

    Args:
        config: as for uvicorn.
        drain_s: seconds between the first signal and the closing of the listener, in which work is still taken.
        on_drain: told of the first signal.
    """

    def __init__(self, config: uvicorn.Config, *, drain_s: float, on_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain_s, self._on_drain = drain_s, on_drain
        self._close_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._close_at is None:
            self._on_drain()
            self._close_at = time.monotonic() + self._drain_s
        else:  # asked twice: no more waiting for the load balancer
            self._close_at = time.monotonic()
            self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = self._drain_s <= 0 or self.should_exit

    async def on_tick(self, counter: int) -> bool:
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again at the end: an orderly stop is a success."""
        if threading.current_thread() is not threading.main_thread():  # no signals reach this one
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def configured(app: Any, host: str, port: int, grace_s: float) -> uvicorn.Config:
    """uvicorn's configuration of this service; its log goes through ours."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace_s) + 1,
    )
