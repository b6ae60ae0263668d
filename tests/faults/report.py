# SPDX-License-Identifier: Apache-2.0
"""What the soak and the fuzzing found, as the table of docs/reliability.md, and the promises that they must keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.readme import replaced

Result = dict[str, Any]
Row = tuple[str, str, int]

RESULTS, DOCUMENT = Path("tests/faults/results"), Path("docs/reliability.md")
OVERLOAD = 10  # times what the server can do
LEAST_WORK = 0.85  # of the unloaded work for each second of processor time, under overload
OVERLOADS = ("overload", "overload_small")
MOST_PROBE_MS = 50
MOST_ERRORS = 3  # standard errors of the slope that pass for noise
MOST_SLOPE = 1.0  # MB/h beyond the noise; one step of the allocator's, 132 KiB, in 15 minutes makes up to 0.8
MOST_AGAIN = 5.0  # MB that the second round of made-up inputs may take; the allocator gives and takes a few

PROMISES: list[tuple[str, Callable[[Result], bool]]] = [
    ("every large image is judged and every probe answered with 200",
     lambda r: r["decoding"]["answered"] == r["decoding"]["images"] and not r["decoding"]["probes_failed"]),
    (f"liveness p99 under {MOST_PROBE_MS} ms meanwhile", lambda r: r["decoding"]["probe_p99_ms"] < MOST_PROBE_MS),
    ("nobody loses an answer to callers who leave", lambda r: not r["vanishing"]["wrong"]),
    ("under overload only 200, 429 with Retry-After, and 504",
     lambda r: all(r[each]["statuses"].keys() <= {"200", "429", "504"}
                   and not r[each]["refusals_without_retry_after"] for each in OVERLOADS)),
    ("admitted requests meet their deadline",
     lambda r: all(r[each]["admitted_p99_ms"] <= r[each]["deadline_ms"] for each in OVERLOADS)),
    (f"photos at 224 px: at least {LEAST_WORK:.0%} of the unloaded work for each second of processor time",
     lambda r: r["overload"]["admitted_per_cpu_s"] >= LEAST_WORK * r["overload"]["unloaded_per_cpu_s"]),
    ("bodies that never end get 408, others 200 meanwhile",
     lambda r: (r["mistreatment"]["slow"].keys(), r["mistreatment"]["beside_slow"].keys()) == ({"408"}, {"200"})),
    ("pipelined requests are answered in order", lambda r: r["mistreatment"]["pipelined_in_order"]),
    ("beside idle connections others get 200", lambda r: r["mistreatment"]["beside_idle"].keys() == {"200"}),
    ("no file stays open", lambda r: r["mistreatment"]["open_files_more"] <= 2),
    ("in mixed traffic no request is lost and nothing is logged as an error",
     lambda r: not r["mixed"]["lost"] and not r["mixed"]["errors_logged"]),
    (f"resident memory grows by less than {MOST_SLOPE:g} MB/h beyond its noise",
     lambda r: r["mixed"]["resident_slope_mb_per_h"]
               < MOST_SLOPE + MOST_ERRORS * r["mixed"]["resident_slope_error_mb_per_h"]),
]  # fmt: skip
FUZZ_PROMISES: list[tuple[str, Callable[[Result], bool]]] = [
    (
        f"other inputs of the same kind take less than {MOST_AGAIN:g} MB more",
        lambda r: max(r[stage]["growth_again_mb"] for stage in ("images", "requests")) < MOST_AGAIN,
    ),
]


def write(name: str, result: Result) -> None:
    """Store what was found, and show it in the document."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), "measured", table()))


def require(result: Result) -> None:
    """End with an error where a promise was broken."""
    broken = [promise for promise, kept in result["promises"].items() if not kept]
    if broken:
        raise SystemExit("broken: " + "; ".join(broken))


