# SPDX-License-Identifier: Apache-2.0
"""The one long-lived inference thread, and the bounded queue in front of it.

Batching is by back-pressure: the next batch is whatever waits when the device frees, never a timer. The event loop
admits, the thread computes, and results go back to the loop in one call a batch.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from detector.detector import Detector
from detector.images import Pixels
from detector.policy import Decider, Verdict
from service.errors import DeadlinePassed, EngineLost, NotReady, QueueFull, ScoringFailed

log = logging.getLogger(__name__)

PULSE_S = 1.0  # the idle thread shows life this often
CLOSING_PULSE_S = 0.02  # and looks this often whether the last admitted image has been answered


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model as the engine runs it: its detector, and the decider now in force."""

    detector: Detector
    decider: Decider


@dataclass(frozen=True)
class Timing:
    """Seconds that one image spent in the queue, and that its batch spent in the network and in the scores."""

    queue: float
    forward: float
    score: float


@dataclass(frozen=True)
class Answer:
    """A verdict and where its time went."""

    verdict: Verdict
    timing: Timing


@dataclass(eq=False)
class _Work:
    model: ServedModel
    image: Pixels
    future: asyncio.Future[Answer]
    enqueued: float
    deadline: float


BatchDone = Callable[[ServedModel, Sequence[Answer]], None]


class Engine:
    """Admission, queue and inference thread; made and called on the event loop.

    Args:
        max_batch: images in one forward pass.
        capacity: images admitted at once, from decode to answer.
        timeout_s: seconds after which an image is given up; it counts from admission.
        stall_s: seconds in one batch after which `alive` is false.
        on_batch: told, on the event loop, of each batch of answers.
    """

    def __init__(
        self, *, max_batch: int, capacity: int, timeout_s: float, stall_s: float, on_batch: BatchDone | None = None
    ) -> None:
        self.max_batch, self.capacity, self.timeout_s, self.stall_s = max_batch, capacity, timeout_s, stall_s
        self._on_batch = on_batch
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = False  # set under the lock: from then on nobody would answer
        self._admitted = 0
        self._image_seconds = 0.01  # a running estimate of the time one image takes, for Retry-After
        self._last_pulse = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Images admitted and not yet answered."""
        return self._admitted

    @property
    def pulse_age_s(self) -> float:
        """Seconds since the inference thread last showed life."""
        return time.monotonic() - self._last_pulse

    @property
    def alive(self) -> bool:
        """Whether the inference thread runs and is not stuck in a batch."""
        return not self._ended and self.pulse_age_s < self.stall_s

    @property
    def accepting(self) -> bool:
        """Whether `admit` lets anything in, the queue aside."""
        return not self._ended and not self._closing

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Take room for images before they are decoded, and give it back.

        Raises:
            QueueFull: there is no room.
            NotReady: the engine is closing.
            EngineLost: the inference thread has ended.
        """
        if self._closing:
            raise NotReady("the server is stopping. Try another replica.")
        if self._ended:
            raise EngineLost
        if self._admitted + images > self.capacity:
            raise QueueFull(self.capacity, max(1, ceil(self._admitted * self._image_seconds)))
        self._admitted += images
        try:
            yield
        finally:
            self._admitted -= images

    async def judge(self, model: ServedModel, image: Pixels, deadline: float) -> Answer:
        """Queue one admitted image and wait for its answer.

        Args:
            model: what to judge it with.
            image: uint8 [H, W, 3], the model's input.
            deadline: on the clock of time.monotonic().

        Raises:
            DeadlinePassed, ScoringFailed, EngineLost
        """
        work = _Work(model, image, self._loop.create_future(), time.monotonic(), deadline)
        with self._changed:
            if self._ended:
                raise EngineLost
            self._waiting.append(work)
            self._changed.notify()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await work.future
        except TimeoutError:
            raise DeadlinePassed(self.timeout_s) from None

    async def close(self, grace_s: float) -> None:
        """Let nothing more in, answer what was admitted, end the thread; give up after `grace_s` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, grace_s)
        if self._thread.is_alive():
            log.error("gave up waiting for the inference thread", extra={"admitted": self._admitted})

    def _run(self) -> None:
        batch: list[_Work] | None = None
        try:
            while (batch := self._next_batch()) is not None:
                self._process(batch)
        except BaseException:  # the thread ends: say so, and leave nobody waiting
            log.critical("the inference thread has ended", exc_info=True)
        finally:
            with self._changed:
                self._ended = True
                left = [*(batch or ()), *self._waiting]
                self._waiting.clear()
            self._fail(left, EngineLost())

    def _next_batch(self) -> list[_Work] | None:
        with self._changed:
            # Images that were admitted and are still being decoded are waited for too.
            while not self._waiting and not (self._closing and self._admitted == 0):
                self._changed.wait(CLOSING_PULSE_S if self._closing else PULSE_S)
                self._last_pulse = time.monotonic()
            if not self._waiting:
                return None
            model = self._waiting[0].model
            batch: list[_Work] = []
            while self._waiting and len(batch) < self.max_batch and self._waiting[0].model is model:
                batch.append(self._waiting.popleft())
        self._last_pulse = time.monotonic()
        return batch

    def _process(self, batch: list[_Work]) -> None:
        started = time.monotonic()
        self._fail([work for work in batch if work.deadline <= started], DeadlinePassed(self.timeout_s))
        # A future that is done belongs to a caller who has gone.
        batch = [work for work in batch if work.deadline > started and not work.future.done()]
        if not batch:
            return
        try:
            model = batch[0].model
            images = torch.from_numpy(np.stack([work.image for work in batch]))
            outputs = model.detector.backbone.outputs(images)
            forwarded = time.monotonic()
            verdicts = model.detector.judge(outputs, model.decider)
            scored = time.monotonic()
        except Exception as error:
            log.exception("a batch failed", extra={"images": len(batch)})
            self._fail(batch, ScoringFailed(f"the image could not be scored: {error}"))
            return
        answers = [
            Answer(verdict, Timing(started - work.enqueued, forwarded - started, scored - forwarded))
            for work, verdict in zip(batch, verdicts, strict=True)
        ]
        self._image_seconds += 0.1 * ((scored - started) / len(batch) - self._image_seconds)
        self._post(lambda: self._deliver(batch, answers))

    def _deliver(self, batch: Sequence[_Work], answers: Sequence[Answer]) -> None:
        for work, answer in zip(batch, answers, strict=True):
            if not work.future.done():
                work.future.set_result(answer)
        if self._on_batch is not None:
            self._on_batch(batch[0].model, answers)

    def _fail(self, batch: Sequence[_Work], error: ScoringFailed | DeadlinePassed | EngineLost) -> None:
        def deliver() -> None:
            for work in batch:
                if not work.future.done():
                    work.future.set_exception(error)

        if batch:
            self._post(deliver)

    def _post(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.warning("an answer came after the event loop had closed")
