# SPDX-License-Identifier: Apache-2.0
"""`oodgate whatif`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from detector.policy import Policy
from service.whatif import Asked, Replay, Tally, replay


@click.command()
@click.option(
    "--audit",
    "files",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    required=True,
    help="An audit log; more may follow.",
)
@click.argument("more", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1)
@click.option(
    "--models",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("models"),
    show_default=True,
    help="Folder of models, NAME/VERSION/: those that decided.",
)
@click.option("--target", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Share of ID to accept.")
@click.option("--score", help="The score that decides; it must have been recorded, as the deciding one or a shadow.")
@click.option("--guarantee", type=click.Choice(["pac", "marginal", "simultaneous"]), help="The promise.")
@click.option(
    "--delta", type=click.FloatRange(0, 0.5, min_open=True, max_open=True), help="Share of calibrations that break it."
)
@click.option(
    "--alpha-conf",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of in-distribution images to defer for low confidence, out of 1 - target.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def whatif(files: tuple[Path, ...], more: tuple[Path, ...], models: Path, as_json: bool, **asked: Any) -> None:
    """Replay another policy over past traffic, from the audit log.

    What is not given is the model's own; a target that is moved asks for the simultaneous guarantee.
    """
    result = replay((*files, *more), models, Asked(**asked))
    click.echo(json.dumps(_document(result), indent=1) if as_json else _table(result))


def _document(result: Replay) -> dict[str, Any]:
    return {
        "policies": {name: policy.model_dump() for name, policy in result.policies.items()},
        **result.all.as_dict(),
        "by_model": {name: tally.as_dict() for name, tally in sorted(result.by_model.items())},
        "by_caller": {name: tally.as_dict() for name, tally in sorted(result.by_caller.items())},
        "skipped": {
            "unknown_digests": result.unknown_digests,
            "without_score": result.without_score,
            "broken_lines": result.broken,
        },
    }


def _table(result: Replay) -> str:
    width = max(12, *(len(name) + 2 for name in (*result.by_model, *result.by_caller)))
    lines = [f"{name}: {_told(policy)}" for name, policy in sorted(result.policies.items())]
    columns = ("images", "deferred then", "deferred now", "accept to defer", "defer to accept")
    lines += ["", " " * width + "".join(f"{column:>17}" for column in columns)]

    def rows(title: str, tallies: Mapping[str, Tally]) -> None:
        lines.append(title)
        for name, tally in sorted(tallies.items()):
            numbers = "".join(f"{number:>17,}" for number in tally.as_dict().values())
            lines.append(f"{'  ' + name:{width}}{numbers}")

    rows("all", {"": result.all})
    rows("by model", result.by_model)
    rows("by caller", result.by_caller)
    return "\n".join(lines + list(_skipped(result)))


def _skipped(result: Replay) -> Iterator[str]:
    for digest, count in sorted(result.unknown_digests.items()):
        yield f"skipped: {count:,} decisions of {digest}, which is not in the folder of models"
    for name, count in sorted(result.without_score.items()):
        recorded = ", ".join(sorted(result.recorded))
        yield f"skipped: {count:,} decisions of {name} without {result.policies[name].score_name}; recorded: {recorded}"
    if result.broken:
        yield f"skipped: {len(result.broken):,} lines that are no audit lines, the first at {result.broken[0]}"


def _told(policy: Policy) -> str:
    guarantee = policy.guarantee
    delta = "" if guarantee.kind == "marginal" else f" with delta {guarantee.delta:g}"
    doubt = f", alpha_conf {policy.alpha_conf:g}" if policy.alpha_conf else ""
    return f"{policy.score_name}, target {policy.target_id_acceptance:g}, {guarantee.kind}{delta}{doubt}"
