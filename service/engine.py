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
from weakref import WeakKeyDictionary

import numpy as np
import torch

from detector.detector import Scored
from detector.errors import NonFiniteFeatures
from detector.images import Pixels
from detector.machine import own_threads
from service.errors import DeadlinePassed, EngineLost, NotReady, QueueFull, ScoringFailed
from service.served import Answer, ServedModel, Timing, buckets, padded, warm_up

log = logging.getLogger(__name__)

PULSE_S = 1.0  # the idle thread shows life this often
CLOSING_PULSE_S = 0.02  # and looks this often whether the last admitted image has been answered
MOST_FAILURES = 3  # failed batches in a row after which the server is not ready
MOST_RESTARTS, RESTART_WINDOW_S = 3, 600.0  # restarts of the loop; one more within the window ends it


@dataclass(eq=False, slots=True)
class _Work:
    model: ServedModel
    image: Pixels
    future: asyncio.Future[Answer]
    enqueued: float
    deadline: float


@dataclass(eq=False, slots=True)
class _Launched:
    """A batch on the device."""

    model: ServedModel
    work: list[_Work]
    scored: Scored
    started: float
    forwarded: float


BatchDone = Callable[[ServedModel, Sequence[Answer]], None]


class Engine:
    """Admission, queue and inference thread; made and called on the event loop.

    A batch is as large as a bucket. On the CPU, where time goes with the images, the largest bucket that is full is
    run and the rest is the next batch; on CUDA, where a launch costs more than some images, the batch is padded.

    Args:
        max_batch: images in one forward pass.
        capacity: images admitted at once, from decode to answer.
        timeout_s: seconds after which an image is given up, for the message that says so.
        stall_s: seconds in one batch after which `alive` is false.
        window_s: seconds, from the arrival of the first image, to wait for a fuller batch while the device is idle.
        threads: of torch on the inference thread; as many as it would have by itself where None.
        on_batch: told, on the event loop, of each batch of answers.
        on_restart: told, on the event loop, when the inference loop was lost and begins again.
        in_place_of: what is served now in the place of a model that failed, and is tried while no image comes; None
            where nothing is.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        capacity: int,
        timeout_s: float,
        stall_s: float,
        window_s: float = 0.0,
        threads: int | None = None,
        on_batch: BatchDone | None = None,
        on_restart: Callable[[], None] | None = None,
        in_place_of: Callable[[ServedModel], ServedModel | None] = lambda model: model,
    ) -> None:
        self.capacity, self.timeout_s, self.stall_s, self.window_s = capacity, timeout_s, stall_s, window_s
        self.buckets = buckets(max_batch)
        self._threads = threads
        self._on_batch, self._on_restart, self._in_place_of = on_batch, on_restart, in_place_of
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = False  # set under the lock: from then on nobody would answer
        self._admitted = 0
        self._failures = 0  # batches in a row
        self._failing: ServedModel | None = None
        self._running: _Launched | None = None  # the batch on a device that works on its own
        self._in_hand: list[_Work] = []  # the last images taken from the queue; the thread's own
        self._shadow_shares: WeakKeyDictionary[ServedModel, float] = WeakKeyDictionary()
        self._image_seconds = 0.01  # running estimates of the time one image takes, of any model and of each
        self._seconds_of: WeakKeyDictionary[ServedModel, float] = WeakKeyDictionary()
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

    @property
    def healthy(self) -> bool:
        """Whether batches succeed; false after several in a row that failed whole, until one succeeds."""
        return self._failures < MOST_FAILURES

    def check_room(self, images: int) -> None:
        """Refuse what could not be admitted now.

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

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Take room for images before they are decoded, and give it back; raises as `check_room`."""
        self.check_room(images)
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
        now = time.monotonic()
        work = _Work(model, image, self._loop.create_future(), now, deadline)
        with self._changed:
            if self._ended:
                raise EngineLost
            self._waiting.append(work)
            self._changed.notify()
        timer = self._loop.call_later(max(0.0, deadline - now), self._expire, work)
        try:
            return await work.future
        finally:
            timer.cancel()

    async def close(self, grace_s: float) -> None:
        """Let nothing more in, answer what was admitted, end the thread; give up after `grace_s` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, grace_s)
        if self._thread.is_alive():
            log.error("gave up waiting for the inference thread", extra={"admitted": self._admitted})

    # What follows runs on the inference thread.

    def _run(self) -> None:
        lost: deque[float] = deque(maxlen=MOST_RESTARTS)
        try:
            while True:
                try:
                    if self._threads is not None:  # again after a loop that was lost in the middle of a forward
                        own_threads(self._threads)
                    self._serve()
                    return
                except BaseException:  # nothing may end the loop while its budget lasts
                    log.critical("the inference loop was lost", exc_info=True, extra={"images": len(self._in_hand)})
                    self._fail(self._in_hand, EngineLost())  # those that have their answer keep it
                    self._in_hand, self._running = [], None
                    if len(lost) == MOST_RESTARTS and time.monotonic() - lost[0] < RESTART_WINDOW_S:
                        with self._changed:
                            self._ended = True  # before it is told
                        log.critical("too many restarts: the inference thread ends")
                        return
                    lost.append(time.monotonic())
                    if self._on_restart is not None:
                        self._post(self._on_restart)
        finally:
            with self._changed:
                self._ended = True
                left = [*self._in_hand, *self._waiting]
                self._waiting.clear()
            self._fail(left, EngineLost())

    def _serve(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Run one batch, or do what is to be done without one; whether another may come."""
        batch = self._next_batch()
        if batch is None:
            return False
        launched = self._launch(batch) if batch else None
        if self._running is not None:
            self._finish(self._running)
        # A device that works on its own gets its next batch before this one is fetched.
        pending = launched is not None and launched.model.detector.asynchronous
        self._running = launched if pending else None
        if launched is not None and not pending:
            self._finish(launched)
        # While idle it holds no image, and no model that may be served no more.
        self._in_hand = self._running.work if self._running is not None else []
        if not batch and not self.healthy:
            self._probe()
        return True

    def _next_batch(self) -> list[_Work] | None:
        """What is run next: empty where there is something else to do, None where nothing will ever come."""
        with self._changed:
            # Images that were admitted and are still being decoded are waited for too.
            while not self._waiting and self._running is None:
                if self._closing and self._admitted == 0:
                    return None
                self._changed.wait(CLOSING_PULSE_S if self._closing else PULSE_S)
                self._last_pulse = time.monotonic()
                if not self.healthy:
                    break
            if not self._waiting:
                return []
            if self.window_s and self._running is None:
                self._wait_for_more(self._waiting[0].enqueued + self.window_s)
            batch = self._cut()
        self._last_pulse = time.monotonic()
        return batch

    def _cut(self) -> list[_Work]:
        """Take images of the model whose image has waited longest, of those that are answered in time."""
        now = time.monotonic()
        # Before they are counted: a future that is done belongs to a caller who has gone, and a timer tells the late.
        waiting = [work for work in self._waiting if work.deadline > now and not work.future.done()]
        of_model: dict[ServedModel, list[_Work]] = {}
        for work in waiting:
            of_model.setdefault(work.model, []).append(work)
        batches = [batch for model, works in of_model.items() if (batch := self._in_time(model, works, now))]
        # An estimate by which nothing is in time may be wrong.
        batch = min(batches, key=lambda batch: batch[0].enqueued) if batches else waiting[:1]
        # In hand before they leave the queue: wherever the loop is lost, somebody knows of them.
        self._in_hand = [*(self._running.work if self._running else ()), *batch]
        taken = set(map(id, batch))
        self._waiting = deque(work for work in waiting if id(work) not in taken)
        return batch

    def _in_time(self, model: ServedModel, waiting: Sequence[_Work], now: float) -> list[_Work]:
        """The largest bucket of a model's images that will be in time at its end: full, or padded by less than half."""
        # What would be late is not begun, or a crowd keeps the network busy with answers that nobody gets.
        seconds = self._seconds_of.get(model, self._image_seconds)
        for size in reversed(self.buckets):
            able = [work for work in waiting if work.deadline > now + seconds * size][:size]
            if len(able) == size or (model.detector.asynchronous and 2 * len(able) > size):
                return able
        return []

    def _wait_for_more(self, until: float) -> None:
        while len(self._waiting) < self.buckets[-1] and not self._closing:
            left = until - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _launch(self, batch: list[_Work]) -> _Launched | None:
        started = time.monotonic()
        model = batch[0].model
        try:
            images = torch.from_numpy(np.stack([work.image for work in batch]))
            if model.detector.asynchronous:
                images = padded(images, min(bucket for bucket in self.buckets if bucket >= len(images)))
            checked = not model.detector.asynchronous  # else the host would wait for the device here
            outputs = model.detector.backbone.outputs(images, checked=checked)[: len(batch)]
            forwarded = time.monotonic()
            scored = model.detector.start_judging(outputs, model.decider, shadows=self._shadows_now(model))
        except NonFiniteFeatures as error:
            odd = [index in error.images for index in range(len(batch))]
            if not any(odd):  # in the padding alone, which can only be chance: to begin again might never end
                self._failed(model, batch, error)
                return None
            sound = self._sound(model, batch, odd)
            return self._launch(sound) if sound else None
        except Exception as error:
            self._failed(model, batch, error)
            return None
        return _Launched(model, batch, scored, started, forwarded)

    def _sound(self, model: ServedModel, batch: list[_Work], odd: Sequence[bool]) -> list[_Work]:
        """The images of a batch that have a score; the odd ones, which have none, fail by themselves."""
        failed, sound = (
            [work for work, is_odd in zip(batch, odd, strict=True) if is_odd == it] for it in (True, False)
        )
        # An image that cannot be scored is its sender's doing; a network that scores nothing at all is ours.
        if not sound and (error := self._trouble(model)) is not None:
            self._failed(model, failed, error)
        elif failed:
            log.error("images have no finite score", extra={"images": len(failed), "batch": len(batch)})
            self._fail(failed, ScoringFailed("the image could not be scored: the network or the score gave no number"))
        return sound

    def _finish(self, launched: _Launched) -> None:
        model, batch = launched.model, launched.work
        try:
            verdicts = model.detector.finish_judging(launched.scored, model.decider)
        except Exception as error:
            self._failed(model, batch, error)
            return
        done = time.monotonic()
        forward_s, score_s = launched.forwarded - launched.started, done - launched.forwarded
        sound = self._sound(model, batch, [not verdict.ood.sound for verdict in verdicts])
        if not sound:
            return
        answers = [
            Answer(verdict, Timing(launched.started - work.enqueued, forward_s, score_s))
            for work, verdict in zip(sound, (verdict for verdict in verdicts if verdict.ood.sound), strict=True)
        ]
        self._succeeded()
        took = (done - launched.started) / len(batch)
        known = self._seconds_of.get(model, self._image_seconds)
        self._seconds_of[model] = known + 0.1 * (took - known)
        self._image_seconds += 0.1 * (took - self._image_seconds)
        self._post(lambda: self._deliver(model, sound, answers))

    def _failed(self, model: ServedModel, batch: list[_Work], error: Exception) -> None:
        log.error("a batch failed", exc_info=error, extra={"images": len(batch)})
        self._failures += 1
        self._failing = model
        self._fail(batch, ScoringFailed(f"the image could not be scored: {error}"))

    def _probe(self) -> None:
        """While the server is not ready no requests come, so it must find out by itself whether it works again."""
        model = None if self._failing is None else self._in_place_of(self._failing)
        if model is not None and (error := self._trouble(model)) is not None:
            log.warning("the engine still fails", exc_info=error)
        else:
            self._succeeded()
            log.info("the engine works again")

    def _succeeded(self) -> None:
        self._failures, self._failing = 0, None  # which would keep a model in memory that is served no more

    def _trouble(self, model: ServedModel) -> Exception | None:
        """What keeps a model from judging a black image; None where nothing does."""
        try:
            warm_up(model, (1,))
        except Exception as error:
            return error
        return None

    def _shadows_now(self, model: ServedModel) -> bool:
        share = self._shadow_shares.get(model, 0.0) + model.shadow_ratio
        due = share >= 1
        self._shadow_shares[model] = share - due
        return due

    def _fail(self, batch: Sequence[_Work], error: ScoringFailed | EngineLost) -> None:
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

    # And this again on the event loop.

    def _deliver(self, model: ServedModel, batch: Sequence[_Work], answers: Sequence[Answer]) -> None:
        for work, answer in zip(batch, answers, strict=True):
            if not work.future.done():
                work.future.set_result(answer)
        if self._on_batch is not None:
            self._on_batch(model, answers)

    def _expire(self, work: _Work) -> None:
        if not work.future.done():
            work.future.set_exception(DeadlinePassed(self.timeout_s))
