# SPDX-License-Identifier: Apache-2.0
"""When the client asks again, and how long it waits. No test really waits: the sleep is recorded."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from oodgate_client import (
    AsyncClient,
    Client,
    DeadlinePassed,
    OodgateError,
    Overloaded,
    Retry,
    Unavailable,
    Unreachable,
)
from tests.client.conftest import VERDICT, Scripted, problem
from tests.helpers import GOOD

OK: Any = (200, {}, VERDICT)
FULL: Any = (429, {}, problem(429, "queue_full"))


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jitter at its largest."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)


def asked_to_wait(status: int, value: str) -> Any:
    return (status, {"Retry-After": value}, problem(status, "later"))


def test_the_wait_is_what_the_server_asks_for_and_a_little_more(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [asked_to_wait(429, "7"), asked_to_wait(503, "3"), OK]
    assert Client(scripted.url, sleep=waits.append).verdict(GOOD).accepted
    assert 7 <= waits[0] <= 7.1
    assert 3 <= waits[1] <= 3.2
    assert [body for _, _, body in scripted.seen] == [GOOD] * 3


def test_a_date_is_honoured_too(scripted: Scripted, waits: list[float]) -> None:
    later = datetime.now(UTC) + timedelta(seconds=20)
    scripted.script = [asked_to_wait(503, format_datetime(later, usegmt=True)), OK]
    Client(scripted.url, sleep=waits.append).verdict(GOOD)
    assert 15 <= waits[0] <= 20.1


def test_a_retry_after_that_is_neither_costs_nothing(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [asked_to_wait(503, "soon"), OK]
    Client(scripted.url, sleep=waits.append).verdict(GOOD)
    assert 0 <= waits[0] <= 0.1


@pytest.mark.usefixtures("longest")
def test_the_back_off_doubles_up_to_its_cap(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [FULL] * 5
    with pytest.raises(Overloaded):
        Client(scripted.url, retry=Retry(attempts=5, first_s=0.1, cap_s=0.5), sleep=waits.append).verdict(GOOD)
    assert waits == [0.1, 0.2, 0.4, 0.5]


def test_the_jitter_spreads_the_waits(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [FULL] * 20
    with pytest.raises(Overloaded):
        Client(scripted.url, retry=Retry(attempts=20, first_s=1, cap_s=1), sleep=waits.append).verdict(GOOD)
    assert len({round(wait, 6) for wait in waits}) == 19
    assert max(waits) <= 1


def test_a_wait_that_would_end_after_the_deadline_is_not_begun(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [asked_to_wait(503, "60")]
    with pytest.raises(Unavailable) as raised:
        Client(scripted.url, retry=Retry(deadline_s=30), sleep=waits.append).verdict(GOOD)
    assert raised.value.retry_after_s == 60
    assert waits == []


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 500, 502, 504])
def test_other_answers_are_never_asked_for_twice(scripted: Scripted, waits: list[float], status: int) -> None:
    scripted.script = [asked_to_wait(status, "1")]
    with pytest.raises(OodgateError):
        Client(scripted.url, sleep=waits.append).verdict(GOOD)
    assert (len(scripted.seen), waits) == (1, [])


def test_a_broken_connection_is_tried_again(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [Scripted.DROP, OK]
    assert Client(scripted.url, sleep=waits.append).verdict(GOOD).accepted
    assert len(waits) == 1


def test_connections_that_keep_breaking_are_given_up(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [Scripted.DROP] * 3
    with pytest.raises(Unreachable):
        Client(scripted.url, retry=Retry(attempts=3), sleep=waits.append).verdict(GOOD)
    assert len(scripted.seen) == 3


@pytest.mark.parametrize("limits", [{"timeout_s": 0.05}, {"retry": Retry(deadline_s=0.05)}])
def test_a_server_that_never_answers_is_left(scripted: Scripted, waits: list[float], limits: dict[str, Any]) -> None:
    scripted.script = [Scripted.HANG]
    with pytest.raises(DeadlinePassed):
        Client(scripted.url, sleep=waits.append, **limits).verdict(GOOD)
    assert waits == []


def test_the_async_client_waits_the_same(scripted: Scripted, waits: list[float]) -> None:
    scripted.script = [asked_to_wait(429, "7"), Scripted.DROP, OK]

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def ask() -> bool:
        async with AsyncClient(scripted.url, sleep=sleep) as client:
            return (await client.verdict(GOOD)).accepted

    assert asyncio.run(ask())
    assert 7 <= waits[0] <= 7.1
    assert len(waits) == 2


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"deadline_s": 0}, {"first_s": -1}, {"cap_s": 0}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attempt"):
        Retry(**wrong)