def table() -> str:
    """What was done, what was seen, what was lost; the promises; the machine."""
    result, fuzzed = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("soak", "fuzz"))
    rows = [*_load(result), *_mistreatment(result["mistreatment"]), _mixed(result["mixed"]), *_fuzzed(fuzzed)]
    lines = ["| what was done | what was seen | lost |", "|---|---|---|"]
    lines += [f"| {done} | {seen} | {losses} |" for done, seen, losses in rows]
    promises = result["promises"] | fuzzed["promises"]
    lines += ["", *(f"- {'kept' if kept else '**broken**'}: {promise}" for promise, kept in promises.items())]
    where = result["machine"]
    lines += [
        "",
        f"Measured on {where['cores']} cores ({where['processor']}), load average {where['load']} at the start, "
        f"callers and server on the same machine; Python {where['python']}, torch {where['torch']}, CPU.",
    ]
    return "\n".join(lines)


def _load(result: Result) -> Iterator[Row]:
    large, leaving = result["decoding"], result["vanishing"]
    yield (
        f"{large['images']} JPEGs of 12 megapixels at once",
        f"liveness p50 {large['probe_p50_ms']} ms, p99 {large['probe_p99_ms']} ms of {large['probes']:,} probes; event "
        f"loop late by {large['loop_lag_mean_ms']} ms on average",
        large["images"] - large["answered"],
    )
    yield (
        f"{leaving['requests']:,} requests, of which {leaving['left']:,} callers leave",
        f"{leaving['answered']:,} answered, each once and with its own answer; queue back at 0",
        leaving["wrong"],
    )
    yield _overload(result["overload"])
    yield _overload(result["overload_small"])


def _overload(over: Result) -> Row:
    statuses = over["statuses"]
    work = over["admitted_per_cpu_s"] / over["unloaded_per_cpu_s"]
    return (
        f"{over['workload']}: {over['offered_per_s']:,} requests/s, {OVERLOAD} times capacity, "
        f"for {over['seconds']:g} s",
        f"{statuses.get('200', 0):,} admitted and answered (p99 {over['admitted_p99_ms']:,.0f} ms; deadline "
        f"{over['deadline_ms']:,.0f} ms), {statuses.get('429', 0):,} refused with Retry-After (p99 "
        f"{over['refused_p99_ms']:,.0f} ms), {statuses.get('504', 0):,} late (504); {work:.0%} of the unloaded work "
        f"for each second of processor time; memory {over['growth_mb']:+} MB",
        statuses.get("0", 0),
    )


def _mistreatment(seen: Result) -> Iterator[Row]:
    slow = sum(seen["slow"].values())
    yield f"{slow:,} bodies that never end", "408 for each, 200 for others meanwhile", slow - seen["slow"].get("408", 0)
    ends = ", ".join(f"{count} {end}" for end, count in sorted(seen["half_closed"].items()))
    yield f"{sum(seen['half_closed'].values())} half-closed connections", ends, 0
    order = "answered in order" if seen["pipelined_in_order"] else "answered out of order"
    yield f"{seen['pipelined']:,} pipelined requests", order, 0
    yield (
        f"{seen['idle']:,} idle connections",
        f"closed by the server after their time; {sum(seen['beside_idle'].values()):,} requests beside them answered; "
        f"memory {seen['growth_mb']:+} MB after these four",
        0,
    )


def _mixed(seen: Result) -> Row:
    memory, files = seen["resident_mb"], seen["open_files"]
    return (
        f"{seen['minutes']:g} min of mixed traffic: {seen['requests']:,} requests",
        f"resident memory {memory['first']} to {memory['last']} MB, slope {seen['resident_slope_mb_per_h']} ± "
        f"{seen['resident_slope_error_mb_per_h']} MB/h; {files['least']} to {files['most']} open files",
        seen["lost"],
    )


def _fuzzed(seen: Result) -> Iterator[Row]:
    images, requests = seen["images"], seen["requests"]
    yield (
        f"{images['tried']:,} damaged JPEG, PNG and WebP files",
        f"{images['ends']['decoded']:,} decoded, the others refused by name; {_growth(images)}",
        0,
    )
    statuses = ", ".join(f"{count:,} got {status}" for status, count in sorted(requests["ends"].items()))
    yield (
        f"{requests['tried']:,} requests made up after the OpenAPI document",
        f"documented answers alone: {statuses}; {_growth(requests)}",
        0,
    )


def _growth(seen: Result) -> str:
    return f"memory {seen['growth_mb']:+} MB in the first half, {seen['growth_again_mb']:+} MB in the second"
