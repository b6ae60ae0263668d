# SPDX-License-Identifier: Apache-2.0
"""One thread for explanations, so that they never hold up verdicts, and a bound on how many wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from detector.machine import own_threads
from service.errors import QueueFull

T = TypeVar("T")
MOST = 4  # explanations under way at once: what a few people at the console need


class Explainer:
    """Runs explanations one after another; made and called on the event loop.

    Args:
        threads: of torch; a new thread would take the number that another has set for its scores just then.
    """

    def __init__(self, threads: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explain", initializer=own_threads, initargs=(threads,))
        self._places = threading.Semaphore(MOST)

    async def run(self, work: Callable[[], T]) -> T:
        """Do work on the thread. Raises QueueFull where as many as allowed are under way."""
        if not self._places.acquire(blocking=False):
            raise QueueFull(MOST, 1)
        running = self._thread.submit(work)
        running.add_done_callback(lambda _: self._places.release())  # even where its caller has gone
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Finish what runs and drop what waits."""
        self._thread.shutdown(cancel_futures=True)
