# SPDX-License-Identifier: Apache-2.0
"""oodgate on Ray Serve: the same app, one engine for each replica and accelerator. Needs the extra `ray`.

The import path for a Serve configuration is `service.ray_serve:application`; deploy/ray/ shows two.
Batching is the engine's: `serve.batch` on top would only wait twice.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from service import logs
from service.app import create_app
from service.errors import EngineLost, ServiceError
from service.settings import Settings


def replica_app() -> FastAPI:
    """The app of this replica, from the `OODGATE_*` variables of its process.

    Raises:
        ServiceError: an admin token is set. A change would reach one replica only, and they must all decide alike.
    """
    # Ray's proxy listens, and not for this machine alone: without tokens the start is refused as anywhere else.
    settings = Settings(host="0.0.0.0")
    if settings.admin_token_sha256:
        raise ServiceError(
            "OODGATE_ADMIN_TOKEN_SHA256 is set, but on Ray a policy or a model cannot be changed while serving: the "
            "change would reach one replica. Release a new version of the model instead"
        )
    logs.configure(settings.log_level)
    rank = serve.get_replica_context().rank
    # Ranks are handed on to successors, so there are as many folders as replicas; each has one writer.
    own = settings.state_dir / f"replica-{rank.rank}"
    return create_app(settings.model_copy(update={"state_dir": own}))


@serve.deployment
@serve.ingress(replica_app)
class Oodgate:
    """One replica: Ray asks for its health, replaces it when it is lost, and lets it answer all it has when it goes."""

    app: FastAPI  # what `ingress` was given, as it is in this process

    def check_health(self) -> None:
        """As `/v2/health/live`: a busy replica is healthy, one without its inference thread is not.

        Raises:
            EngineLost: the replica must be replaced.
        """
        if not self.app.state.context.engine.alive:
            raise EngineLost


_deployment: Any = Oodgate  # the decorator made it one
application = _deployment.bind()
