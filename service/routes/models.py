# SPDX-License-Identifier: Apache-2.0
"""Model cards."""

from __future__ import annotations

from fastapi import APIRouter

from service.context import Ctx
from service.schemas import ModelCard, ModelList, Problem, model_card

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", operation_id="list_models", summary="Cards of all models")
async def list_models(context: Ctx) -> ModelList:
    """Classes, preprocessing, score, calibration and promise of each loaded model."""
    registry = context.registry
    return ModelList(models=[model_card(registry, name) for name in registry.names])


@router.get("/{name}", operation_id="get_model", summary="Card of one model", responses={404: {"model": Problem}})
async def get_model(name: str, context: Ctx) -> ModelCard:
    """Classes, preprocessing, score, calibration and promise."""
    return model_card(context.registry, name)
