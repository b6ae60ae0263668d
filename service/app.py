# SPDX-License-Identifier: Apache-2.0
"""Wiring, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from detector import __version__
from service import openapi, problems
from service.context import Lifecycle
from service.direct import App
from service.door import Door
from service.lifespan import running
from service.metrics import Metrics
from service.routes import admin, console, explain, gate, health, models, monitor, oip, report, verdict
from service.security import BadTokens, Tokens, is_loopback, read_tokens
from service.server import DOOR
from service.settings import Settings
from service.tracing import Tracing


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI app; its models are loaded, proven and warmed when it starts.

    Raises:
        BadTokens: the tokens cannot be read, or there are none and other machines could ask.

    Raises, at start:
        ArtifactNotFound, ArtifactCorrupt, GoldenMismatch: a model cannot be served; the message says why.
    """
    metrics, lifecycle, tokens = Metrics(), Lifecycle(), _tokens(settings)
    tracing = Tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Door]]:
        async with running(settings, metrics, tokens, lifecycle) as context:
            app.state.context = context
            yield {DOOR: Door([*verdict.router.routes, *oip.router.routes], context.engine, tokens, metrics)}
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

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
        telemetry={"tracing": False, "metrics": False, "logs": False},  # spans and metrics are ours
    )
    app.state.lifecycle = lifecycle
    problems.install(app)
    for part in (verdict, explain, oip, gate, models, report, admin, monitor, console, health):
        app.include_router(part.router)
    app.include_router(admin.changing)
    openapi.document(app)
    return app


def _tokens(settings: Settings) -> Tokens:
    users = dict(settings.tokens) | (read_tokens(settings.tokens_file) if settings.tokens_file else {})
    tokens = Tokens(users, settings.admin_token_sha256)
    # The settings know that there is a file, and not whether it names anybody.
    if tokens.open and not (settings.allow_open or is_loopback(settings.host)):
        raise BadTokens(
            f"OODGATE_HOST {settings.host} is reached from other machines, and neither OODGATE_TOKENS nor "
            "OODGATE_TOKENS_FILE names a caller's token: add one (`oodgate token` makes it), or set "
            "OODGATE_ALLOW_OPEN=true where the network itself is guarded"
        )
    return tokens
