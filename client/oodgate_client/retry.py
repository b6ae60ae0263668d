# SPDX-License-Identifier: Apache-2.0
"""When to ask again, and after how long."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from oodgate_client.errors import DeadlinePassed, Unanswered


@dataclass(frozen=True)
class Retry:
    """How long to try. Only broken connections, 429 and 503 are tried again.

    The wait before attempt k + 1 is what the server's `Retry-After` asks for, and on top of it a random part of
    min(cap_s, first_s x 2^(k-1)), so that many clients do not come back at once.

    Args:
        attempts: requests sent at most; 1 never tries again.
        deadline_s: seconds for all attempts and waits together. No wait begins that would end after it.
        first_s, cap_s: seconds; the back-off of the first wait, and of the longest.
    """

    attempts: int = 4
    deadline_s: float = 30.0
    first_s: float = 0.1
    cap_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.deadline_s, self.first_s, self.cap_s) <= 0:
            raise ValueError("Retry takes at least one attempt, and seconds above 0")


class Attempts:
    """The attempts of one request, against its deadline."""

    def __init__(self, retry: Retry) -> None:
        self.retry, self.made = retry, 0
        self.ends = time.monotonic() + retry.deadline_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; DeadlinePassed where there are none."""
        left = self.ends - time.monotonic()
        if left <= 0:
            seconds = self.retry.deadline_s
            raise DeadlinePassed(f"no answer within {seconds:g} s; see Retry.deadline_s", "client_deadline_passed")
        return left

    def wait_after(self, error: Unanswered) -> float:
        """Seconds to wait before the next attempt; raises the error where there is to be none."""
        self.made += 1
        backoff = min(self.retry.cap_s, self.retry.first_s * 2.0 ** (self.made - 1))
        wait = (error.retry_after_s or 0.0) + random.uniform(0, backoff)
        if not error.retried or self.made >= self.retry.attempts or wait >= self.ends - time.monotonic():
            raise error
        return wait
