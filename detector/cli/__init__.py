# SPDX-License-Identifier: Apache-2.0
"""The `oodgate` command: a file for each of its commands."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import click

from detector.cli import calibrate, evaluate, fit, inspect, score
from detector.errors import OodgateError


class Commands(click.Group):
    """The commands below and those that other packages announce as entry points; errors as one clear line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *entry_points(group="oodgate.commands").names])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = entry_points(group="oodgate.commands", name=name)
        if not found:
            return super().get_command(ctx, name)
        command: click.Command = next(iter(found)).load()
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OodgateError as error:
            raise click.ClickException(f"{error} [{error.code}]") from error


@click.group(cls=Commands)
@click.version_option(package_name="oodgate")
def main() -> None:
    """Tells, image by image, whether a vision model may be trusted on this input."""


for command in (fit.fit, calibrate.calibrate, evaluate.evaluate, score.score, inspect.inspect):
    main.add_command(command)
