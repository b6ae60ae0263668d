# SPDX-License-Identifier: Apache-2.0
"""Every metric of the server, on a registry of its own. Series exist at 0 from the start."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from detector import __version__
from detector.artifact import Manifest
from detector.backbone import Mode, Precision
from detector.policy import Decider, Decision, Reason, Verdict
from service.drift import DriftStatus

STAGES = ("read", "decode", "queue", "forward", "score", "respond", "upstream")
DECISIONS: tuple[Decision, ...] = ("accept", "defer")
REASONS: tuple[Reason, ...] = ("none", "ood", "low_confidence")
REJECTIONS = ("queue_full", "deadline", "too_large", "pixels", "bad_image", "media_type", "not_ready")
GATE_OUTCOMES = ("forwarded", "deferred", "unscored", "refused", "left", "upstream_error")
GATE = "/gate/{path:path}"
HANDLERS = {
    "/v1/verdict": ("POST",),
    "/v1/models/{name}/verdict": ("POST",),
    "/v1/models/{name}/versions/{version}/verdict": ("POST",),
    "/v1/explain": ("POST",),
    "/v1/models/{name}/explain": ("POST",),
    "/v1/models/{name}/versions/{version}/explain": ("POST",),
    "/v2/models/{name}/infer": ("POST",),
    "/v2/models/{name}/versions/{version}/infer": ("POST",),
    GATE: ("POST", "PUT"),
}
STATUSES = ("200", "400", "401", "404", "408", "413", "415", "422", "429", "499", "500", "503", "504")
P_VALUE_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODEL, SCORED = ("model", "version"), ("model", "version", "score")
# What tells, read before and after one image, how it was scored.
EVIDENCE = frozenset(
    f"oodgate_{name}" for name in ("p_value", "threshold", "borderline", "shadow_disagreements", "drift_evidence_log10")
)

# When each series began would be a fifth as many series again, of no use to anybody.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _ModelSeries:
    """The series that count one model's verdicts."""

    decisions: Mapping[Reason, Counter]
    p_value: Histogram
    borderline: Counter
    shadows: Mapping[str, Counter]
    disagreements: Mapping[str, Counter]


class WithoutEvidence(Collector):
    """A registry without what tells scores: for those to whom they are not shown."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The families of metrics that are left."""
        return (family for family in self._registry.collect() if family.name not in EVIDENCE)


