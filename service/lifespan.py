# SPDX-License-Identifier: Apache-2.0
"""From the proof of the models to the last admitted answer: what a server runs on, made and ended in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

import torch

from detector.errors import OodgateError
from detector.machine import reclaim_memory, resolve_device
from detector.nvjpeg import NvJpeg
from service import logs
from service.audit import Audit, NoAudit
from service.context import Context, Lifecycle
from service.engine import Engine
from service.explainer import Explainer
from service.metrics import Metrics
from service.recent import Recent
from service.registry import Registry
from service.security import Tokens, is_loopback
from service.served import Answer, ServedModel
from service.settings import Settings
from service.watch import Watch

if TYPE_CHECKING:
    from service.upstream import Upstream

log = logging.getLogger(__name__)

DECODED_BATCHES = 4  # that may be decoded or under way at a time: what waits beyond them takes less memory encoded
LAG_EVERY_S = 0.25
SAVE_EVERY_S = 30  # seconds of drift evidence that a crash may cost
REFRESH_EVERY_S = 1
RECLAIM_EVERY_S = 30


@asynccontextmanager
async def running(settings: Settings, metrics: Metrics, tokens: Tokens, lifecycle: Lifecycle) -> AsyncIterator[Context]:
    """The server's parts while it serves; its models are loaded, proven and warmed before.

    Raises:
        ArtifactNotFound, ArtifactCorrupt, GoldenMismatch: a model cannot be served; the message says why.
        StateUnwritable: the audit log cannot be written.
        BackboneError: the device is not there, or cannot decode JPEGs as asked.
    """
    started = time.monotonic()
    # What was imported lives as long as the server and need not be looked through at every full collection, 0.2 s each.
    # Models come and go: what they leave is found.
    gc.collect()
    gc.freeze()
    torch.set_num_threads(settings.torch_threads)
    watch = Watch(settings, metrics)
    registry = Registry(settings, metrics, watch)
    audit, jpegs = _proven(settings, metrics, registry)
    recent = Recent(metrics)
    engine = _engine(settings, metrics, recent, registry)
    upstream = _upstream(settings) if settings.gate_upstream else None
    decoding = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
    with decoding as decoders, closing(Explainer(settings.torch_threads)) as explainer:
        context = Context(
            settings,
            metrics,
            registry,
            engine,
            decoders,
            asyncio.Semaphore(DECODED_BATCHES * settings.max_batch),
            tokens,
            lifecycle,
            audit,
            watch,
            upstream,
            explainer,
            recent,
            jpegs,
        )
        metrics.ready.set_function(lambda: context.ready)
        chores = [asyncio.create_task(_again_and_again(chore)) for chore in _chores(context)]
        if tokens.open and not is_loopback(settings.host):
            log.warning("open to everybody who reaches it: no tokens are set", extra={"host": settings.host})
        if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE" and resolve_device(settings.device).type == "cpu":
            log.warning("OMP_WAIT_POLICY is not PASSIVE: beside another busy process the server may become very slow")
        reclaim_memory()  # what proving and warming the models took
        registry.settle()
        log.info("ready", extra={"models": registry.names, "seconds": round(time.monotonic() - started, 3)})
        yield context
        await _stop(context, chores)


def _proven(settings: Settings, metrics: Metrics, registry: Registry) -> tuple[Audit | NoAudit, NvJpeg | None]:
    """Load the models; open the log of what they will decide, and the decoder of the device where it is asked for."""
    try:
        audit = _audit(settings, metrics)
        jpegs = NvJpeg(resolve_device(settings.device)) if settings.jpeg == "nvjpeg" else None
        registry.load_all()
    except OodgateError as error:
        log.error("cannot serve: %s", error, extra={"code": error.code})
        logs.told_once()
        raise
    return audit, jpegs


def _audit(settings: Settings, metrics: Metrics) -> Audit | NoAudit:
    if not settings.audit:
        return NoAudit()
    directory = settings.state_dir / "audit"
    return Audit(
        directory, max_bytes=settings.audit_max_bytes, keep=settings.audit_keep, on_loss=metrics.audit_lost.inc
    )


def _upstream(settings: Settings) -> Upstream:
    from service.upstream import Upstream  # here: its client takes 8 MB, and most servers are no gate

    return Upstream(settings)


def _engine(settings: Settings, metrics: Metrics, recent: Recent, registry: Registry) -> Engine:
    engine = Engine(
        max_batch=settings.max_batch,
        capacity=settings.queue_capacity,
        timeout_s=settings.request_timeout_s,
        stall_s=settings.engine_stall_s,
        window_s=settings.batch_window_s,
        threads=settings.torch_threads,
        on_batch=lambda model, answers: _record(metrics, recent, model, answers),
        on_restart=metrics.engine_restarts.inc,
        in_place_of=registry.in_place_of,
    )
    metrics.watch(lambda: engine.depth, lambda: time.time() - engine.pulse_age_s, settings.queue_capacity)
    return engine


def _record(metrics: Metrics, recent: Recent, model: ServedModel, answers: Sequence[Answer]) -> None:
    recent.count(model, answers)
    metrics.count_verdicts(model.detector.manifest, model.decider, [answer.verdict for answer in answers])
    metrics.batch_size.observe(len(answers))
    metrics.stage["forward"].observe(answers[0].timing.forward)
    metrics.stage["score"].observe(answers[0].timing.score)
    for answer in answers:
        metrics.stage["queue"].observe(answer.timing.queue)


async def _again_and_again(chore: Callable[[], Coroutine[None, None, None]]) -> None:
    """Do a chore, which begins with a pause, for as long as the server lives; a failure is told and ends one round."""
    while True:
        try:
            await chore()
        except Exception:  # whatever a disk or a library raises: the next round may fare better
            log.exception("a chore failed and is tried again", extra={"chore": chore.__name__})


def _chores(context: Context) -> Iterator[Callable[[], Coroutine[None, None, None]]]:
    """What is done again and again beside the requests: one round of each."""

    async def measure_lag() -> None:
        due = time.monotonic() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        context.metrics.loop_lag.observe(max(0.0, time.monotonic() - due))

    async def look_for_versions() -> None:
        await asyncio.sleep(context.settings.poll_seconds)
        await context.registry.load_newer()

    async def refresh_drift() -> None:
        await asyncio.sleep(REFRESH_EVERY_S)
        context.watch.refresh()

    async def save_drift() -> None:
        await asyncio.sleep(SAVE_EVERY_S)
        for write in context.watch.writes():
            await asyncio.to_thread(write)

    async def reclaim() -> None:
        await asyncio.sleep(RECLAIM_EVERY_S)
        # Else what thousands of short-lived buffers leave between long-lived ones adds up, megabytes an hour.
        await asyncio.to_thread(reclaim_memory)

    yield measure_lag
    yield refresh_drift
    yield save_drift
    yield reclaim
    if context.settings.poll_seconds:
        yield look_for_versions


async def _stop(context: Context, chores: Sequence[asyncio.Task[None]]) -> None:
    """Answer what was admitted, then put away what must outlive the process."""
    log.info("stopping", extra={"admitted": context.engine.depth})
    for chore in chores:
        chore.cancel()
    await context.engine.close(context.settings.shutdown_grace_s)
    if context.upstream is not None:
        await context.upstream.close()
    context.watch.save()
    context.audit.close()
    context.registry.close()  # may wait for a batch that is being timed; nothing is lost if that is too long
    gc.unfreeze()
