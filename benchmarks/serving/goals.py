# SPDX-License-Identifier: Apache-2.0
"""Every goal of the engine beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite
from statistics import median
from typing import Any

from benchmarks.serving.results import COMMON, efficiency, modes, spread
from benchmarks.serving.servers import PEERS

Run = dict[str, Any]
FORMS = (("auto", "as set up by itself"), ("fp32", "fp32 eager"))


@dataclass(frozen=True)
class Goal:
    """One row: what, its bound (at least, or at most), and a value from each repeat."""

    what: str
    least: float | None
    most: float | None
    values: tuple[float, ...]
    digits: int = 2

    @property
    def met(self) -> bool | None:
        """Whether the median is within the bound; None where nothing was measured."""
        if not self.values:
            return None
        middle = spread(self.values)[1]
        return (self.least is None or middle >= self.least) and (self.most is None or middle <= self.most)


class Measured:
    """The runs of all workloads and the experiments, by what is asked of them."""

    def __init__(
        self,
        runs: dict[str, Sequence[Run]],
        experiments: Sequence[dict[str, Any]],
        start_up: Mapping[str, Sequence[float]] | None = None,
        decoding: Mapping[str, Any] | None = None,
    ) -> None:
        self._runs, self._experiments = runs, experiments
        self.start_up = start_up or {}  # of the default model's server, alone
        self.decoding = decoding or {}  # by file, of one thread

    def of(self, workload: str, server: str, asked: str) -> list[Run]:
        """The runs of a server, by repeat."""
        found = [run for run in self._runs.get(workload, ()) if (run["server"], run["asked"]) == (server, asked)]
        return sorted(found, key=lambda run: int(run["repeat"]))

    def experiment(self, kind: str, workload: str, asked: str = "fp32") -> list[dict[str, Any]]:
        """The repeats of an experiment with oodgate."""
        wanted = (kind, workload, "oodgate", asked)
        for one in self._experiments:
            if (one["kind"], one["workload"], one["server"], one["asked"]) == wanted:
                return list(one["runs"])
        return []

    def over_peers(
        self,
        workload: str,
        asked: tuple[str, str],
        figure: Callable[[Run], float | None],
        best: Callable[[Iterable[float]], float] = max,
        peers: Sequence[str] = PEERS,
    ) -> tuple[float, ...]:
        """In each repeat, oodgate's figure over the best peer's; asked: the precision of oodgate and of the peers.

        A figure is None where a run did not measure it.
        """
        found = [(run, figure(run)) for run in self.of(workload, "oodgate", asked[0])]  # infinite where requests failed
        ours = {run["repeat"]: value for run, value in found if value is not None}
        theirs: dict[int, list[float]] = {}
        for peer in peers:
            for run in self.of(workload, peer, asked[1]):
                if (value := figure(run)) is not None and isfinite(value):
                    theirs.setdefault(run["repeat"], []).append(value)
        return tuple(ours[repeat] / best(theirs[repeat]) for repeat in sorted(ours.keys() & theirs.keys()))


def saturated(run: Run) -> float:
    """Images per second at the concurrency that gives most."""
    return max(float(found["images_per_s"]) for found in (run["counted"], *run["closed"].values()))


def closed(concurrency: int, figure: str) -> Callable[[Run], float]:
    return lambda run: float(run["closed"][str(concurrency)][figure])


def _tail(load: str) -> Callable[[Run], float | None]:
    return lambda run: float(run["open"][load]["p99_ms"]) if load in run["open"] else None


def goals(measured: Measured) -> list[Goal]:
    """All goals in the order of the issue that set them."""
    found = [*_against_limit(measured), *_against_peers(measured), *_alone(measured), *_experiments(measured)]
    return [*found, *_decoding(measured)]


def _each(runs: Iterable[Run], figure: Callable[[Run], float]) -> tuple[float, ...]:
    return tuple(figure(run) for run in runs)


def _against_limit(measured: Measured) -> list[Goal]:
    rows = []
    for workload, least in (("A", 0.95), ("B", 0.93), ("C", 0.95)):
        for asked in ("auto", "fp32", "bf16"):
            runs = measured.of(workload, "oodgate", asked)
            if runs or asked == "fp32":
                how = f"{runs[0]['precision']} {modes(runs)}" if runs else "fp32 eager"
                by_itself = ", as set up by itself" if asked == "auto" else ""
                what = f"{workload}: efficiency against the limit, {how}{by_itself}"
                rows.append(Goal(what, least, None, _each(runs, efficiency)))
    return rows


def _against_peers(measured: Measured) -> list[Goal]:
    rows = []
    for workload, least in (("A", 1.05), ("B", 1.0), ("C", 1.05)):
        for asked in ("fp32", "bf16"):
            ratios = measured.over_peers(workload, (asked, asked), efficiency)
            if ratios or asked == "fp32":
                rows.append(Goal(f"{workload}: efficiency ÷ best peer, {asked} eager", least, None, ratios))
    for workload, least in (("A", 1.8), ("C", 2.2)):
        ratios = measured.over_peers(workload, ("auto", "fp32"), saturated)
        rows.append(Goal(f"{workload}: saturated throughput as set up by itself ÷ best peer", least, None, ratios))
    for asked, how in FORMS:
        single = measured.over_peers("A", (asked, "fp32"), closed(1, "p50_ms"), min, ("fastapi",))
        rows.append(Goal(f"A: p50 at concurrency 1, {how} ÷ plain FastAPI's", None, 1.05, single))
    loads = ((COMMON, "one rate for all, near 90 % of the best peer's"), ("90%", "90 % of its own throughput each"))
    for workload, (load, at), (asked, how) in product("ABCDN", loads, FORMS):
        tails = measured.over_peers(workload, (asked, "fp32"), _tail(load), min)
        if tails or (workload in "ABC" and (load, asked) == (COMMON, "auto")):
            rows.append(Goal(f"{workload}: p99 at {at}, {how} ÷ best peer's", None, 0.8, tails))
    return rows


def _alone(measured: Measured) -> list[Goal]:
    rows = []
    for asked, how in FORMS:
        null = measured.of("N", "oodgate", asked)
        rows += [
            Goal(f"N: requests/s at concurrency 32, {how}", 2400, None, _each(null, closed(32, "images_per_s")), 0),
            Goal(f"N: p99 at concurrency 32, {how}, ms", None, 30, _each(null, closed(32, "p99_ms")), 1),
            Goal(f"N: p50 at concurrency 1, {how}, ms", None, 1, _each(null, closed(1, "p50_ms"))),
        ]
    for key, what, most, digits in (
        ("resident_mb", "resident memory when ready, eager, MB", 700, 0),
        ("resident_mb_after_2000_images", "resident memory after 2,000 images from 32 callers, eager, MB", 700, 0),
        ("seconds_to_ready", "import to ready, s", 5, 1),
    ):
        rows.append(Goal(f"default model alone: {what}", None, most, tuple(measured.start_up.get(key, ())), digits))
    return rows


def _decoding(measured: Measured) -> list[Goal]:
    rows = []
    for kind, least in (("baseline", 4.0), ("progressive", 1.8)):
        for name, row in measured.decoding.items():
            if name.startswith(f"12 megapixels, {kind}"):
                speed = row["speed"]["oodgate"]
                what = f"JPEG of {name}: speed ÷ full decode and resize"
                rows.append(Goal(what, least, None, (speed["min"], speed["median"], speed["max"])))
    return rows


def _experiments(measured: Measured) -> list[Goal]:
    def second(run: dict[str, Any]) -> float:
        return float(run["after_ms"][1] / median(run["before_ms"]))

    def fair(run: dict[str, Any]) -> float:
        return float(run["share_of_fair"])

    def grown(figure: str) -> Callable[[dict[str, Any]], float]:
        return lambda run: float(run["levels"]["512"][figure] / run["levels"]["32"][figure])

    rows = []
    for workload, (asked, how) in product("ABN", FORMS):
        runs = measured.experiment("verdict", workload, asked)
        if runs or (workload, asked) == ("A", "fp32"):
            what = f"{workload}, {how}: throughput with verdict ÷ prediction only, same server"
            rows.append(Goal(what, 0.95, None, _each(runs, lambda run: float(run["ratio"]))))
            cost = f"{workload}, {how}: the same, images per CPU-second"
            rows.append(Goal(cost, 0.95, None, _each(runs, lambda run: float(run["ratio_per_cpu_s"]))))
    for what, kind, least, most, figure, digits in (
        ("second request after a burst ÷ median single request before it", "burst", None, 1.2, second, 2),
        ("throughput at 512 ÷ at 32 concurrent", "growth", 0.95, None, grown("images_per_s"), 2),
        ("memory at 512 ÷ at 32 concurrent", "growth", None, 1.1, grown("resident_mb"), 2),
        ("p99 at 512 ÷ at 32 concurrent (a queue 16 times as long)", "growth", None, 16, grown("p99_ms"), 1),
        ("share of its fair share beside a busy neighbour", "neighbour", 0.8, None, fair, 2),
    ):
        for asked, how in FORMS:
            runs = measured.experiment(kind, "A", asked)
            if runs or asked == "fp32":
                rows.append(Goal(f"A, {how}: {what}", least, most, _each(runs, figure), digits))
    return rows
