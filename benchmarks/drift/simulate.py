# SPDX-License-Identifier: Apache-2.0
"""False alarms and delays of the drift tests on simulated scores; the calibration is drawn anew in every run.

    python -m benchmarks.drift.simulate

In-distribution scores are N(0, 1), OOD scores N(1.645, 1), of which about half are deferred; tests that see only ranks
and deferrals do not care about the shape of the first. Writes benchmarks/drift/results/simulation.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from benchmarks.drift.watch import OPTIONS, OURS, RIVALS, alarms_on, delays_on, reference, summary
from detector.calibration import Scores, clopper_pearson
from service.drift import Drift

RESULT = Path("benchmarks/drift/results/simulation.json")
OOD_MEAN = 1.645
PURE = ((1_000, 200, 20_000), (5_000, 200, 20_000))  # calibration scores, runs, images a run
CHANGES = ((2_000, 50), (50_000, 10))  # in-distribution images before the change, runs
SHARES = (0.05, 0.2)
HORIZON, CALIBRATION = 20_000, 5_000  # images after the change, calibration scores


def main() -> None:
    started = time.process_time()
    pure = [false_alarms(*setting) for setting in PURE]
    found = [delays(share, before, runs) for share in SHARES for before, runs in CHANGES]
    result = {
        "numpy": np.__version__,
        "ood_mean": OOD_MEAN,
        "promise": promise(),
        "limits": limits(),
        "false_alarms": pure,
        "delays": found,
        "cpu_seconds": round(time.process_time() - started),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def promise() -> dict[str, float]:
    """False alarms promised: a million images for windows and CUSUM, a stream for the others."""
    budget = OPTIONS.window_alarms_per_million / len(OPTIONS.windows)
    windows = {f"{kind}_{size}": budget for kind in ("window", "binomial_window") for size in OPTIONS.windows}
    return windows | {
        "cusum": 1e6 / OPTIONS.run_length,
        "exchangeability": OPTIONS.exchangeability_probability,
        "deferral_rate": OPTIONS.deferral_probability + OPTIONS.deferral_delta,
        "fixed_martingale": OPTIONS.exchangeability_probability,
    }


def limits() -> dict[str, Any]:
    """The limits of a calibration of CALIBRATION scores, before any image."""
    return asdict(Drift(reference(np.arange(float(CALIBRATION))), OPTIONS).snapshot())


def false_alarms(n: int, runs: int, images: int) -> dict[str, Any]:
    """Alarms of each test on in-distribution streams."""
    counts = []
    for run in range(runs):
        generator = np.random.default_rng([n, run])
        calibration = reference(generator.normal(size=n))
        counts.append(alarms_on(generator.normal(size=images), calibration, run))
    tests: dict[str, Any] = {}
    for name in (*OURS, *RIVALS):
        alarmed = sum(count[name] > 0 for count in counts)
        total = sum(count[name] for count in counts)
        tests[name] = {
            "alarms": total,
            "per_million": 1e6 * total / (runs * images),
            "streams_with_alarm": alarmed,
            "share_interval": list(clopper_pearson(alarmed, runs)),
        }
    return {"n": n, "runs": runs, "images": images, "tests": tests}


def delays(share: float, before: int, runs: int) -> dict[str, Any]:
    """How soon each test finds OOD images that arrive after some in-distribution ones."""
    found = []
    for run in range(runs):
        generator = np.random.default_rng([round(1000 * share), before, run])
        calibration = reference(generator.normal(size=CALIBRATION))
        after = mixed(generator, HORIZON, share)
        found.append(delays_on(generator.normal(size=before), after, calibration, run))
    return {"share": share, "before": before, "runs": runs, "horizon": HORIZON, "tests": summary(found)}


def mixed(generator: Generator, images: int, share: float) -> Scores:
    """Scores of in-distribution images among which each is OOD with this probability."""
    return generator.normal(size=images) + OOD_MEAN * (generator.random(images) < share)


if __name__ == "__main__":
    main()
