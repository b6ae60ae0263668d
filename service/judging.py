# SPDX-License-Identifier: Apache-2.0
"""Read -> decode -> judge: what every route that judges images does, under the same limits and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from PIL import Image
from starlette.requests import ClientDisconnect

from detector.errors import ImageError, OodgateError, TooManyBytes, TooManyPixels
from detector.images import JpegDecoder, Limits, Pixels, Preprocessing, decode, is_small, resize
from service.context import Context
from service.errors import (
    BodyTooLarge,
    BuffersFull,
    DeadlinePassed,
    EngineLost,
    NotReady,
    QueueFull,
    SlowRequest,
    TooManyImages,
    TooManyValues,
    UnsupportedMediaType,
)
from service.security import Caller
from service.served import Answer, ServedModel
from service.server import ABANDON
from service.tracing import SPAN, RequestSpan

T = TypeVar("T")
_SOURCE = re.compile(r"[A-Za-z0-9._:-]{1,64}")
Picture = bytes | Pixels  # an encoded file, or uint8 [H, W, 3] of any size

_REJECTION: dict[type[OodgateError], str] = {
    QueueFull: "queue_full",
    BuffersFull: "queue_full",
    SlowRequest: "deadline",
    DeadlinePassed: "deadline",
    BodyTooLarge: "too_large",
    TooManyImages: "too_large",
    TooManyValues: "too_large",
    TooManyBytes: "too_large",
    TooManyPixels: "pixels",
    ImageError: "bad_image",
    UnsupportedMediaType: "media_type",
    NotReady: "not_ready",
    EngineLost: "not_ready",
}


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks for verdicts, in which request, and where the images come from: a camera, a tenant.

    The span is the request's, where requests are traced.
    """

    request_id: str
    caller: Caller
    source: str
    span: RequestSpan | None

    @classmethod
    def of(cls, request: Request) -> Asker:
        """From the request; its header X-OODGate-Source, where it is a plain word, names the source."""
        caller: Caller = request.scope["caller"]
        source = request.headers.get("x-oodgate-source", "")
        known = source if _SOURCE.fullmatch(source) else caller.name
        return cls(request.scope["request_id"], caller, known, request.scope.get(SPAN))


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer, the SHA-256 of what was sent, and the seconds the image took to decode and in all."""

    answer: Answer
    sha256: str
    decode_s: float
    total_s: float


def shows_evidence(context: Context, asker: Asker) -> bool:
    """Whether scores, thresholds and p-values are for this caller's eyes."""
    return context.settings.expose == "all" or asker.caller.admin


def count_rejection(context: Context, error: OodgateError) -> None:
    """Count a request or an image that was not judged."""
    reason = next((reason for kind, reason in _REJECTION.items() if isinstance(error, kind)), None)
    if reason is not None:
        context.metrics.rejected.labels(reason).inc()


@contextmanager
def counting_rejections(context: Context) -> Iterator[None]:
    """Count the error that a request ends in."""
    try:
        yield
    except OodgateError as error:
        count_rejection(context, error)
        raise


@contextmanager
def while_the_caller_waits(request: Request) -> Iterator[None]:
    """Give up what a request asks for when its connection is lost, so that nothing is computed for nobody.

    Raises:
        ClientDisconnect: the caller is gone.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def abandon() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    request.scope[ABANDON] = abandon
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        del request.scope[ABANDON]


async def read_in_time(context: Context, deadline: float, read: Callable[[], Awaitable[T]]) -> T:
    """Read a request's body, unless the queue is full already; the deadline is on the clock of time.monotonic().

    Raises:
        QueueFull, NotReady, EngineLost: said before a body is sent in vain.
        SlowRequest: the body did not arrive in time.
    """
    context.engine.check_room(1)
    return await in_time(context, deadline, read)


async def in_time(context: Context, deadline: float, read: Callable[[], Awaitable[T]]) -> T:
    """Read a request's body. Raises SlowRequest where it did not arrive in time."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(deadline - started):
            result = await read()
    except TimeoutError:
        raise SlowRequest(context.settings.request_timeout_s) from None
    context.metrics.stage["read"].observe(time.monotonic() - started)
    return result


async def in_decoder(context: Context, deadline: float, work: Callable[[], T]) -> T:
    """Do work off the event loop. Raises as `by`."""
    return await by(context, deadline, asyncio.get_running_loop().run_in_executor(context.decoders, work))


