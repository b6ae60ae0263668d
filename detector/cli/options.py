# SPDX-License-Identifier: Apache-2.0
"""What several commands of `oodgate` share: arguments, the policy, the device, the progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import click

from detector.calibration import Guarantee
from detector.features import Report
from detector.files import is_uri
from detector.machine import resolve_device
from detector.policy import Policy

LINES = 50  # of progress
FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True)


class _Images(click.Path):
    """An existing path, or a URI as it stands."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_uri(value) else super().convert(value, param, ctx)


DATA = _Images(path_type=Path, exists=True)
DEVICE = click.option("--device", default="auto", help="cpu, cuda, cuda:N or auto.")


OPEN_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
TARGET = click.option(
    "--target", type=OPEN_SHARE, default=None, help="Share of in-distribution images to accept.  [0.95]"
)
GUARANTEE = click.option(
    "--guarantee", type=click.Choice(["pac", "marginal", "simultaneous"]), default=None, help="The promise.  [pac]"
)
DELTA = click.option(
    "--delta",
    type=click.FloatRange(0, 0.5, min_open=True, max_open=True),
    default=None,
    help="Share of calibrations that may break it.  [0.05]",
)
ALPHA_CONF = click.option(
    "--alpha-conf",
    type=click.FloatRange(0, 1, max_open=True),
    default=None,
    help="Share of in-distribution images to defer for low confidence, out of 1 - target.  [0]",
)


@dataclass(frozen=True)
class AskedPolicy:
    """The policy options of a command, None where one was not given."""

    target: float | None
    guarantee: Literal["pac", "marginal", "simultaneous"] | None
    delta: float | None
    alpha_conf: float | None

    def over(self, base: Policy) -> Policy:
        """The base, but for what was asked for."""
        kind, delta = self.guarantee or base.guarantee.kind, self.delta
        return Policy(
            target_id_acceptance=base.target_id_acceptance if self.target is None else self.target,
            guarantee=Guarantee(kind=kind, delta=base.guarantee.delta if delta is None else delta),
            score_name=base.score_name,
            alpha_conf=base.alpha_conf if self.alpha_conf is None else self.alpha_conf,
        )


def policy_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a policy; it takes them as one argument, `asked`."""

    @TARGET
    @GUARANTEE
    @DELTA
    @ALPHA_CONF
    @wraps(command)
    def asking(
        *,
        target: float | None,
        guarantee: Literal["pac", "marginal", "simultaneous"] | None,
        delta: float | None,
        alpha_conf: float | None,
        **others: Any,
    ) -> None:
        command(asked=AskedPolicy(target, guarantee, delta, alpha_conf), **others)

    return asking


def on_device(name: str) -> str:
    """The device meant; BackboneError where it is not there."""
    return str(resolve_device(name))


@contextmanager
def progress(total: int, label: str) -> Iterator[Report]:
    """A bar on the standard error, or a line each 2 % where that is no terminal; told how many more images are done."""
    if sys.stderr.isatty():
        with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
            yield bar.update
    else:
        yield _lines(total, label)


def _lines(total: int, label: str) -> Report:
    done = 0

    def report(images: int) -> None:
        nonlocal done
        before, done = done, done + images
        if LINES * done // max(1, total) > LINES * before // max(1, total):
            click.echo(f"{label} {done / total:4.0%}  {done:,} of {total:,} images", err=True)

    return report
