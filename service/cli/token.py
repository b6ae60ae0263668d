# SPDX-License-Identifier: Apache-2.0
"""`oodgate token`."""

from __future__ import annotations

import hashlib
import secrets

import click


@click.command()
def token() -> None:
    """Make a token: give the first line to the caller, the second to the server."""
    secret = secrets.token_urlsafe(32)
    click.echo(f"token   {secret}")
    click.echo(f"sha256  {hashlib.sha256(secret.encode()).hexdigest()}")
