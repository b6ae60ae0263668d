# SPDX-License-Identifier: Apache-2.0
"""What does it decide? Deferral with its limits, p-values, classes, sources, shadows, calibration."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.source.panels import FULL, HALF, OF_MODEL, THIRD, board, heat, limits, lines, number, stacked

EACH = "[$__rate_interval]"
NAME = "{{model}} {{version}}"


def share(of: str, metric: str, by: str = "model, version") -> str:
    """Images of one kind for each image."""
    part = f"sum by ({by}) (rate({metric}{{{OF_MODEL},{of}}}[5m]))"
    return f"{part} / sum by ({by}) (rate({metric}{{{OF_MODEL}}}[5m]))"


def gauge(metric: str, how: str = "max") -> str:
    return f"{how} by (model, version) (oodgate_calibration_{metric}{{{OF_MODEL}}})"


def build() -> Dashboard:
    """The decisions dashboard."""
    found = board("decisions", "decisions", "What is accepted and deferred, and whether the calibration explains it.")
    return _calibration(_parts(_ratio(found)))


def _ratio(found: Dashboard) -> Dashboard:
    deferral = limits(
        lines(
            "Deferral ratio (5 min) and what the calibration explains",
            "Share of images deferred. Dashed: the 95 % interval of the calibration, above it the"
            " stream has changed, see OodgateDeferralRateHigh; below it the score may be dead, see"
            " OodgateDeferralRateImplausiblyLow.",
            {
                NAME: share('decision="defer"', "oodgate_decisions_total"),
                f"upper, calibration {NAME}": f"1 - {gauge('id_acceptance_lower_ratio', 'min')}",
                f"lower, calibration {NAME}": f"1 - {gauge('id_acceptance_upper_ratio')}",
            },
            "percentunit",
        ),
        "/^(upper|lower)/",
    )
    control = limits(
        lines(
            "Deferral as OOD (5 min) and control limits",
            "Deferrals as OOD alone. The limits are exact for windows of so many images: they know chance and the error"
            " of the calibration. The tests judge whole windows, the line slides: it may leave the limits though no"
            " window does. One outside is worth a look; see OodgateDriftDetected.",
            {
                NAME: share('decision="defer",reason="ood"', "oodgate_decisions_total"),
                f"{{{{bound}}}} of {{{{window}}}} {NAME}": "max by (model, version, window, bound)"
                f" (oodgate_control_limit_ratio{{{OF_MODEL}}})",
            },
            "percentunit",
        ),
        "/^(upper|lower)/",
    )
    p_values = heat(
        "P-values",
        "Images by conformal p-value. In-distribution images fill 0.1 to 1 evenly; OOD images gather in the lowest"
        " rows. A bright lowest row is an OOD stream, a bright top row a stream of images that repeat the calibration.",
        f"sum by (le) (increase(oodgate_p_value_bucket{{{OF_MODEL}}}{EACH}))",
    )
    return found.with_panel(deferral).with_panel(control).with_panel(p_values)


def _parts(found: Dashboard) -> Dashboard:
    return (
        found.with_row(Row("Who and why"))
        .with_panel(
            stacked(
                "Decisions by reason",
                "Images a second: accepted, deferred as OOD, deferred for low confidence. Low confidence only appears"
                " where the policy spends a part of its budget on it.",
                {
                    "{{decision}} {{reason}}": "sum by (decision, reason)"
                    f" (rate(oodgate_decisions_total{{{OF_MODEL}}}{EACH}))"
                },
                "reqps",
                THIRD,
            )
        )
        .with_panel(
            lines(
                "Deferral by predicted class",
                "Share deferred among the images that the network takes for a class. One class far above the others is"
                " often a new kind of object that resembles it.",
                {"{{label}}": share('decision="defer"', "oodgate_class_decisions_total", "label")},
                "percentunit",
                THIRD,
            )
        )
        .with_panel(
            lines(
                "Deferral by source",
                "Share deferred by camera or tenant. One source far above the others: look at that camera, not at the"
                " model.",
                {"{{source}}": share('decision="defer"', "oodgate_source_decisions_total", "source")},
                "percentunit",
                THIRD,
            )
        )
        .with_panel(
            lines(
                "Shadow disagreement",
                "Share of images with shadows that a shadow score, at the same cut-off, would judge otherwise. A rise"
                " in all shadows together says more than in one.",
                {
                    "{{score}}": f"sum by (score) (rate(oodgate_shadow_disagreements_total{{{OF_MODEL}}}[5m]))"
                    f" / sum by (score) (rate(oodgate_shadow_scores_total{{{OF_MODEL}}}[5m]))"
                },
                "percentunit",
                HALF,
            )
        )
        .with_panel(
            lines(
                "Borderline and very low p-values",
                "Borderline: so near the threshold that rounding could change the decision; either is right. p ≤ 0.01"
                " should hold for 1 % of in-distribution images.",
                {
                    f"borderline {NAME}": f"sum by (model, version) (rate(oodgate_borderline_total{{{OF_MODEL}}}[5m]))"
                    f" / sum by (model, version) (rate(oodgate_decisions_total{{{OF_MODEL}}}[5m]))",
                    f"p ≤ 0.01 {NAME}": "sum by (model, version)"
                    f' (rate(oodgate_p_value_bucket{{{OF_MODEL},le="0.01"}}[5m]))'
                    f" / sum by (model, version) (rate(oodgate_p_value_count{{{OF_MODEL}}}[5m]))",
                },
                "percentunit",
                HALF,
            )
        )
    )


def _calibration(found: Dashboard) -> Dashboard:
    age: dict[float | None, str] = {None: "green", 90 * 86400: "orange", 180 * 86400: "red"}
    return (
        found.with_row(Row("Calibration"))
        .with_panel(
            number(
                "In-distribution images accepted",
                "The target, and the interval that holds what this calibration really accepts with 95 % confidence."
                " More calibration images make it narrower.",
                {
                    "target": gauge("target_id_acceptance_ratio"),
                    "at least": gauge("id_acceptance_lower_ratio", "min"),
                    "at most": gauge("id_acceptance_upper_ratio"),
                },
                "percentunit",
                {None: "blue"},
                HALF,
            )
        )
        .with_panel(
            number(
                "Calibration images",
                "How many images the threshold was set on, all groups together. About 2,000 hold the interval within a"
                " percentage point.",
                {NAME: gauge("samples")},
                "short",
                {None: "blue"},
            )
        )
        .with_panel(
            number(
                "Age of the calibration",
                "Time since the model was calibrated. After half a year OodgateCalibrationStale asks for a look:"
                " cameras, seasons and products change.",
                {NAME: f"time() - {gauge('timestamp_seconds')}"},
                "s",
                age,
            )
        )
        .with_panel(
            lines(
                "Threshold",
                "Score above which an image is deferred; the largest of all groups. It moves only when somebody changes"
                " the policy or the model.",
                {f"{{{{score}}}} {NAME}": f"max by (model, version, score) (oodgate_threshold{{{OF_MODEL}}})"},
                "short",
                FULL,
            )
        )
    )
