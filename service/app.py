# SPDX-License-Identifier: Apache-2.0
"""Wiring and lifespan, nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI

from detector import __version__
from detector.errors import OodgateError
from service import logs, problems
from service.context import Context
from service.engine import Answer, Engine, ServedModel
from service.metrics import Metrics
from service.middleware import Observe
from service.registry import Registry
from service.routes import health, models, verdict
from service.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI app; its models are loaded, proven and warmed when it starts.

    Raises, at start:
        ArtifactNotFound, ArtifactCorrupt, GoldenMismatch: a model cannot be served; the message says why.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        started = time.monotonic()
        torch.set_num_threads(settings.torch_threads)
        registry = Registry(settings, metrics)
        try:
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
            on_batch=lambda model, answers: _record(metrics, model, answers),
        )
        metrics.watch(lambda: engine.depth, lambda: time.time() - engine.pulse_age_s, settings.queue_capacity)
        with ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode") as decoders:
            app.state.context = Context(settings, metrics, registry, engine, decoders)
            log.info("ready", extra={"models": registry.names, "seconds": round(time.monotonic() - started, 3)})
            yield
            log.info("stopping", extra={"admitted": engine.depth})
            await engine.close(settings.shutdown_grace_s)

    # The interactive pages would load scripts from elsewhere; the document itself stays.
    app = FastAPI(title="oodgate", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Observe,
        metrics=metrics,
        max_body_bytes=settings.max_body_bytes,
        max_buffered_bytes=settings.max_buffered_bytes,
    )
    problems.install(app)
    for part in (verdict, models, health):
        app.include_router(part.router)
    return app


def _record(metrics: Metrics, model: ServedModel, answers: Sequence[Answer]) -> None:
    metrics.count_verdicts(model.detector.manifest, [answer.verdict for answer in answers])
    metrics.batch_size.observe(len(answers))
    metrics.stage_seconds.labels("forward").observe(answers[0].timing.forward)
    metrics.stage_seconds.labels("score").observe(answers[0].timing.score)
    for answer in answers:
        metrics.stage_seconds.labels("queue").observe(answer.timing.queue)
