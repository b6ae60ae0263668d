# SPDX-License-Identifier: Apache-2.0
"""The result of an evaluation as Markdown; reads what `evaluate` returns, or what an older one stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def table(result: Row, score: str) -> str:
    """The evaluation of one score as a Markdown table; one line where there is no OOD set."""
    known = result["id"]
    low, high = known["acceptance_interval"]
    accuracy = "" if known["accuracy"] is None else f", accuracy {known['accuracy']:.2%}"
    head = (
        f"In-distribution test images: {known['n']:,}{accuracy}, accepted {known['acceptance']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%})."
    )
    if not result["decisions"]:
        return head
    lines = [
        head,
        "",
        f"| OOD set | images | deferred | AUROC of `{score}` | OOD missed at ID 95 % | ID flagged at OOD 95 % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["scores"][score]["ood"].items():
        decision = result["decisions"][name]
        lines.append(_row(f"{name} ({decision['group']})", f"{decision['n']:,}", f"{decision['deferral']:.1%}", row))
    for group in ("near", "far"):
        if result["scores"][score][group]:
            lines.append(_row(f"mean {group}", "", "", result["scores"][score][group]))
    left_out = {name: row["left_out"] for name, row in result["decisions"].items() if row.get("left_out")}
    if left_out:
        told = ", ".join(f"{n:,} of {name}" for name, n in left_out.items())
        lines += ["", f"Left out, because the OOD prototype was made of them: {told}."]
    return "\n".join(lines)


def details_table(result: Row, score: str) -> str:
    """Intervals, AUPR and the measures of classify-or-defer of one score, by OOD set, as a Markdown table."""
    measured = result["scores"][score]
    rows = {"none: in-distribution alone": measured["id"]} | measured["ood"]
    rows |= {f"mean {group}": measured[group] for group in ("near", "far") if measured[group]}
    lines = [
        f"| OOD set mixed in | AUROC of `{score}`, 95 % interval | AUPR, OOD | AUPR, ID | AURC | AUGRC |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        interval = "{:.2%} to {:.2%}".format(*row["auroc_interval"]) if "auroc_interval" in row else ""
        cells = [interval, *(_percent(row.get(key)) for key in ("aupr_ood", "aupr_id", "aurc", "augrc"))]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def shifted_table(result: Row) -> str:
    """Acceptance and accuracy under other imaging as a Markdown table, the plain test images first."""
    lines = [
        "| imaging | images | accepted | 95 % interval | accuracy | accuracy of the accepted |",
        "|---|" + "---:|" * 5,
    ]
    for name, row in ({"as calibrated": result["id"]} | result["shifted"]).items():
        interval = "{:.2%} to {:.2%}".format(*row["acceptance_interval"])
        accuracies = f"{_percent(row['accuracy'])} | {_percent(row['accuracy_of_accepted'])}"
        lines.append(f"| {name} | {row['n']:,} | {row['acceptance']:.2%} | {interval} | {accuracies} |")
    return "\n".join(lines)


def scores_table(result: Row) -> str:
    """All scores side by side as a Markdown table: near and far means of AUROC and of both errors at 95 %."""
    titles = {
        "auroc": "AUROC",
        "ood_miss_rate_at_id95": "OOD missed at ID 95 %",
        "id_flag_rate_at_ood95": "ID flagged at OOD 95 %",
    }
    columns = [(group, key, f"{group}: {title}") for key, title in titles.items() for group in ("near", "far")]
    columns = [column for column in columns if any(row[column[0]] for row in result["scores"].values())]
    others = [name for name, decision in result["decisions"].items() if decision["group"] == "other"]
    columns += [(name, key, f"{name}: {title}") for name in others for key, title in titles.items()]
    lines = [f"| score | {' | '.join(title for _, _, title in columns)} |", "|---|" + "---:|" * len(columns)]
    for name, row in result["scores"].items():
        known = row["ood"] | {group: row[group] for group in ("near", "far")}
        cells = [_percent(known[group].get(key)) for group, key, _ in columns]
        lines.append(f"| {' | '.join([f'`{name}`', *cells])} |")
    return "\n".join(lines)


def summary(result: Row, score: str) -> str:
    """The whole report on a page of Markdown, `score` being the one that decides."""
    parts = [table(result, score)]
    if result["decisions"] or result["scores"][score]["id"]["aurc"] is not None:
        parts.append(details_table(result, score))
    if result["shifted"]:
        parts.append(shifted_table(result))
    if result["decisions"]:
        parts.append(scores_table(result))
    seconds = result["seconds_per_image"]
    scores = ", ".join(f"`{name}` {1000 * value:.2f}" for name, value in seconds["scores"].items())
    parts.append(
        f"Milliseconds an image, in batches of {seconds['batch']}: reading {1000 * seconds['read']:.2f}, network "
        f"{1000 * seconds['network']:.2f}; scores: {scores}."
    )
    return "\n\n".join(parts)


def _row(name: str, n: str, deferral: str, row: Mapping[str, float]) -> str:
    return (
        f"| {name} | {n} | {deferral} | {row['auroc']:.2%} | {row['ood_miss_rate_at_id95']:.1%} | "
        f"{row['id_flag_rate_at_ood95']:.1%} |"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
