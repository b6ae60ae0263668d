# SPDX-License-Identifier: Apache-2.0
"""A realistic stream of images to a server: in-distribution and OOD, at a rate, in a mix that changes over time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from detector.errors import DataError
from detector.images import IMAGE_SUFFIXES

MEDIA_TYPES = dict(zip(IMAGE_SUFFIXES, ("image/jpeg", "image/jpeg", "image/png", "image/webp"), strict=True))
MOST_UNDER_WAY = 256
SLOWEST_S = 30.0
IDLE_S = 4.0  # the server closes after 5 s: no image must meet a connection that closes

Kind = Literal["id", "ood"]


@dataclass(frozen=True)
class Mix:
    """The share of OOD images over time: `0:0,60:0.2` is none for a minute and one in five from then on.

    Args:
        steps: (second from which it holds, share), the first at second 0.
    """

    steps: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Read `SECOND:SHARE,...`, or a share alone that holds from the start. Raises ValueError."""
        pairs = [part.split(":") if ":" in part else ["0", part] for part in text.split(",")]
        steps = tuple((float(second), float(share)) for second, share in pairs)
        seconds = [second for second, _ in steps]
        if seconds[0] != 0 or seconds != sorted(set(seconds)):
            raise ValueError("seconds must begin at 0 and rise")
        if not all(0 <= share <= 1 for _, share in steps):
            raise ValueError("shares must lie between 0 and 1")
        return cls(steps)

    def at(self, second: float) -> float:
        """The share of OOD images then."""
        return next(share for start, share in reversed(self.steps) if start <= second)


@dataclass(frozen=True)
class Sending:
    """One image of the stream and when it is due, in seconds from the start."""

    at: float
    path: Path
    kind: Kind


def images_below(folder: Path) -> list[Path]:
    """The images of a folder and its folders, in the order of their names. Raises DataError where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


def stream(
    id_images: Sequence[Path], ood_images: Sequence[Path], rate: float, share: Callable[[float], float], seed: int
) -> Iterator[Sending]:
    """An endless stream with exponential gaps; one seed, one stream.

    Args:
        rate: images a second, on average.
        share: of OOD images at a second, as `Mix.at`.
    """
    chance = random.Random(seed)
    at = 0.0
    while True:
        at += chance.expovariate(rate)
        is_ood = chance.random() < share(at)
        path = chance.choice(ood_images if is_ood else id_images)
        yield Sending(at, path, "ood" if is_ood else "id")


@dataclass
class Tally:
    """What came of the images of one stretch of time."""

    sent: int = 0
    decided: dict[Kind, int] = field(default_factory=lambda: {"id": 0, "ood": 0})
    deferred: dict[Kind, int] = field(default_factory=lambda: {"id": 0, "ood": 0})
    failures: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Images that got a verdict."""
        return sum(self.decided.values())

    def take(self, sending: Sending, decision: str | None, failure: str, seconds: float) -> None:
        """Count an answer: a decision, or the name of what went wrong."""
        if decision is None:
            self.failures[failure] = self.failures.get(failure, 0) + 1
            return
        self.seconds.append(seconds)
        self.decided[sending.kind] += 1
        self.deferred[sending.kind] += decision == "defer"

    def line(self) -> str:
        """All of it on one line."""
        shares = ", ".join(
            f"{self.deferred[kind]}/{self.decided[kind]} {kind.upper()}" for kind in ("id", "ood") if self.decided[kind]
        )
        failed = "".join(f", {count} {name}" for name, count in sorted(self.failures.items()))
        return f"{self.sent} sent, deferred {shares or 'none'}{failed}, {_latency(self.seconds)}"


def _latency(seconds: Sequence[float]) -> str:
    if not seconds:
        return "no answer"
    ordered = sorted(seconds)
    p50, p95 = (1000 * ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.95))
    return f"p50 {p50:.0f} ms, p95 {p95:.0f} ms"


class Replay:
    """Sends a stream when it is due, whether or not earlier answers have come: an open loop.

    Args:
        url: of the server, e.g. http://localhost:8000.
        token: bearer token; empty for an open server.
        model: name; empty for the default model.
        report: called with one line a second.
    """

    def __init__(
        self, url: str, token: str = "", model: str = "", report: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path = f"/v1/models/{model}/verdict" if model else "/v1/verdict"
        self.report = report
        self.total, self.second = Tally(), Tally()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(
            max_connections=MOST_UNDER_WAY, max_keepalive_connections=MOST_UNDER_WAY, keepalive_expiry=IDLE_S
        )
        self._client = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=SLOWEST_S)

    async def run(self, sendings: Iterator[Sending], seconds: float) -> Tally:
        """Send what is due within so many seconds; returns once all answers are there."""
        started = time.monotonic()
        async with self._client, asyncio.TaskGroup() as answers:
            ticker = asyncio.create_task(self._tick(started))
            try:
                for sending in sendings:
                    if sending.at > seconds:
                        break
                    await asyncio.sleep(started + sending.at - time.monotonic())
                    self._count_sent()
                    answers.create_task(self._send(sending, started + sending.at))
            finally:
                ticker.cancel()
        return self.total

    def _count_sent(self) -> None:
        self.total.sent += 1
        self.second.sent += 1

    async def _tick(self, started: float) -> None:
        while True:
            await asyncio.sleep(1)
            second, self.second = self.second, Tally()
            self.report(f"{time.monotonic() - started:5.0f} s  {second.line()}")

    async def _send(self, sending: Sending, due: float) -> None:
        headers = {"content-type": MEDIA_TYPES[sending.path.suffix.lower()]}
        decision, failure = None, ""
        try:
            answer = await self._client.post(self.path, content=sending.path.read_bytes(), headers=headers)
            decision = answer.json()["decision"] if answer.status_code == 200 else None
            failure = f"HTTP {answer.status_code}"
        except httpx.TransportError as error:
            failure = type(error).__name__
        for tally in (self.total, self.second):
            tally.take(sending, decision, failure, time.monotonic() - due)
