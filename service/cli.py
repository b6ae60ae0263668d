# SPDX-License-Identifier: Apache-2.0
"""`oodgate serve`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import click
import uvicorn
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service import logs
from service.app import create_app
from service.settings import Settings, unknown_variables

log = logging.getLogger(__name__)


@click.command()
@click.option("--models", type=click.Path(path_type=Path), help="Folder of models, NAME/VERSION/.  [models]")
@click.option("--host", help="Address to listen on.  [127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on.  [8000]")
@click.option("--device", help="cpu, cuda, cuda:N or auto.  [auto]")
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), help="[INFO]")
def serve(**flags: Any) -> None:
    """Serve verdicts over HTTP. Every OODGATE_* variable is a setting; a flag given here wins."""
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise click.UsageError("; ".join(map(_told, error.errors()))) from error
    logs.configure(settings.log_level)
    if unknown := unknown_variables(os.environ):
        log.warning("ignored variables that are no settings: %s", ", ".join(unknown))
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_grace_s) + 1,
    )
    server = uvicorn.Server(config)
    server.run()
    if not server.started:
        raise SystemExit(3)


def _told(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return f"OODGATE_{'.'.join(map(str, error['loc'])).upper()}: {message}" if error["loc"] else message
