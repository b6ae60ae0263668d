# SPDX-License-Identifier: Apache-2.0
"""`oodgate replay`."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import click

from service.replay import Mix, Replay, images_below, stream

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


def _mix(_: click.Context, __: click.Parameter, text: str) -> Mix:
    try:
        return Mix.parse(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}; write SECOND:SHARE,..., e.g. 0:0,60:0.2") from error


@click.command()
@click.option("--id", "id_folder", type=FOLDER, required=True, help="Folder of in-distribution images.")
@click.option("--ood", "ood_folder", type=FOLDER, help="Folder of OOD images.")
@click.option(
    "--mix", default="0", callback=_mix, show_default=True, help="Share of OOD: 0.2, or 0:0,60:0.2 by second."
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, help="Images a second."
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=math.inf, help="How long.  [until stopped]")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed sends the same stream.")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Server to send to.")
@click.option("--token", envvar="OODGATE_TOKEN", default="", help="Bearer token; also OODGATE_TOKEN.")
@click.option("--model", default="", help="Model to ask.  [the default model]")
def replay(
    id_folder: Path,
    ood_folder: Path | None,
    mix: Mix,
    rate: float,
    seconds: float,
    seed: int,
    url: str,
    token: str,
    model: str,
) -> None:
    """Send images to a server as production would: at random moments, whether or not answers have come."""
    if ood_folder is None and any(share for _, share in mix.steps):
        raise click.UsageError("--mix asks for OOD images: name their folder with --ood")
    id_images = images_below(id_folder)
    ood_images = images_below(ood_folder) if ood_folder else id_images
    sender = Replay(url, token, model, report=click.echo)
    try:
        asyncio.run(sender.run(stream(id_images, ood_images, rate, mix.at, seed), seconds))
    except KeyboardInterrupt:
        click.echo("stopped")
    click.echo(f"total    {sender.total.line()}")
    if sender.total.sent and not sender.total.answered:
        raise click.ClickException(f"no image got a verdict from {url}")
