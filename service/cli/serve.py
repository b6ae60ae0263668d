# SPDX-License-Identifier: Apache-2.0
"""`oodgate serve`."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from service import logs
from service.app import create_app
from service.server import Server, configured
from service.settings import Settings, unknown_variables

log = logging.getLogger(__name__)

MOST_FILES = 65_536
SPELT = {"tuple_type": 'give a JSON list, as ["msp","knn"]', "dict_type": 'give a JSON object, as {"name":"..."}'}


class WrongSetting(click.ClickException):
    """A setting that cannot be; one line, and the exit status of wrong usage."""

    exit_code = 2


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
        # A default that follows from other settings fails with them, and says nothing of its own.
        own = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        raise WrongSetting("; ".join(map(_told, own))) from error
    except SettingsError as error:
        raise WrongSetting(f"{error}: a setting of several values is JSON") from error
    logs.configure(settings.log_level)
    if unknown := unknown_variables(os.environ):
        log.warning("ignored variables that are no settings: %s", ", ".join(unknown))
    app = create_app(settings)
    server = Server(
        configured(app, settings.host, settings.port, settings.shutdown_grace_s),
        drain_s=settings.drain_seconds,
        on_drain=app.state.lifecycle.drain,
    )
    _allow_many_connections()
    server.run()
    if not server.started:
        raise SystemExit(3)


def _allow_many_connections() -> None:
    """Idle connections are cheap; the usual soft limit of 1,024 open files is not meant for servers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _told(error: ErrorDetails) -> str:
    message = SPELT.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    return f"OODGATE_{'.'.join(map(str, error['loc'])).upper()}: {message}" if error["loc"] else message
