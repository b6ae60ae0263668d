# SPDX-License-Identifier: Apache-2.0
"""What the server did in the last quarter of an hour."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.context import Ctx

router = APIRouter(tags=["monitor"])


@router.get("/v1/monitor", operation_id="monitor", summary="The last quarter of an hour")
async def monitor(context: Ctx) -> dict[str, Any]:
    """Decisions, p-values and control limits by model, latency by stage, queue and rejections; ten-second slots."""
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
