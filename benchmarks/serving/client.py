# SPDX-License-Identifier: Apache-2.0
"""A small HTTP client on uvloop, light beside all but the servers of a null model: open-loop arrivals, counted
requests, and bursts.

    python -m benchmarks.serving.client --url URL --content-type TYPE --bodies LIST open --rate R --seconds S --seed N

It runs in a process of its own and prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

MOST_CONNECTIONS, DRAIN_S = 2048, 120.0


class Connection(asyncio.Protocol):
    """A kept-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[int] | None = None
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self._received += data
        status = finished(self._received)
        if status and self._answer is not None and not self._answer.done():
            self._received.clear()
            self._answer.set_result(status)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(0)

    @property
    def usable(self) -> bool:
        return self._transport is not None

    async def post(self, request: bytes) -> int:
        """The status of the answer; 0 where the connection was lost."""
        if self._transport is None:
            return 0
        self._received.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def finished(received: bytearray) -> int:
    """The status of an HTTP/1.1 answer that has wholly arrived, else 0."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return 0
    head = bytes(received[:end]).lower()
    status = int(head.split(b" ", 2)[1])
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return status if len(received) - end - 4 >= int(value) else 0
        if name == b"transfer-encoding":
            return status if received.endswith(b"0\r\n\r\n") else 0
    return status


class Client:
    """Connections to one server, and the requests that are posted in turn."""

    def __init__(self, url: str, content_type: str, bodies: Sequence[Path]) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\n"
        contents = [body.read_bytes() for body in bodies]
        self.requests = [f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content for content in contents]
        self._free: list[Connection] = []
        self._turn = self._open = 0
        self.unsent = 0  # for want of a connection

    async def connected(self) -> Connection | None:
        """A connection that nobody uses; None where there are too many."""
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                return connection
            self._open -= 1
        if self._open >= MOST_CONNECTIONS:
            self.unsent += 1
            return None
        self._open += 1
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self.host, self.port)
        return connection

    async def ask(self, intended: float) -> float | None:
        """Seconds from the intended instant to the end of a good answer; None where it failed."""
        try:
            connection = await self.connected()
        except OSError:
            self._open -= 1
            return None
        if connection is None:
            return None
        self._turn = (self._turn + 1) % len(self.requests)
        status = await connection.post(self.requests[self._turn])
        latency = time.perf_counter() - intended
        self._free.append(connection)
        return latency if status == 200 else None

    def close(self) -> None:
        """Close the connections that nobody uses."""
        for connection in self._free:
            connection.close()


async def open_loop(client: Client, rate: float, seconds: float, seed: int) -> dict[str, float]:
    """Requests at Poisson instants fixed beforehand, whether or not earlier ones have been answered."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 20)
    instants = np.cumsum(gaps)
    instants = instants[instants < seconds]
    loop, started, tasks = asyncio.get_running_loop(), time.perf_counter(), []
    for instant in instants:
        intended = started + float(instant)
        await asyncio.sleep(max(0.0, intended - time.perf_counter()))
        tasks.append(loop.create_task(client.ask(intended)))
    done, left = await asyncio.wait(tasks, timeout=DRAIN_S)
    for task in left:
        task.cancel()
    latencies = [latency for task in done if (latency := task.result()) is not None]
    failed = len(tasks) - len(latencies)
    counts = {"rate": rate, "sent": len(tasks), "failed": failed, "unsent": client.unsent}
    return counts | percentiles([*latencies, *[float("inf")] * failed])


async def count(client: Client, connections: int, requests: int) -> dict[str, float]:
    """A closed loop that ends when so many requests have been answered, with no work left on the server."""
    left, answered, started = requests, 0, time.perf_counter()

    async def one_after_another() -> None:
        nonlocal left, answered
        while left > 0:
            left -= 1
            latency = await client.ask(time.perf_counter())
            answered += latency is not None

    await asyncio.gather(*(one_after_another() for _ in range(connections)))
    return {"answered": answered, "failed": requests - answered, "seconds": time.perf_counter() - started}


async def burst(client: Client, connections: int, requests: int, singles: int) -> dict[str, list[float]]:
    """Singles one after another, then a burst of so many requests on each connection, then singles again."""

    async def one_by_one(count: int) -> list[float]:
        latencies = [await client.ask(time.perf_counter()) for _ in range(count)]
        return [1e3 * latency for latency in latencies if latency is not None]

    before = await one_by_one(singles)
    await asyncio.gather(*(one_by_one(requests) for _ in range(connections)))
    return {"before_ms": before, "after_ms": await one_by_one(singles)}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50_ms, p90_ms, p99_ms and max_ms; what failed took for ever."""
    found = np.percentile(seconds, (50, 90, 99, 100), method="higher")
    names = ("p50_ms", "p90_ms", "p99_ms", "max_ms")
    return {name: 1e3 * float(value) for name, value in zip(names, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--content-type", required=True)
    parser.add_argument("--bodies", type=Path, required=True, help="A file that lists the body files, one a line.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    arrivals = kinds.add_parser("open")
    arrivals.add_argument("--rate", type=float, required=True)
    arrivals.add_argument("--seconds", type=float, required=True)
    arrivals.add_argument("--seed", type=int, default=0)
    counts = kinds.add_parser("count")
    for name in ("connections", "requests"):
        counts.add_argument(f"--{name}", type=int, required=True)
    bursts = kinds.add_parser("burst")
    for name in ("connections", "requests", "singles"):
        bursts.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    bodies = [Path(line) for line in args.bodies.read_text().splitlines()]

    async def run() -> object:
        client = Client(args.url, args.content_type, bodies)
        if args.kind == "open":
            return await open_loop(client, args.rate, args.seconds, args.seed)
        if args.kind == "count":
            return await count(client, args.connections, args.requests)
        return await burst(client, args.connections, args.requests, args.singles)

    print(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
