# SPDX-License-Identifier: Apache-2.0
"""What changes a running server: policies, and the versions that are served. For the admin; reading is for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator

from detector.policy import Policy
from service.context import Context, Ctx
from service.drift import TestName
from service.errors import AdminOnly
from service.judging import Asker, in_time, shows_evidence
from service.oip_schemas import IndexEntry
from service.schemas import ModelCard, Problem, model_card


class _Changing(APIRoute):
    """Whoever may change nothing is told so before the body is read; the body must arrive in time, within its limits.

    FastAPI reads a body before anything else, without a deadline, and answers whatever goes wrong with a 400.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            context: Context = request.app.state.context
            context.tokens.require_admin(request.scope["caller"])
            deadline = time.monotonic() + context.settings.request_timeout_s
            await in_time(context, deadline, request.body)  # the request keeps it
            return await handle(request)

        return guarded


router = APIRouter(tags=["admin"])
changing = APIRouter(tags=["admin"], route_class=_Changing)


class LoadParameters(BaseModel):
    version: str | None = Field(default=None, description="The version to serve; the newest where none is named.")

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_overlooked(cls, given: Any) -> Any:
        if isinstance(given, dict) and (unknown := sorted({*given} - {"version"})):
            raise ValueError(
                f"{', '.join(unknown)[:200]} cannot be set by a load: a model is served as its files say. Write a "
                "version with other files into the folder of models and load that; `version` is the only parameter"
            )
        return given


class LoadRequest(BaseModel):
    """Triton's body; its parameters `config` and `file:…` are refused."""

    model_config = ConfigDict(extra="forbid")

    parameters: LoadParameters = LoadParameters()


_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 403, 404, 408, 413, 422, 429, 500)
}


@router.get("/v1/models/{name}/policy", operation_id="get_policy", summary="The policy in force",
            responses={404: {"model": Problem}})  # fmt: skip
async def get_policy(name: str, context: Ctx) -> Policy:
    """Target, guarantee, deciding score, and how much of the budget 1 - target is spent on low confidence."""
    return context.registry.get(name).decider.policy


@changing.put("/v1/models/{name}/policy", operation_id="put_policy", summary="Decide by another policy: for the admin",
              responses=_REFUSED)  # fmt: skip
async def put_policy(name: str, policy: Policy, request: Request, context: Ctx) -> ModelCard:
    """Recomputed from the stored calibration scores, without a refit; it outlives a restart. What is left out, of
    the guarantee too, stays as it is in force. 422 where the calibration cannot keep what the policy promises."""
    model = await context.registry.set_policy(name, policy, request.scope["caller"].name)
    _audit(context, request, "policy", model=name, policy=model.decider.policy.model_dump())
    return model_card(context.registry, name)


class ResetRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    test: TestName | Literal["all"] = "all"


@router.get("/v1/models/{name}/drift", operation_id="get_drift", summary="Where a model's drift tests stand",
            responses={403: {"model": Problem}, 404: {"model": Problem}})  # fmt: skip
async def get_drift(name: str, request: Request, context: Ctx) -> dict[str, Any]:
    """Statistics, limits and alarms of every test, by calibration group."""
    if not shows_evidence(context, Asker.of(request)):
        raise AdminOnly("the evidence, which each p-value moves, is shown to the admin alone here")
    context.registry.get(name)
    return context.watch.status(name)


@changing.post("/v1/models/{name}/drift/reset", operation_id="reset_drift",
               summary="Start drift tests anew: for the admin", responses=_REFUSED)  # fmt: skip
async def reset_drift(
    name: str, request: Request, context: Ctx, body: Annotated[ResetRequest | None, Body()] = None
) -> dict[str, Any]:
    """One test, or all of them; an alarm that stood is gone."""
    context.registry.get(name)
    test = body.test if body else "all"
    context.watch.reset(name, test)
    _audit(context, request, "drift_reset", model=name, test=test)
    return context.watch.status(name)


@router.post("/v2/repository/index", operation_id="oip_repository_index", summary="Models on disk and their states")
async def repository_index(context: Ctx) -> list[IndexEntry]:
    """Triton's index: READY is served; UNAVAILABLE is on disk, with the reason where loading it failed."""
    registry = context.registry
    served = {(name, registry.get(name).detector.manifest.version) for name in registry.names}
    reasons = dict.fromkeys(served, "") | registry.on_disk()
    return [
        IndexEntry(
            name=name, version=version, state="READY" if (name, version) in served else "UNAVAILABLE", reason=why
        )
        for (name, version), why in sorted(reasons.items())
    ]


@changing.post("/v2/repository/models/{name}/load", operation_id="oip_load",
               summary="Serve a version of a model: for the admin", responses=_REFUSED)  # fmt: skip
async def load(
    name: str, request: Request, context: Ctx, body: Annotated[LoadRequest | None, Body()] = None
) -> ModelCard:
    """The newest version on disk, or the one that `parameters.version` names. It is loaded and proven aside, then
    takes over in one step; where it fails, the version before it still serves and the card says why. An older version
    stays after a restart, too, until the newest is loaded or the model unloaded."""
    wanted = body.parameters.version if body else None
    model = await context.registry.load(name, wanted, request.scope["caller"].name)
    version, pinned = model.detector.manifest.version, context.registry.pinned(name)
    _audit(context, request, "load", model=name, version=version, pinned=pinned)
    return model_card(context.registry, name)


@changing.post("/v2/repository/models/{name}/unload", operation_id="oip_unload",
               summary="Serve a model no more: for the admin", responses=_REFUSED)  # fmt: skip
async def unload(name: str, request: Request, context: Ctx) -> dict[str, str]:
    """Images already admitted are still answered."""
    await context.registry.unload(name)
    _audit(context, request, "unload", model=name)
    return {"name": name, "state": "UNAVAILABLE"}


def _audit(context: Context, request: Request, event: str, **what: Any) -> None:
    who = {"request_id": request.scope["request_id"], "caller": request.scope["caller"].name}
    context.audit.write({"event": event} | who | what)
