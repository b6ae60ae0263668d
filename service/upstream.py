# SPDX-License-Identifier: Apache-2.0
"""The app behind the gate: where requests go, which headers travel with them, and how answers stream back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import httpx
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.errors import PathRefused, UpstreamFailed, UpstreamTimeout
from service.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
RawHeaders = list[tuple[bytes, bytes]]

PREFIX = b"/gate/"
MOST_CONNECTIONS = 512  # to the app at once; more wait, within the timeout
IDLE_CONNECTIONS, IDLE_S = 64, 4.0  # many servers close after 5 s: no request must meet a connection that closes
MOST_DECODINGS = 3  # a path that is encoded more often hides something
CLIENT_GONE = 499  # as proxies log it; nobody reads it

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)  # RFC 9110, section 7.6.1
# Set anew for the app, or meant for oodgate alone.
_NOT_FORWARDED = HOP_BY_HOP | frozenset(
    b"host content-length expect authorization forwarded x-forwarded-for x-forwarded-host x-forwarded-proto "
    b"x-request-id".split()
)
_NOT_RETURNED = HOP_BY_HOP | {b"date", b"x-request-id"}  # the server in front writes its own


class Upstream:
    """The app behind the gate, over connections that are kept.

    Redirects are the client's to follow, cookies and proxies of the environment play no part: every request goes to the
    host in the settings.

    Args:
        settings: the app's URL, its credentials, its timeout.
    """

    def __init__(self, settings: Settings) -> None:
        self._base = httpx.URL(settings.gate_upstream)
        self._authorization = settings.gate_upstream_authorization.get_secret_value().encode()
        self._seconds = settings.gate_timeout_s
        self._timeout = httpx.Timeout(settings.gate_timeout_s).as_dict()
        limits = httpx.Limits(
            max_connections=MOST_CONNECTIONS, max_keepalive_connections=IDLE_CONNECTIONS, keepalive_expiry=IDLE_S
        )
        self._transport = httpx.AsyncHTTPTransport(limits=limits)

    def target(self, request: Request) -> bytes:
        """The request target at the app: its base path and what follows /gate/, byte for byte, with the query.

        Raises:
            PathRefused: the path could be read as leading elsewhere.
        """
        raw: bytes = request.scope["raw_path"]
        query: bytes = request.scope["query_string"]
        if not raw.startswith(PREFIX) or not _stays_below(raw.removeprefix(PREFIX)) or not _is_visible(raw + query):
            raise PathRefused
        path = self._base.raw_path.rstrip(b"/") + b"/" + raw.removeprefix(PREFIX)
        return path + b"?" + query if query else path

    async def forward(
        self, request: Request, target: bytes, body: bytes, told: Mapping[str, str]
    ) -> tuple[Response, float]:
        """Send a request on; the answer streams as it comes, and the app is let go when the client is.

        Args:
            request: what the client sent.
            target: as `target` gives it.
            body: the client's, byte for byte.
            told: headers for the app and for the client, in place of any of these names.

        Returns:
            the app's answer, and the seconds until it began.

        Raises:
            UpstreamTimeout: it did not begin in time.
            UpstreamFailed: the app cannot be reached, or gave no HTTP answer.
        """
        extra = [(name.lower().encode(), value.encode()) for name, value in told.items()]
        onward = httpx.Request(
            request.method,
            self._base,
            headers=self._forwarded(request) + extra,
            content=body,
            extensions={"target": target, "timeout": self._timeout},
        )
        started = time.monotonic()
        try:
            answer = await _unless_gone(request, self._transport.handle_async_request(onward))
        except httpx.TransportError as error:
            log.warning("the app behind the gate failed: %r", error, extra={"request_id": request.scope["request_id"]})
            raise UpstreamTimeout(self._seconds) if _is_late(error) else UpstreamFailed from error
        seconds = time.monotonic() - started
        if answer is None:
            return Response(status_code=CLIENT_GONE), seconds
        response = StreamingResponse(_stream(answer), answer.status_code)
        response.raw_headers = _kept(answer.headers.raw, _NOT_RETURNED) + extra
        return response, seconds

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    def _forwarded(self, request: Request) -> RawHeaders:
        headers = request.scope["headers"]
        client = request.scope.get("client")
        through = [value for name, value in headers if name == b"x-forwarded-for"]
        through += [client[0].encode()] if client else []
        added = {
            b"x-forwarded-for": b", ".join(through),
            b"x-forwarded-host": next((value for name, value in headers if name == b"host"), b""),
            b"x-forwarded-proto": request.scope["scheme"].encode(),
            b"x-request-id": request.scope["request_id"].encode(),
            b"authorization": self._authorization,
        }
        return _kept(headers, _NOT_FORWARDED) + [(name, value) for name, value in added.items() if value]


def _stays_below(path: bytes) -> bool:
    """Whether no reading of a path, however often it is decoded, leaves the folder it starts in."""
    for _ in range(MOST_DECODINGS):
        path = unquote_to_bytes(path)
    if unquote_to_bytes(path) != path:
        return False
    segments = (segment.partition(b";")[0] for segment in path.split(b"/"))  # some servers strip ;parameters first
    return (
        b"\\" not in path and min(path, default=33) > 31 and not any(segment in (b".", b"..") for segment in segments)
    )


def _is_visible(target: bytes) -> bool:
    return all(33 <= byte <= 126 for byte in target)


def _kept(headers: RawHeaders, dropped: frozenset[bytes]) -> RawHeaders:
    """Headers that travel from end to end, names in lower case; ours are never taken from outside.

    An app behind CGI or WSGI cannot tell `_` from `-` in a name, so neither do we.
    """
    lowered = [(name.lower(), value) for name, value in headers]
    named = b",".join(value for name, value in lowered if name == b"connection").lower()
    dropped |= {token.strip() for token in named.split(b",")}
    plain = ((name.replace(b"_", b"-"), name, value) for name, value in lowered)
    return [
        (name, value) for alias, name, value in plain if alias not in dropped and not alias.startswith(b"x-oodgate-")
    ]


def _is_late(error: httpx.TransportError) -> bool:
    return isinstance(error, httpx.TimeoutException)


async def _stream(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of the work; None, and the work is given up, where the client goes away before."""
    asked, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
        return asked.result() if asked.done() else None
    finally:
        for task in (asked, gone):
            task.cancel()
        await asyncio.gather(asked, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
