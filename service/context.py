# SPDX-License-Identifier: Apache-2.0
"""What the routes share: one object on the app, reached through a dependency."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from detector.images import JpegDecoder
from service.audit import Audit, NoAudit
from service.engine import Engine
from service.explainer import Explainer
from service.metrics import Metrics
from service.recent import Recent
from service.registry import Registry
from service.security import Tokens
from service.settings import Settings
from service.watch import Watch

if TYPE_CHECKING:
    from service.upstream import Upstream


class Lifecycle:
    """Whether the server is on its way out; a signal handler sets it."""

    draining = False

    def drain(self) -> None:
        """From now on the server says that it is not ready, and still works."""
        self.draining = True


@dataclass(frozen=True)
class Context:
    """The running server's parts."""

    settings: Settings
    metrics: Metrics
    registry: Registry
    engine: Engine
    decoders: ThreadPoolExecutor
    decodable: asyncio.Semaphore  # taken from before an image is decoded until it is judged
    tokens: Tokens
    lifecycle: Lifecycle
    audit: Audit | NoAudit
    watch: Watch
    upstream: Upstream | None
    explainer: Explainer
    recent: Recent
    jpegs: JpegDecoder | None

    @property
    def ready(self) -> bool:
        """Whether traffic may be sent here: a model is loaded, batches succeed, and no stop has begun."""
        working = self.engine.accepting and self.engine.alive and self.engine.healthy
        return self.registry.ready and working and not self.lifecycle.draining


async def _context(request: Request) -> Context:  # a plain function would be sent through a thread
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]
