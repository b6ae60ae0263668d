# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 by hand, for clients that leave, dawdle and speak out of turn, and for load that costs little to make."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit

PATIENCE_S = 120.0  # no answer within this is an answer lost


@dataclass(frozen=True)
class Reply:
    """An answer: its status, its headers in lower case, its body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(path: str, body: bytes | None = None, request_id: str = "", *, kind: str = "image/png") -> bytes:
    """A GET, or the POST of a body, as it is sent."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: here"]
    if request_id:
        lines.append(f"x-request-id: {request_id}")
    if body is not None:
        lines += [f"content-type: {kind}", f"content-length: {len(body)}"]
    return "\r\n".join((*lines, "", "")).encode() + (body or b"")


class Connection:
    """One connection, kept alive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Self:
        address = urlsplit(url)
        return cls(*await asyncio.open_connection(address.hostname, address.port))

    async def ask(self, path: str, body: bytes | None = None, request_id: str = "", **more: str) -> Reply:
        """Send a request and wait for its answer."""
        await self.send(request(path, body, request_id, **more))
        return await self.reply()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def reply(self) -> Reply:
        """The next answer. Raises IncompleteReadError where the server closed instead, TimeoutError where it forgot."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = headers.get("content-length")  # else in chunks
            body = await self._chunks() if length is None else await self._reader.readexactly(int(length))
        return Reply(int(first.split()[1]), headers, body)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self._reader.readline(), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()
        return body

    async def closed_by_server(self) -> None:
        """Wait until the server ends the connection."""
        async with asyncio.timeout(PATIENCE_S):
            while await self._reader.read(65536):
                pass

    def finish_sending(self) -> None:
        """Close this side alone."""
        self._writer.write_eof()

    def vanish(self) -> None:
        """Be gone, whatever is under way."""
        self._writer.transport.abort()


class Caller(asyncio.Protocol):
    """A connection for one request after another at the least cost: it reads statuses, no bodies."""

    def __init__(self) -> None:
        self.open = True
        self._received = b""
        self._answer: asyncio.Future[tuple[int, bool]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._end(0, told=False)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]):
            return
        self._received = b""
        self._end(int(head[9:12]), told=b"retry-after" in head)

    async def ask(self, data: bytes) -> tuple[int, bool]:
        """Send a request: the status of its answer, or 0 where there is none, and whether it has Retry-After."""
        if not self.open:
            return 0, False
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return await self._answer

    def vanish(self) -> None:
        self._transport.abort()

    def _end(self, status: int, *, told: bool) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((status, told))


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    connection = await Connection.open(url)
    try:
        yield connection
    finally:
        connection.vanish()


async def metric(connection: Connection, name: str) -> float:
    """The value of a series without labels."""
    text = (await connection.ask("/metrics")).body.decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


async def at_rest(url: str) -> bool:
    """Whether the server comes to have nothing under way; a request a turn is the wait."""
    async with asyncio.timeout(PATIENCE_S), connected(url) as connection:
        while (
            await metric(connection, "oodgate_queue_depth")
            or await metric(connection, "oodgate_requests_in_progress") > 1
        ):
            pass
    return True


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
