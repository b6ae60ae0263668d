# SPDX-License-Identifier: Apache-2.0
"""What callers do to a server, in any size: `make test` runs little of it and counts, `make soak` much and measures.

Each function drives a server at `url` and returns what it saw; none judges.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.faults.wire import Caller, Connection, Reply, at_rest, connected, request
from tests.helpers import GOOD, encoded, photo, toy_images

VERDICT, LIVE = "/v1/verdict", "/v2/health/live"
LARGE_JPEG = encoded(photo(4000, 3000), "JPEG")
SMALL = [encoded(image) for image in toy_images(16, seed=70)[0]]

MOST_CALLERS = 1000  # at once in an open loop; whoever comes then is late, and said to be

Work = Callable[[Connection, int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of an open loop: its status (0: no answer), by how many seconds it was sent late, how many more it
    took, and whether its answer has Retry-After."""

    status: int
    late_s: float
    took_s: float
    told: bool


class Gone(Exception):
    """The connection is of no more use."""


async def by_many(url: str, connections: int, count: int, work: Work) -> None:
    """Do work number 0 to count - 1 on that many connections; a connection that was given up is replaced."""
    numbers = iter(range(count))

    async def worker() -> None:
        connection = await Connection.open(url)
        for number in numbers:
            try:
                await work(connection, number)
            except Gone:
                connection.vanish()
                connection = await Connection.open(url)
        connection.vanish()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(worker())


async def decoding(url: str, images: int) -> tuple[Counter[int], list[tuple[int, float]]]:
    """Post large JPEGs at once and probe liveness meanwhile: their statuses, and status and seconds of the probes."""
    probes: list[tuple[int, float]] = []
    statuses: Counter[int] = Counter()

    async def post() -> None:
        async with connected(url) as connection:
            statuses[(await connection.ask(VERDICT, LARGE_JPEG, kind="image/jpeg")).status] += 1

    async def probe() -> None:
        async with connected(url) as connection:
            while sum(statuses.values()) < images:
                asked = time.monotonic()
                probes.append(((await connection.ask(LIVE)).status, time.monotonic() - asked))

    async with asyncio.TaskGroup() as group:
        group.create_task(probe())
        for _ in range(images):
            group.create_task(post())
    return statuses, probes


