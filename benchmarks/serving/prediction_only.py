# SPDX-License-Identifier: Apache-2.0
"""`oodgate serve` without the verdict: the same engine, no score, p-value, decision or drift test, no metric of them.

    python -m benchmarks.serving.prediction_only serve --models DIR --port PORT

What it saves is what the verdict costs. It exists for the benchmark alone: the product has no such switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace

from torch import Tensor

from detector.cli import main
from detector.detector import Detector, Scored
from detector.outputs import Outputs
from detector.policy import Decider, OodEvidence, Prediction, Verdict
from detector.staging import Download
from service.metrics import Metrics
from service.registry import Registry
from service.watch import Watch

NOTHING = OodEvidence(
    score_name="", score=0.0, threshold=0.0, p_value=1.0, p_cutoff=0.0, group="", target_id_acceptance=1.0,
    borderline=False, shadow={},
)  # fmt: skip


class PredictionOnly(Detector):
    """A detector that only predicts."""

    def self_test(self, golden: Mapping[str, Tensor]) -> None:
        """As the whole detector it was: what serves beside it must have passed the same."""
        whole = copy(self)
        whole.__class__ = Detector  # type: ignore[assignment]
        whole.self_test(golden)

    def start_judging(self, outputs: Outputs, decider: Decider, *, shadows: bool = True) -> Scored:
        with self.scoring_threads():
            return Scored((), Download([outputs.logits]))

    def finish_judging(self, scored: Scored, decider: Decider) -> list[Verdict]:
        with self.scoring_threads():
            (logits,) = scored.download.tensors()
            confidence, index = logits.softmax(1).max(1)
        names = self.manifest.class_names
        return [
            Verdict("accept", "none", Prediction(i, names[i], value), replace(NOTHING))
            for i, value in zip(index.tolist(), confidence.tolist(), strict=True)
        ]


def install() -> None:
    """Let every model that the server loads become one that only predicts, once it has passed its self-test."""
    load_all = Registry.load_all

    def load_then_forget(self: Registry) -> None:
        load_all(self)
        for name in self.names:
            self.get(name).detector.__class__ = PredictionOnly

    Registry.load_all = load_then_forget  # type: ignore[method-assign]
    Metrics.count_verdicts = lambda *_: None  # type: ignore[method-assign]
    Watch.saw = lambda *_: None  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    main()