class Metrics:
    """The server's metrics; one object per app, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"oodgate_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"oodgate_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(f"oodgate_{name}", text, labels, registry=registry, buckets=tuple(buckets))

        self.decisions = counter("decisions", "Images judged.", (*SCORED, "decision", "reason"))
        self.p_value = histogram("p_value", "Conformal p-value of each image.", SCORED, P_VALUE_BUCKETS)
        self.shadow_scores = counter("shadow_scores", "Images for which a shadow score was computed.", SCORED)
        self.shadow_disagreements = counter(
            "shadow_disagreements", "Images that a shadow score, at the same cut-off, would judge otherwise.", SCORED
        )
        self.borderline = counter(
            "borderline", "Images that lie within rounding of a limit; either decision is right.", SCORED
        )
        self.class_decisions = counter(
            "class_decisions",
            "Images judged, by predicted class; rare classes share `other` where there are very many.",
            (*MODEL, "label", "decision"),
        )
        self.source_decisions = counter(
            "source_decisions",
            "Images judged, by source: the header X-OODGate-Source, else the token's name; rare sources are `other`.",
            (*MODEL, "source", "decision"),
        )
        self.drift_cusum = gauge("drift_cusum", "CUSUM of the deferrals, in accepted images.", MODEL)
        self.drift_cusum_limit = gauge("drift_cusum_limit", "The CUSUM alarms from here on.", MODEL)
        self.drift_alarm = gauge("drift_alarm", "1 while a drift test stands in alarm.", (*MODEL, "test"))
        self.drift_evidence = gauge(
            "drift_evidence_log10", "log10 of the evidence of an anytime-valid drift test.", (*MODEL, "test")
        )
        self.control_limit = gauge(
            "control_limit_ratio", "Limits of the deferral ratio of a window of images.", (*MODEL, "window", "bound")
        )
        self.window_deferral = gauge(
            "window_deferral_ratio", "Share deferred as OOD in the last full window.", (*MODEL, "window")
        )
        self.ood_share_lower = gauge(
            "window_ood_share_lower_ratio",
            "Lower 95 % bound of the share of OOD images in the last full window.",
            (*MODEL, "window"),
        )
        self.threshold = gauge(
            "threshold", "Score above which an image is deferred; the largest of all groups.", SCORED
        )
        self.calibration_samples = gauge("calibration_samples", "Calibration images, or groups of images.", SCORED)
        self.target = gauge("calibration_target_id_acceptance_ratio", "Share of ID images to accept.", SCORED)
        self.acceptance_lower = gauge(
            "calibration_id_acceptance_lower_ratio", "Lower 95 % bound of ID acceptance.", SCORED
        )
        self.acceptance_upper = gauge(
            "calibration_id_acceptance_upper_ratio", "Upper 95 % bound of ID acceptance.", SCORED
        )
        self.calibrated = gauge("calibration_timestamp_seconds", "When the model was calibrated.", SCORED)
        self.model_ready = gauge("model_ready", "1 where the model is loaded and passed its self-test.", MODEL)
        self.ready = gauge("ready", "1 while the server says that it is ready for traffic.")
        self.model_info = gauge(
            "model_info", "1; the labels tell the model.", (*MODEL, "score", "network", "digest", "device", "precision")
        )
        self.forward_compiled = gauge(
            "forward_compiled", "1 while the compiled or recorded forward is in force, 0 while the eager one is.", MODEL
        )
        self.model_loads = counter("model_loads", "Attempts to load a model.", ("result",))
        self.build_info = gauge("build_info", "1; the label tells the release.", ("version",))

        self.requests = counter("http_requests", "Requests answered.", ("handler", "method", "status"))
        self.request_seconds = histogram(
            "http_request_duration_seconds", "Time to answer a request.", ("handler", "method"), LATENCY_BUCKETS
        )
        self.stage_seconds = histogram(
            "stage_duration_seconds",
            "Time in read, upstream and respond (a request), decode and queue (an image), forward and score (a batch).",
            ("stage",),
            LATENCY_BUCKETS,
        )
        self.batch_size = histogram("batch_size", "Images in one forward pass.", (), BATCH_BUCKETS)
        self.queue_depth = gauge("queue_depth", "Images admitted and not yet answered.")
        self.queue_capacity = gauge("queue_capacity", "Images admitted at most.")
        self.in_progress = gauge("requests_in_progress", "Requests being answered.")
        self.rejected = counter("requests_rejected", "Requests or images not judged.", ("reason",))
        self.gate_requests = counter(
            "gate_requests", "Requests that came to the gate, by how they ended.", ("outcome",)
        )
        self.heartbeat = gauge("engine_heartbeat_timestamp_seconds", "When the inference thread last showed life.")
        self.audit_lost = counter("audit_lines_lost", "Audit lines that could not be written.")
        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How much later than asked the event loop woke up.", (), LATENCY_BUCKETS
        )
        self.engine_restarts = counter("engine_restarts", "Times the inference loop was lost and began again.")
        self._start_at_zero()
        # Looking a series up by its labels costs more than counting in it.
        self.stage = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self._shown: dict[str, set[tuple[Gauge, tuple[str, ...]]]] = {}
        self._of_model: dict[tuple[str, str, str], _ModelSeries] = {}
        self._of_label: dict[tuple[Counter, str, str, str, str], Counter] = {}

    def _start_at_zero(self) -> None:
        self.build_info.labels(__version__).set(1)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for reason in REJECTIONS:
            self.rejected.labels(reason)
        for outcome in GATE_OUTCOMES:
            self.gate_requests.labels(outcome)
        for result in ("success", "failure"):
            self.model_loads.labels(result)
        for handler, methods in HANDLERS.items():
            statuses = (*STATUSES, "502") if handler == GATE else STATUSES
            for method in methods:
                self.request_seconds.labels(handler, method)
                for status in statuses:
                    self.requests.labels(handler, method, status)

    def watch(self, queue_depth: Callable[[], float], heartbeat: Callable[[], float], capacity: int) -> None:
        """Read the engine's gauges whenever they are scraped."""
        self.queue_depth.set_function(queue_depth)
        self.heartbeat.set_function(heartbeat)
        self.queue_capacity.set(capacity)

    def announce(self, manifest: Manifest, decider: Decider, device: str, precision: Precision, mode: Mode) -> None:
        """Show a model that became ready, or whose forward changed, with all its series."""
        score = decider.policy.score_name
        model = (manifest.name, manifest.version)
        cuts = decider.thresholds
        low, high = decider.expected_acceptance()
        network = f"{manifest.network.kind}:{manifest.network.name}".rstrip(":")
        digest = manifest.model_digest
        for gauge, labels, value in (
            (self.threshold, (*model, score), max(cut.value for cut in cuts)),
            (self.calibration_samples, (*model, score), sum(cut.n for cut in cuts)),
            (self.target, (*model, score), decider.policy.target_id_acceptance),
            (self.acceptance_lower, (*model, score), low),
            (self.acceptance_upper, (*model, score), high),
            (self.calibrated, (*model, score), manifest.calibration.timestamp),
            (self.model_ready, model, 1),
            (self.forward_compiled, model, mode != "eager"),
            (self.model_info, (*model, score, network, digest, device, precision), 1),
        ):
            gauge.labels(*labels).set(value)
            self._shown.setdefault(manifest.name, set()).add((gauge, labels))
        self._of_model[(*model, score)] = _ModelSeries(
            decisions={
                reason: self.decisions.labels(*model, score, "accept" if reason == "none" else "defer", reason)
                for reason in REASONS
            },
            p_value=self.p_value.labels(*model, score),
            borderline=self.borderline.labels(*model, score),
            shadows={name: self.shadow_scores.labels(*model, name) for name in decider.shadows},
            disagreements={name: self.shadow_disagreements.labels(*model, name) for name in decider.shadows},
        )

    def show_drift(self, manifest: Manifest, groups: Sequence[DriftStatus]) -> None:
        """Show where a model's drift tests stand; with several calibration groups, the worst of each test."""
        model = (manifest.name, manifest.version)
        worst = max((group.cusum for group in groups), key=lambda cusum: cusum.value / cusum.limit)
        shown: list[tuple[Gauge, tuple[str, ...], float]] = [
            (self.drift_cusum, model, worst.value),
            (self.drift_cusum_limit, model, worst.limit),
        ]
        for test in groups[0].alarms:
            shown.append((self.drift_alarm, (*model, test), any(group.alarms[test] for group in groups)))
        for name in ("exchangeability", "deferral_rate"):
            evidence = max(getattr(group, name).evidence_log10 for group in groups)
            shown.append((self.drift_evidence, (*model, name), evidence))
        for window in groups[0].windows if len(groups) == 1 else ():
            size = (*model, str(window.size))
            shown += [(self.control_limit, (*size, bound), getattr(window, bound)) for bound in ("lower", "upper")]
            # Before the first window is full nothing is deferred that one could know of.
            shown += [(self.window_deferral, size, window.ratio or 0.0)]
            shown += [(self.ood_share_lower, size, window.ood_share_lower or 0.0)]
        for gauge, labels, value in shown:
            gauge.labels(*labels).set(value)
        self._shown.setdefault(manifest.name, set()).update((gauge, labels) for gauge, labels, _ in shown)

    def expect(self, manifest: Manifest, classes: Sequence[str], sources: Sequence[str]) -> None:
        """Show the decisions of these classes and sources at 0, before their first image."""
        for counter, labels in ((self.class_decisions, classes), (self.source_decisions, sources)):
            for label in labels:
                for decision in DECISIONS:
                    counter.labels(manifest.name, manifest.version, label, decision)

    def count_class(self, manifest: Manifest, label: str, displaced: str | None, decision: Decision) -> None:
        """Count a decision by predicted class."""
        self._count_top(self.class_decisions, manifest, label, displaced, decision)

    def count_source(self, manifest: Manifest, label: str, displaced: str | None, decision: Decision) -> None:
        """Count a decision by source."""
        self._count_top(self.source_decisions, manifest, label, displaced, decision)

    def _count_top(
        self, counter: Counter, manifest: Manifest, label: str, displaced: str | None, decision: Decision
    ) -> None:
        model = (manifest.name, manifest.version)
        if displaced is not None:
            for other in DECISIONS:
                self._of_label.pop((counter, *model, displaced, other), None)
                with suppress(KeyError):
                    counter.remove(*model, displaced, other)
        key = (counter, *model, label, decision)
        if key not in self._of_label:
            self._of_label[key] = counter.labels(*model, label, decision)
        self._of_label[key].inc()

    def retire(self, name: str) -> None:
        """Take back the gauges of a model that is served no more; its counters stay, as counters must."""
        for gauge, labels in self._shown.pop(name, set()):
            gauge.remove(*labels)

    def count_verdicts(self, manifest: Manifest, decider: Decider, verdicts: Sequence[Verdict]) -> None:
        """Count a batch of verdicts of one announced model."""
        series = self._of_model[manifest.name, manifest.version, decider.policy.score_name]
        for reason, images in Tally(verdict.reason for verdict in verdicts).items():
            series.decisions[reason].inc(images)
        computed, differing = Tally[str](), Tally[str]()
        borderline = 0
        for verdict in verdicts:
            ood = verdict.ood
            series.p_value.observe(ood.p_value)
            borderline += ood.borderline
            deferred = ood.p_value <= ood.p_cutoff
            computed.update(ood.shadow.keys())  # of a mapping it would add up the values
            differing.update(
                name for name, shadow in ood.shadow.items() if (shadow.p_value <= ood.p_cutoff) != deferred
            )
        series.borderline.inc(borderline)
        for name, images in computed.items():
            series.shadows[name].inc(images)
        for name, images in differing.items():
            series.disagreements[name].inc(images)
