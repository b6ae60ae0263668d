# SPDX-License-Identifier: Apache-2.0
"""Wiring and lifespan, nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing

import torch
from fastapi import FastAPI

from detector import __version__
from detector.backbone import resolve_device
from detector.errors import OodgateError
from detector.nvjpeg import NvJpeg
from service import logs, openapi, problems
from service.audit import Audit, NoAudit
from service.context import Context, Lifecycle
from service.direct import App
from service.door import Door
from service.engine import Engine
from service.explainer import Explainer
from service.metrics import Metrics
from service.recent import Recent
from service.registry import Registry
from service.routes import admin, console, explain, gate, health, models, monitor, oip, report, verdict
from service.security import Tokens, is_loopback, read_tokens
from service.served import Answer, ServedModel
from service.server import DOOR
from service.settings import Settings
from service.tracing import Tracing
from service.upstream import Upstream
from service.watch import Watch

log = logging.getLogger(__name__)

LAG_EVERY_S = 0.25
SAVE_EVERY_S = 30  # seconds of drift evidence that a crash may cost


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI app; its models are loaded, proven and warmed when it starts.

    Raises, at start:
        ArtifactNotFound, ArtifactCorrupt, GoldenMismatch: a model cannot be served; the message says why.
        BackboneError: the device is not there, or cannot decode JPEGs as asked.
    """
    metrics = Metrics()
    recent = Recent(metrics)
    lifecycle = Lifecycle()
    users = dict(settings.tokens) | (read_tokens(settings.tokens_file) if settings.tokens_file else {})
    tokens = Tokens(users, settings.admin_token_sha256)
    tracing = Tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Door]]:
        started = time.monotonic()
        torch.set_num_threads(settings.torch_threads)
        watch = Watch(settings, metrics)
        registry = Registry(settings, metrics, watch)
        try:
            audit = _audit(settings, metrics)
            jpegs = NvJpeg(resolve_device(settings.device)) if settings.jpeg == "nvjpeg" else None
            registry.load_all()
        except OodgateError as error:
            log.error("cannot serve: %s", error, extra={"code": error.code})
            logs.told_once()
            raise
        engine = Engine(
            max_batch=settings.max_batch,
            capacity=settings.queue_capacity,
            timeout_s=settings.request_timeout_s,
            stall_s=settings.engine_stall_s,
            window_s=settings.batch_window_s,
            on_batch=lambda model, answers: _record(metrics, recent, model, answers),
            on_restart=metrics.engine_restarts.inc,
        )
        metrics.watch(lambda: engine.depth, lambda: time.time() - engine.pulse_age_s, settings.queue_capacity)
        upstream = Upstream(settings) if settings.gate_upstream else None
        explainer = Explainer()
        with ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode") as decoders, closing(explainer):
            app.state.context = Context(
                settings,
                metrics,
                registry,
                engine,
                decoders,
                tokens,
                lifecycle,
                audit,
                watch,
                upstream,
                explainer,
                recent,
                jpegs,
            )
            chores = [asyncio.create_task(chore) for chore in _chores(settings, metrics, registry, watch)]
            if tokens.open and not is_loopback(settings.host):
                log.warning("open to everybody who reaches it: no tokens are set", extra={"host": settings.host})
            registry.settle()
            # What lives as long as the server need not be looked through at every full collection, 0.2 s each.
            gc.collect()
            gc.freeze()
            log.info("ready", extra={"models": registry.names, "seconds": round(time.monotonic() - started, 3)})
            yield {DOOR: Door([*verdict.router.routes, *oip.router.routes], engine, tokens, metrics)}
            log.info("stopping", extra={"admitted": engine.depth})
            for chore in chores:
                chore.cancel()
            await engine.close(settings.shutdown_grace_s)
            if upstream is not None:
                await upstream.close()
            registry.close()
            watch.save()
            audit.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
            gc.unfreeze()

    # The interactive pages would load scripts from elsewhere; the document itself stays.
    app = App(
        direct=verdict.router.routes,
        observed={
            "metrics": metrics,
            "tokens": tokens,
            "tracing": tracing,
            "max_body_bytes": settings.max_body_bytes,
            "max_buffered_bytes": settings.max_buffered_bytes,
        },
        title="oodgate",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.lifecycle = lifecycle
    problems.install(app)
    for part in (verdict, explain, oip, gate, models, report, admin, monitor, console, health):
        app.include_router(part.router)
    openapi.document(app)
    return app


def _audit(settings: Settings, metrics: Metrics) -> Audit | NoAudit:
    if not settings.audit:
        return NoAudit()
    directory = settings.state_dir / "audit"
    return Audit(
        directory, max_bytes=settings.audit_max_bytes, keep=settings.audit_keep, on_loss=metrics.audit_lost.inc
    )


def _chores(
    settings: Settings, metrics: Metrics, registry: Registry, watch: Watch
) -> Iterator[Coroutine[None, None, None]]:
    """What is done again and again beside the requests."""

    async def measure_lag() -> None:
        while True:
            due = time.monotonic() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            metrics.loop_lag.observe(max(0.0, time.monotonic() - due))

    async def look_for_versions() -> None:
        while True:
            await asyncio.sleep(settings.poll_seconds)
            await registry.load_newer()

    async def refresh_drift() -> None:
        while True:
            for _ in range(SAVE_EVERY_S):
                await asyncio.sleep(1)
                watch.refresh()
            for write in watch.writes():
                await asyncio.to_thread(write)

    yield measure_lag()
    yield refresh_drift()
    if settings.poll_seconds:
        yield look_for_versions()


def _record(metrics: Metrics, recent: Recent, model: ServedModel, answers: Sequence[Answer]) -> None:
    recent.count(model, answers)
    metrics.count_verdicts(model.detector.manifest, model.decider, [answer.verdict for answer in answers])
    metrics.batch_size.observe(len(answers))
    metrics.stage["forward"].observe(answers[0].timing.forward)
    metrics.stage["score"].observe(answers[0].timing.score)
    for answer in answers:
        metrics.stage["queue"].observe(answer.timing.queue)
