# SPDX-License-Identifier: Apache-2.0
"""What the server did in the last quarter of an hour."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from service.context import Ctx
from service.errors import AdminOnly
from service.judging import Asker, shows_evidence
from service.schemas import Problem

router = APIRouter(tags=["monitor"])


@router.get("/v1/monitor", operation_id="monitor", summary="The last quarter of an hour",
            responses={403: {"model": Problem}})  # fmt: skip
async def monitor(request: Request, context: Ctx) -> dict[str, Any]:
    """Decisions, p-values and control limits by model, latency by stage, queue and rejections; ten-second slots."""
    if not shows_evidence(context, Asker.of(request)):
        raise AdminOnly("p-values and thresholds are shown to the admin alone here")
    registry, engine = context.registry, context.engine
    rejected = {
        sample.labels["reason"]: int(sample.value)
        for family in context.metrics.rejected.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    return context.recent.report([registry.get(name) for name in registry.names]) | {
        "queue": {"depth": engine.depth, "capacity": engine.capacity},
        "rejected_since_start": rejected,
        "grafana_url": context.settings.grafana_url,
    }
