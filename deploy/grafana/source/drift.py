# SPDX-License-Identifier: Apache-2.0
"""Is the stream still in-distribution? The tests of docs/drift.md over time."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.source.panels import FULL, OF_MODEL, board, limits, lines, number

WHERE = "{{model}} {{version}} {{instance}}"


def of_test(metric: str) -> str:
    return f"max by (model, version, instance, test) (oodgate_drift_{metric}{{{OF_MODEL}}})"


def of_window(metric: str, labels: str) -> str:
    return f"max by (model, version, instance, {labels}) (oodgate_{metric}{{{OF_MODEL}}})"


def of_model(metric: str) -> str:
    return f"max by (model, version, instance) (oodgate_drift_{metric}{{{OF_MODEL}}})"


def build() -> Dashboard:
    """The drift dashboard."""
    found = board("drift", "drift", "Tests of the stream with stated false-alarm rates: see docs/drift.md.")
    return (
        found.with_panel(
            number(
                "Alarms",
                "1 while a test stands in alarm. cusum and exchangeability are the quickest; deferral_rate is proof;"
                " one window alone is worth a look and no more. See OodgateDriftDetected in the runbook.",
                {f"{{{{test}}}} {WHERE}": of_test("alarm")},
                "short",
                {None: "green", 1: "red"},
                FULL,
            )
        )
        .with_panel(
            limits(
                lines(
                    "Evidence that the stream has changed",
                    "Decimal logarithm of the capital of the two anytime-valid tests: 2 is odds of 100 to 1. It may be"
                    " looked at after every image.",
                    {
                        f"{{{{test}}}} {WHERE}": of_test("evidence_log10"),
                        "2 = 100 to 1": "vector(2)",
                    },
                    "short",
                ).min(-2),
                "/^2 =/",
            )
        )
        .with_panel(
            limits(
                lines(
                    "CUSUM",
                    "Sum of deferrals above what the calibration explains, in accepted images; it falls back to 0 by"
                    " itself. A steady climb is a small lasting rise, a jump a burst; from the limit on it alarms.",
                    {
                        WHERE: of_model("cusum"),
                        f"limit {WHERE}": of_model("cusum_limit"),
                    },
                    "short",
                ),
                "/^limit/",
            )
        )
        .with_panel(
            limits(
                lines(
                    "Deferral in the last full window, and its control limits",
                    "Share deferred as OOD among the last 1,000 and 10,000 images that filled a window. The limits know"
                    " chance and the error of the calibration; outside them a window alarms. 0 before one is full.",
                    {
                        f"{{{{window}}}} {WHERE}": of_window("window_deferral_ratio", "window"),
                        "{{bound}} of {{window}}": of_window("control_limit_ratio", "window, bound"),
                    },
                    "percentunit",
                ),
                "/^(upper|lower) of/",
            )
        )
        .with_panel(
            lines(
                "OOD images in the last full window, at least",
                "Lower 95 % bound of the share of OOD images among the last 1,000 and 10,000. OOD images that the score"
                " accepts are not seen: the true share may be far larger.",
                {f"{{{{window}}}} {WHERE}": of_window("window_ood_share_lower_ratio", "window")},
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Share of p-values at most 0.01, 0.05 and 0.1",
                "In-distribution images stay at 1, 5 and 10 %. All three rising together is a shift of the whole"
                " stream; the lowest alone is a few images that are very strange.",
                {
                    f"p ≤ {le}": f'sum(rate(oodgate_p_value_bucket{{{OF_MODEL},le="{le}"}}[5m]))'
                    f" / sum(rate(oodgate_p_value_count{{{OF_MODEL}}}[5m]))"
                    for le in ("0.01", "0.05", "0.1")
                },
                "percentunit",
                FULL,
            )
        )
    )
