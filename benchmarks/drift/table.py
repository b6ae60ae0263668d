# SPDX-License-Identifier: Apache-2.0
"""Write the measured tables into docs/drift.md.

python -m benchmarks.drift.table
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.drift import replay, simulate
from benchmarks.drift.watch import OPTIONS, OURS, RIVALS
from benchmarks.readme import replaced

PAGE = Path("docs/drift.md")
ANYTIME = ("exchangeability", "deferral_rate", "fixed_martingale")  # promised for a stream, not for a million images
NEVER_FULL = "window_10000"  # the real sets are too small for it
ACTED_ON = "cusum"


def main() -> None:
    simulated, real = (json.loads(path.read_text()) for path in (simulate.RESULT, replay.RESULT))
    text = PAGE.read_text()
    for marker, content in parts(simulated, real).items():
        text = replaced(text, marker, content)
    PAGE.write_text(text)


def parts(simulated: Mapping[str, Any], real: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the markers of the page."""
    return {
        "headline": headline(simulated, real),
        "false-alarms": false_alarms(simulated),
        "delays": delays(simulated["delays"]),
        "replay": replayed(real),
    }


def headline(simulated: Mapping[str, Any], real: Mapping[str, Any]) -> str:
    limits = simulated["limits"]["cusum"]
    sentences = []
    for share in simulate.SHARES:
        sets = [found["tests"][ACTED_ON] for found in real["delays"] if found["share"] == share]
        (early,) = [
            found["tests"][ACTED_ON]
            for found in simulated["delays"]
            if found["share"] == share and found["before"] == simulate.CHANGES[0][0]
        ]
        sentences.append(
            f"**An admixture of {share:.0%} OOD images** is found by `{ACTED_ON}` within {most(sets)} images in 90 % "
            f"of orders for each of the {len(sets)} real OOD sets, and within {count(early['within'])} in 90 % of "
            "simulated streams."
        )
    sentences.append(
        f"With {simulate.CALIBRATION:,} calibration scores the CUSUM has p₀ = {limits['deferral_rate']:.4f}, "
        f"p₁ = {limits['shifted_rate']:.4f} and the limit {limits['limit']}: {limits['run_length']:,.0f} images to a "
        f"false alarm on average at p₀, {limits['delay']:,.0f} to an alarm at p₁, both computed exactly."
    )
    return "\n".join(sentences)


def false_alarms(simulated: Mapping[str, Any]) -> str:
    pure = simulated["false_alarms"]
    heads = [f"n = {part['n']:,}: {part['runs']:,} streams of {part['images']:,} images" for part in pure]
    rows = []
    for name in (*OURS, *RIVALS):
        cells = [measured(name, part, simulated["promise"][name]) for part in pure]
        rows.append([title(name), promised(name, simulated["promise"][name]), *cells])
    return grid(["test", "promise", *heads], rows)


def promised(name: str, value: float) -> str:
    if name in ANYTIME:
        return f"an alarm in {value:.0%} of streams"
    kept = f", in {1 - OPTIONS.run_length_delta:.1%} of calibrations" if name == "cusum" else ""
    return f"{value:g} a million images{kept}"


def share_allowed(name: str, images: int, promise: float) -> float:
    """The share of streams of this length that may raise an alarm; for the CUSUM, unlucky calibrations beside."""
    return promise if name in ANYTIME else OPTIONS.run_length_delta + promise * images / 1e6


def measured(name: str, part: Mapping[str, Any], promise: float) -> str:
    test = part["tests"][name]
    if name in (*ANYTIME, "cusum"):
        low, high = test["share_interval"]
        allowed = share_allowed(name, part["images"], promise)
        seen = f"{test['streams_with_alarm']} of {part['runs']} streams ({low:.1%} to {high:.1%})"
        return f"{seen}; {allowed:.1%} allowed" if name == "cusum" else seen
    return f"{test['per_million']:.2g} a million ({test['alarms']} in all)"


def delays(found: Sequence[Mapping[str, Any]]) -> str:
    heads = [f"{part['share']:.0%} OOD after {part['before']:,} images" for part in found]
    rows = [[title(name), *(delay(part["tests"][name]) for part in found)] for name in (*OURS, *RIVALS)]
    return grid(["test", *heads], rows)


def replayed(real: Mapping[str, Any]) -> str:
    names = [name for name in (*OURS, *RIVALS) if not name.endswith(NEVER_FULL)]
    rows = [
        [
            f"{part['ood']}, {part['share']:.0%}",
            f"{part['deferred']:.0%}",
            *(delay(part["tests"][name]) for name in names),
        ]
        for part in real["delays"]
    ]
    alarmed = [f"{real['alarmed_orders'][name]} of {real['orders']} orders" for name in names]
    rows.append([f"none ({real['images']:,} ID images)", "", *alarmed])
    return grid(["OOD set, share", "of it deferred", *map(title, names)], rows)


def delay(test: Mapping[str, float | None]) -> str:
    """Median and 90 % quantile of the delay, and the share of runs that found the change where not all did."""
    if not test["runs"]:
        return "always in alarm before"
    missed = f", {test['found']:.0%} found" if test["found"] is not None and test["found"] < 1 else ""
    return f"{count(test['median'])} / {count(test['within'])}{missed}"


def count(images: float | None) -> str:
    return "-" if images is None else f"{images:,.0f}"


def most(tests: Sequence[Mapping[str, float | None]]) -> str:
    delays = [test["within"] for test in tests]
    return count(None if None in delays else max(delay for delay in delays if delay is not None))


def title(name: str) -> str:
    return f"*{name}*" if name in RIVALS else f"`{name}`"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
