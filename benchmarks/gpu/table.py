# SPDX-License-Identifier: Apache-2.0
"""What was measured on an accelerator, in Markdown."""

from __future__ import annotations

from typing import Any

STEPS = {
    "upload_pageable": "upload, pageable",
    "upload_staged": "upload, pinned",
    "forward_contiguous": "forward, contiguous",
    "forward_channels_last": "forward, channels last",
    "forward_recorded": "forward, CUDA graph",
    "forward_compiled": "forward, compiled",
    "bank_search": "GROOD alone",
    "engine": "engine",
}
GOALS = {
    "engine_of_compiled_forward": "the engine's share of the compiled forward at batch 64, at least",
    "grood_adds": "GROOD's time over that of the compiled forward at batch 64, at most",
    "p99_ms_over_forward": "p99 of one image at a time over the forward's, ms, at most",
}


def table(result: dict[str, Any]) -> str:
    """Goals, images a second by precision and batch, JPEG files a second, golden decisions."""
    return "\n\n".join([_goals(result), *_rates(result), _jpegs(result), _golden(result), _conditions(result)])


def _goals(result: dict[str, Any]) -> str:
    precisions = result["precisions"]
    lines = [f"| goal | bound | {' | '.join(precisions)} |", "|---|---:|" + "---:|" * len(precisions)]
    for name, title in GOALS.items():
        cells = [_number(found.get("reached", {}).get(name)) for found in precisions.values()]
        lines.append(f"| {title} | {result['goals'][name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rates(result: dict[str, Any]) -> list[str]:
    tables = []
    for precision, found in result["precisions"].items():
        by_batch = sorted(found["images_per_second"].items(), key=lambda item: int(item[0]))
        steps = [step for step in STEPS if any(step in rates for _, rates in by_batch)]
        lines = [
            f"| {precision}, images/s at batch | {' | '.join(STEPS[step] for step in steps)} |",
            "|---:|" + "---:|" * len(steps),
        ]
        for size, rates in by_batch:
            cells = [f"{rates[step]:,.0f}" if step in rates else "failed" for step in steps]
            lines.append(f"| {size} | {' | '.join(cells)} |")
        if found["not_measured"]:
            lines += ["", f"Not measured for lack of time: {', '.join(map(str, found['not_measured']))}."]
        tables.append("\n".join(lines))
    return tables


def _jpegs(result: dict[str, Any]) -> str:
    lines = ["| JPEG, 500 x 375 to 224 x 224 | files/s |", "|---|---:|"]
    rates = result["jpeg_files_per_second"].items()
    return "\n".join(
        [*lines, *(f"| {name.replace('_', ', ', 1).replace('_', ' ')} | {rate:,.0f} |" for name, rate in rates)]
    )


def _golden(result: dict[str, Any]) -> str:
    lines = ["| golden images by | decisions as on the CPU | largest score difference |", "|---|---|---:|"]
    for path, found in result["golden"].items():
        apart = found.get("failed") or f"{found['largest_score_difference']:.2g}"
        lines.append(f"| {path} | {'yes' if found['same'] else '**no**'} | {apart} |")
    return "\n".join(lines)


def _conditions(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['network']}; a bank of {result['bank']:,}. {result['device']}, {result['machine']['cores']} cores, "
        f"CUDA {result['machine']['cuda']}; {versions}."
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
