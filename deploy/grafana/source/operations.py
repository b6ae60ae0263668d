# SPDX-License-Identifier: Apache-2.0
"""Is the service well? Traffic, latency, queue, batches, errors."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.source.panels import HALF, OF_INSTANCE, OF_MODEL, board, lines, number, stacked

JUDGING = f'{OF_INSTANCE},handler=~"/v1/.*(verdict|explain)|/v2/.*/infer|/gate/.*"'
ERRORS = f'{JUDGING},status=~"5.."'
EACH = "[$__rate_interval]"


def quantile(q: float, by: str, metric: str, of: str) -> str:
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket{{{of}}}{EACH})))"


def build() -> Dashboard:
    """The operations dashboard."""
    found = board("operations", "operations", "Traffic, latency by stage, queue, batches and errors of the service.")
    return _batches(_latency(_traffic(_now(found))))


def _now(found: Dashboard) -> Dashboard:
    return (
        found.with_panel(
            number(
                "Ready",
                "1 where the instance says that it is ready, and where the model is loaded and passed its self-test. An"
                " instance that is missing here, or at 0, serves nothing: see OodgateNotReady in the runbook.",
                {
                    "{{instance}}": f"oodgate_ready{{{OF_INSTANCE}}}",
                    "{{model}} {{version}} {{instance}}": f"oodgate_model_ready{{{OF_MODEL}}}",
                },
                "short",
                {None: "red", 1: "green"},
            )
        )
        .with_panel(
            number(
                "Engine heartbeat age",
                "Seconds since the inference thread last showed life. Above a minute it stands still: see"
                " OodgateEngineStalled in the runbook.",
                {"{{instance}}": f"time() - oodgate_engine_heartbeat_timestamp_seconds{{{OF_INSTANCE}}}"},
                "s",
                {None: "green", 30: "orange", 60: "red"},
            )
        )
        .with_panel(
            number(
                "Failing requests",
                "Share of judging requests of the last five minutes that ended in a 5xx. The objective is 0.1 % over 30"
                " days; above 5 % OodgateErrorRateHigh pages.",
                {
                    "5xx": f"sum(rate(oodgate_http_requests_total{{{ERRORS}}}[5m]))"
                    f" / sum(rate(oodgate_http_requests_total{{{JUDGING}}}[5m]))"
                },
                "percentunit",
                {None: "green", 0.001: "orange", 0.05: "red"},
            )
        )
        .with_panel(
            number(
                "Queue in use",
                "Images admitted and not yet answered, as a share of what may be admitted. Near 1, callers get 429:"
                " see OodgateQueueSaturated in the runbook.",
                {"{{instance}}": f"oodgate_queue_depth{{{OF_INSTANCE}}} / oodgate_queue_capacity{{{OF_INSTANCE}}}"},
                "percentunit",
                {None: "green", 0.5: "orange", 0.8: "red"},
            )
        )
    )


def _traffic(found: Dashboard) -> Dashboard:
    return (
        found.with_row(Row("Traffic"))
        .with_panel(
            lines(
                "Images judged",
                "Images a second by model and version. A fall to zero with callers still there points at the gate or"
                " the network before this service.",
                {
                    "{{model}} {{version}}": "sum by (model, version)"
                    f" (rate(oodgate_decisions_total{{{OF_MODEL}}}{EACH}))"
                },
                "reqps",
                HALF,
            )
        )
        .with_panel(
            stacked(
                "Requests by status",
                "Answers a second to judging requests. 4xx are the callers' errors, 429 asks them to slow down, 5xx are"
                " ours.",
                {"{{status}}": f"sum by (status) (rate(oodgate_http_requests_total{{{JUDGING}}}{EACH}))"},
                "reqps",
                HALF,
            )
        )
        .with_panel(
            stacked(
                "Not judged, by reason",
                "Requests or images a second that got no verdict. queue_full and deadline: too little capacity."
                " bad_image, pixels and too_large: look at who sends them.",
                {"{{reason}}": f"sum by (reason) (rate(oodgate_requests_rejected_total{{{OF_INSTANCE}}}{EACH}))"},
                "reqps",
                HALF,
            )
        )
        .with_panel(
            stacked(
                "The gate, by outcome",
                "Requests a second that came to the gate in front of your app. unscored were forwarded without a"
                " verdict, because the gate fails open; upstream_error is the app behind it.",
                {"{{outcome}}": f"sum by (outcome) (rate(oodgate_gate_requests_total{{{OF_INSTANCE}}}{EACH}))"},
                "reqps",
                HALF,
            )
        )
    )


def _latency(found: Dashboard) -> Dashboard:
    seconds = "oodgate_http_request_duration_seconds"
    return (
        found.with_row(Row("Latency"))
        .with_panel(
            lines(
                "Request latency",
                "Time to answer a judging request, as the server sees it: from its first byte read to its last byte"
                " sent. Points are exemplars where callers send traceparent.",
                {f"p{round(100 * q)}": quantile(q, "le", seconds, JUDGING) for q in (0.5, 0.95, 0.99)},
                "s",
                exemplars=True,
            )
        )
        .with_panel(
            lines(
                "Stage latency, 95 %",
                "Which stage the time goes to: read and respond of a request, decode and queue of an image, forward and"
                " score of a batch. A long queue with a short forward asks for larger batches or replicas.",
                {"{{stage}}": quantile(0.95, "le, stage", "oodgate_stage_duration_seconds", OF_INSTANCE)},
                "s",
            )
        )
    )


def _batches(found: Dashboard) -> Dashboard:
    return (
        found.with_row(Row("Engine"))
        .with_panel(
            lines(
                "Queue",
                "Images admitted and not yet answered, and how many may be. OodgateQueueSaturated pages above four"
                " fifths.",
                {
                    "admitted {{instance}}": f"oodgate_queue_depth{{{OF_INSTANCE}}}",
                    "capacity {{instance}}": f"oodgate_queue_capacity{{{OF_INSTANCE}}}",
                },
                "short",
            )
        )
        .with_panel(
            lines(
                "Batch fill",
                "Images in one forward pass, on average. Batches fill by themselves when more arrives than one image"
                " at a time can serve; near OODGATE_MAX_BATCH the device is the limit.",
                {
                    "{{instance}}": f"sum by (instance) (rate(oodgate_batch_size_sum{{{OF_INSTANCE}}}{EACH}))"
                    f" / sum by (instance) (rate(oodgate_batch_size_count{{{OF_INSTANCE}}}{EACH}))"
                },
                "short",
            )
        )
        .with_panel(
            lines(
                "Event loop lag, 95 %",
                "How much later than asked the event loop woke up. Tens of milliseconds mean that something other than"
                " waiting runs on it, or that the machine is overloaded.",
                {"{{instance}}": quantile(0.95, "le, instance", "oodgate_event_loop_lag_seconds", OF_INSTANCE)},
                "s",
            )
        )
        .with_panel(
            lines(
                "Losses",
                "Audit lines that could not be written, inference loops lost and begun again, loads of models that"
                " failed: each in the last quarter of an hour. All should be 0.",
                {
                    "audit lines": f"sum(increase(oodgate_audit_lines_lost_total{{{OF_INSTANCE}}}[15m]))",
                    "engine restarts": f"sum(increase(oodgate_engine_restarts_total{{{OF_INSTANCE}}}[15m]))",
                    "failed loads": f'sum(increase(oodgate_model_loads_total{{{OF_INSTANCE},result="failure"}}[15m]))',
                },
                "short",
                HALF,
            )
        )
    )