async def vanishing(url: str, requests: int, share: float = 0.3, connections: int = 48) -> Counter[str]:
    """Callers of whom a share leaves half-way through the upload or while waiting.

    Counts `answered` (once, with the answer to its own image), `left`, and whatever else came to pass.
    """
    generator = random.Random(0)
    leaves = [generator.choice(("upload", "queue")) if generator.random() < share else "" for _ in range(requests)]
    seen: Counter[str] = Counter()
    async with connected(url) as connection:
        alone = [(await connection.ask(VERDICT, body)).json for body in SMALL]

    async def work(connection: Connection, number: int) -> None:
        which, request_id = number % len(SMALL), f"v-{number}"
        data = request(VERDICT, SMALL[which], request_id)
        await connection.send(data[: len(data) // 2 if leaves[number] == "upload" else None])
        if leaves[number]:
            seen["left"] += 1
            raise Gone
        answer = await connection.reply()
        mine = answer.headers["x-request-id"] == request_id and answer.status == 200
        same = mine and all(answer.json[part] == alone[which][part] for part in ("decision", "reason"))
        seen["answered" if same else f"{answer.status}, not its own"] += 1

    await by_many(url, connections, requests, work)
    await at_rest(url)
    return seen


async def slow_bodies(url: str, slow: int) -> tuple[Counter[int], Counter[int]]:
    """Callers who never finish their body, beside others: statuses of the slow ones, and of the others meanwhile."""
    dawdling, others = Counter[int](), Counter[int]()
    cut = request(VERDICT, GOOD)[:-1]

    async def dawdle(connection: Connection) -> None:
        dawdling[(await connection.reply()).status] += 1

    connections = [await Connection.open(url) for _ in range(slow)]
    for connection in connections:
        await connection.send(cut)
    async with asyncio.TaskGroup() as group, connected(url) as other:
        for connection in connections:
            group.create_task(dawdle(connection))
        while not dawdling:
            others[(await other.ask(VERDICT, GOOD)).status] += 1
    for connection in connections:
        connection.vanish()
    return dawdling, others


async def half_closed(url: str, count: int) -> Counter[str]:
    """Callers who close their side behind a whole request, or in the middle of one: how each connection ended."""
    ends: Counter[str] = Counter()
    whole = request(VERDICT, GOOD)

    async def close_half(data: bytes) -> None:
        async with connected(url) as connection:
            await connection.send(data)
            connection.finish_sending()
            try:
                ends[str((await connection.reply()).status)] += 1
            except (asyncio.IncompleteReadError, ConnectionResetError):
                ends["closed"] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(close_half(whole if number % 2 else whole[:-1]))
    await at_rest(url)
    return ends


async def pipelined(url: str, requests: int) -> list[tuple[int, str]]:
    """Requests sent in one piece without waiting: status and request id of each answer, in order."""
    kinds = itertools.cycle((SMALL[0], None, b"no image"))
    data = [
        request(VERDICT if body is not None else LIVE, body, f"p-{number}")
        for number, body in zip(range(requests), kinds, strict=False)
    ]
    async with connected(url) as connection:
        sending = asyncio.create_task(connection.send(b"".join(data)))
        answers = [await connection.reply() for _ in range(requests)]
        await sending
    return [(answer.status, answer.headers["x-request-id"]) for answer in answers]


async def idle(url: str, connections: int, *, until_closed: bool) -> Counter[int]:
    """Connections that ask once and then keep still, beside one who works: statuses of the one who works."""
    opened: list[Connection] = []
    gate = asyncio.Semaphore(64)  # a listener's backlog is finite

    async def open_one() -> None:
        async with gate:
            connection = await Connection.open(url)
            assert (await connection.ask(LIVE)).status == 200
        opened.append(connection)

    statuses: Counter[int] = Counter()
    async with connected(url) as working:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(open_one())
            while len(opened) < connections:
                statuses[(await working.ask(VERDICT, GOOD)).status] += 1
        if until_closed:
            await asyncio.gather(*(connection.closed_by_server() for connection in opened))
    for connection in opened:
        connection.vanish()
    return statuses


async def crowd(
    url: str, connections: int, requests: int, bodies: Sequence[bytes] = SMALL, kind: str = "image/png"
) -> list[tuple[Reply, float]]:
    """Callers who each ask again at once: every answer, and the seconds it took."""
    answers: list[tuple[Reply, float]] = []

    async def work(connection: Connection, number: int) -> None:
        asked = time.monotonic()
        answer = await connection.ask(VERDICT, bodies[number % len(bodies)], kind=kind)
        answers.append((answer, time.monotonic() - asked))

    await by_many(url, connections, requests, work)
    await at_rest(url)
    return answers


async def arrivals(url: str, requests: Sequence[bytes], rate: float, seconds: float) -> list[Arrival]:
    """An open loop: requests, as they are sent, arrive at their times, however many are under way."""
    host, _, port = urlsplit(url).netloc.partition(":")
    loop = asyncio.get_running_loop()
    idle_callers: list[Caller] = []
    answers: list[Arrival] = []
    opened = 0

    async def one(due: float, data: bytes) -> None:
        nonlocal opened
        caller, sent, (status, told) = idle_callers.pop() if idle_callers else None, time.monotonic(), (0, False)
        if caller is not None:
            status, told = await caller.ask(data)
        if not status:  # a connection idle for longer than the server keeps it, as every client must expect, or none
            opened += caller is None
            _, caller = await loop.create_connection(Caller, host, int(port))
            status, told = await caller.ask(data)
        answered = time.monotonic()
        answers.append(Arrival(status, sent - due, answered - sent, told))
        if caller is not None and caller.open:
            idle_callers.append(caller)
        else:
            opened -= 1

    started, number, count = time.monotonic(), 0, round(rate * seconds)
    async with asyncio.TaskGroup() as group:
        while number < count:
            due = started + number / rate
            if (early := due - time.monotonic()) > 0 or opened - len(idle_callers) >= MOST_CALLERS:
                await asyncio.sleep(max(0.0, early))
                continue
            group.create_task(one(due, requests[number % len(requests)]))
            number += 1
    for caller in idle_callers:
        caller.vanish()
    return answers