async def by(context: Context, deadline: float, awaited: Awaitable[T]) -> T:
    """Wait for what is given up, as DeadlinePassed, at the deadline, on the clock of time.monotonic()."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await awaited
    except TimeoutError:
        raise DeadlinePassed(context.settings.request_timeout_s) from None


async def judge_all(
    context: Context, asker: Asker, model: ServedModel, pictures: Sequence[Picture], started: float, deadline: float
) -> list[Judged | OodgateError]:
    """One result an image; an image that fails does so alone.

    Args:
        context: the server's parts.
        asker: whom the audit log names.
        model: what to judge with.
        pictures: the images, within the limit of one request.
        started: when the request began, on the clock of time.monotonic().
        deadline: when it is given up, on the same clock.

    Raises:
        QueueFull, NotReady, EngineLost: nothing was admitted.
    """
    with context.engine.admit(len(pictures)):
        if len(pictures) == 1:  # a task of its own would cost more than its decoding
            results = [await _result(context, asker, model, pictures[0], started, deadline, alone=True)]
        else:
            results = await asyncio.gather(
                *(_result(context, asker, model, picture, started, deadline) for picture in pictures)
            )
    return results


async def _result(
    context: Context,
    asker: Asker,
    model: ServedModel,
    picture: Picture,
    started: float,
    deadline: float,
    *,
    alone: bool = False,
) -> Judged | OodgateError:
    try:
        judged = await _judge(context, model, picture, started, deadline, alone=alone)
    except OodgateError as error:
        return error
    context.audit.write(_audited(asker, model, judged))
    context.watch.saw(model, judged.answer.verdict, asker.source)
    if asker.span is not None:
        _trace(asker.span, model, judged)
    return judged


def _trace(span: RequestSpan, model: ServedModel, judged: Judged) -> None:
    manifest, verdict, timing = model.detector.manifest, judged.answer.verdict, judged.answer.timing
    span.stages(
        {"decode": judged.decode_s, "queue": timing.queue, "forward": timing.forward, "score": timing.score},
        {"oodgate.model": manifest.name, "oodgate.version": manifest.version, "oodgate.decision": verdict.decision},
    )


async def _judge(
    context: Context, model: ServedModel, picture: Picture, started: float, deadline: float, *, alone: bool
) -> Judged:
    preprocessing, limits = model.detector.manifest.preprocessing, context.settings.limits

    def prepared(jpegs: JpegDecoder | None) -> tuple[Pixels, str, float]:
        began = time.monotonic()
        image = _network_input(picture, preprocessing, limits, jpegs)
        sent = picture if isinstance(picture, bytes) else np.ascontiguousarray(picture).data
        return image, hashlib.sha256(sent).hexdigest(), time.monotonic() - began

    async def answered(image: Pixels, sha256: str, decode_s: float) -> Judged:
        context.metrics.stage["decode"].observe(decode_s)
        answer = await context.engine.judge(model, image, deadline)
        return Judged(answer, sha256, decode_s, time.monotonic() - started)

    small = isinstance(picture, bytes) and is_small(picture, preprocessing)
    jpegs = None if small else context.jpegs  # the way to a device and back takes longer than decoding does
    if small and alone:  # so does the way to another thread; but many in one go would hold up everybody
        return await answered(*prepared(jpegs))
    await by(context, deadline, context.decodable.acquire())
    try:
        return await answered(*await in_decoder(context, deadline, partial(prepared, jpegs)))
    finally:
        context.decodable.release()


def _audited(asker: Asker, model: ServedModel, judged: Judged) -> dict[str, Any]:
    manifest, verdict = model.detector.manifest, judged.answer.verdict
    return {
        "event": "decision",
        "request_id": asker.request_id,
        "caller": asker.caller.name,
        "source": asker.source,
        "model": manifest.name,
        "version": manifest.version,
        "digest": manifest.model_digest,
        "precision": model.detector.backbone.precision,
        "sha256": judged.sha256,
        "decision": verdict.decision,
        "reason": verdict.reason,
        "prediction": verdict.prediction,
        "ood": verdict.ood,
    }


def _network_input(picture: Picture, preprocessing: Preprocessing, limits: Limits, jpegs: JpegDecoder | None) -> Pixels:
    if isinstance(picture, bytes):
        return decode(picture, preprocessing, limits, jpegs)
    height, width = picture.shape[:2]
    if width * height > limits.max_pixels:
        raise TooManyPixels(width, height, limits.max_pixels)
    return resize(Image.fromarray(picture), preprocessing)
