# SPDX-License-Identifier: Apache-2.0
"""Write what was measured into docs/scaling.md.

python -m benchmarks.scaling.table
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.readme import replaced

DOCUMENT, RESULTS = Path("docs/scaling.md"), Path("benchmarks/scaling/results")
ABLATIONS = Path("benchmarks/accuracy/results")
IMAGENET, BILLION = 1_281_167, 1_000_000_000
STAGES = {
    "decode": "decode, 500 x 375 JPEG to 224 x 224",
    "extract": "extract, ResNet-50 forward in float32",
    "gather": "gather for five scores, without the mix-up",
}


def main() -> None:
    text = DOCUMENT.read_text()
    for section in (stages, bank, replicas, index, recall):
        text = replaced(text, section.__name__, section())
    DOCUMENT.write_text(text)


def loaded(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def stages() -> str:
    measured = loaded(RESULTS / "stages.json")
    cost, size = measured["core_seconds_per_image"], measured["bytes"]
    rows = [
        f"| {title} | {1000 * cost[name]:.2f} | {1 / cost[name]:,.0f} | {cost[name] * IMAGENET / 3600:.2f} "
        f"| {cost[name] * BILLION / 3600:,.0f} |"
        for name, title in STAGES.items()
    ]
    whole = sum(cost.values())
    shapes = {
        "a shard of 512 decoded images": 512 * size["decoded_image"],
        "class sums, 1,000 x 2,048": size["gathered_ClassSums"],
        "scatter, 2,048 x 2,048": size["gathered_Scatter"],
        "a bank of 10,000 features": size["bank_of_10000_features"],
        "the mix-up's class sums at `layer1`": size["class_sums_of_the_early_layer"],
    }
    peak = megabytes(measured["peak_resident_bytes"])
    return "\n".join(
        [
            "| stage | core ms an image | images a core second | ImageNet-1K, core hours | 10^9 images, core hours |",
            "|---|---:|---:|---:|---:|",
            *rows,
            f"| together | {1000 * whole:.2f} | {1 / whole:,.0f} | {whole * IMAGENET / 3600:.1f} "
            f"| {whole * BILLION / 3600:,.0f} |",
            "",
            "| in memory | MB | |",
            "|---|---:|---|",
            f"| peak of the measuring process, batches of 64 | {peak} | measured |",
            *(f"| {title} | {megabytes(count)} | computed from the shape |" for title, count in shapes.items()),
            "",
            conditions("stages", measured),
        ]
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def bank() -> str:
    networks = {
        path.stem.removeprefix("ablations-"): loaded(path)["rows"]
        for path in sorted(ABLATIONS.glob("ablations-*.json"))
    }
    lines = [
        f"| score | bank | {' | '.join(f'{name}, near | {name}, far' for name in networks)} |",
        "|---|---:|" + "---:|" * (2 * len(networks)),
    ]
    for score in ("grood", "knn", "fusion"):
        curves = [bank_curve(rows, score) for rows in networks.values()]
        for size in sorted(curves[0]):
            cells = [f"{100 * curve[size][group]:.2f}" for curve in curves for group in ("near", "far")]
            lines.append(f"| `{score}` | {size:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "`python -m benchmarks.accuracy.ablations --network NAME`"])


def bank_curve(rows: dict[str, dict[str, float]], score: str) -> dict[int, dict[str, float]]:
    """AUROC of a score by the size of the bank."""
    found = ((re.fullmatch(rf"`{score}`, bank of ([\d,]+)", title), row) for title, row in rows.items())
    return {int(match[1].replace(",", "")): row for match, row in found if match}


def index() -> str:
    measured = loaded(RESULTS / "index.json")
    rows = [
        f"| {int(size):,} | {each['exact_ms_in_batches_of_1']:.1f} | {each['index_ms_in_batches_of_1']:.1f} "
        f"| {each['exact_ms_in_batches_of_32']:.1f} | {each['index_ms_in_batches_of_32']:.1f} "
        f"| {100 * each['same_score']:.1f} | {100 * each['largest_excess']:.2f} | {each['training_s']:.0f} "
        f"| {each['loading_s']:.1f} |"
        for size, each in measured["rows"].items()
    ]
    return "\n".join(
        [
            "| bank rows | alone: exact | index | in batches of 32: exact | index | same score, % | farthest over, % "
            "| fit, s | load, s |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"Features {measured['features']}; {measured['lists_searched']} lists searched. "
            f"{conditions('index', measured)}",
        ]
    )


def recall() -> str:
    measured = loaded(RESULTS / "recall.json")
    lines = [
        "| network, dimensions | score | bank rows | same score, % of queries | farthest over, % "
        "| near AUROC, %: exact | index | far: exact | index |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for network, its in measured.items():
        for size, name, found in ((size, *each) for size, scores in its["rows"].items() for each in scores.items()):
            ways = [f"{way}_{group}_auroc" for group in ("near", "far") for way in ("exact", "index")]
            lines.append(
                f"| {network}, {its['dimensions']} | `{name}` | {int(size):,} | {100 * found['same_score']:.2f} "
                f"| {100 * found['largest_excess']:.1f} | {' | '.join(f'{100 * found[way]:.3f}' for way in ways)} |"
            )
    [last] = list(measured.values())[-1:]
    asked = ", ".join(f"{its['queries']:,} ({network})" for network, its in measured.items())
    said = f"Queries: {asked}; {last['lists_searched']} lists searched."
    loads = ", ".join(f"{its['machine']['load_average']:.0f}" for its in measured.values())
    return "\n".join([*lines, "", f"{said} Load of each: {loads}. {conditions('recall --network NAME', last)}"])


def replicas() -> str:
    measured = loaded(RESULTS / "replicas.json")
    rates = {count: sorted(each) for count, each in measured["verdicts_per_second"].items()}
    return "\n".join(
        [
            "| replicas, one core each | verdicts a second, median (least-most) |",
            "|---|---:|",
            *(f"| {n} | {median(each):,.0f} ({each[0]:,.0f}-{each[-1]:,.0f}) |" for n, each in rates.items()),
            "",
            f"Two against one: {measured['two_against_one']:.2f}. {measured['image']}, {measured['callers']} callers.",
            conditions("replicas", measured),
        ]
    )


def conditions(command: str, measured: dict[str, Any]) -> str:
    """What wrote a result, the versions and the machine, in a line."""
    machine = measured["machine"]
    loads = machine["load_average"]
    busy = f"{loads:.0f}" if isinstance(loads, float) else f"{min(loads):.0f} to {max(loads):.0f}"
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    return (
        f"`python -m benchmarks.scaling.{command}`: {versions}; {machine['cores']} cores, load {busy} while measuring."
    )


if __name__ == "__main__":
    main()
