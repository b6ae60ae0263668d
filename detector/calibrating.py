# SPDX-License-Identifier: Apache-2.0
"""Score images that nothing was fitted on, set the thresholds, measure, and write the model directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector import artifact as artifacts, golden
from detector.artifact import Artifact, CalibrationRecord, Manifest, sorted_ids, without_overlap
from detector.backbone import Backbone, Precision
from detector.calibration import clopper_pearson, one_per_group
from detector.data import Dataset, Subset
from detector.detector import Detector, calibration_scores
from detector.features import Collected, Report, collect, silent
from detector.policy import DOUBT, CalibrationScores, Grouping, Policy, doubt
from detector.scores import Score

TOLERANCE_IMAGES = 256
SERVED = (32, 16, 8, 4, 2, 1, 1)  # batch sizes as a server cuts them: calibration sees the rounding that serving sees


class Calibrator:
    """Calibrates an artifact in memory, in each of its precisions, and writes it.

    Args:
        artifact: with its scores, and the splits that calibration must not touch.
        backbone: its network, in any precision.
        fitted: its scores.
        report: told of images done.
    """

    def __init__(
        self, artifact: Artifact, backbone: Backbone, fitted: Mapping[str, Score], report: Report = silent
    ) -> None:
        self.artifact, self.fitted, self.report = artifact, fitted, report
        self.backbones = {precision: _in_precision(backbone, precision) for precision in artifact.manifest.precisions}

    def run(
        self,
        dataset: Dataset,
        out: Path,
        *,
        source: str,
        groups: Sequence[str] | None = None,
        test: Dataset | None = None,
        test_groups: Sequence[str] | None = None,
    ) -> Manifest:
        """Calibrate on `dataset`, measure on `test`, write to `out`; arguments as for `calibrate`."""
        self._score(dataset, source, groups)
        artifact = self.artifact
        detectors = [
            Detector(artifact.manifest, backbone, self.fitted, calibration_scores(artifact, precision), artifact.splits)
            for precision, backbone in self.backbones.items()
        ]
        images = golden.choose(detectors)
        artifact.golden = {"images": images}
        for detector in detectors:
            artifact.golden |= golden.expected(detector, images)
        artifact.report = self._measure(detectors[0], test, test_groups)
        artifact.manifest = artifact.manifest.model_copy(update={"report": artifact.report})
        return artifacts.save(artifact, out)

    def _score(self, dataset: Dataset, source: str, groups: Sequence[str] | None) -> None:
        artifact, manifest = self.artifact, self.artifact.manifest
        grouping = Grouping(manifest.group_of_class, manifest.group_names)
        earlier = dict(artifact.splits)
        tolerance: dict[str, dict[str, float]] = {}
        kept, dropped = torch.zeros(0, dtype=torch.int64), 0
        for precision, backbone in self.backbones.items():
            collected = collect(backbone, dataset, scores=self.fitted, report=self.report, sizes=SERVED)
            kept, dropped = without_overlap(collected.ids, earlier, "calibration")
            once = _independent(collected.ids, kept, None)  # a copy of an image is no further evidence
            dropped += len(kept) - len(once)
            kept = once if groups is None else _independent(collected.ids, once, groups)
            used = collected[kept]
            predicted = used.outputs.logits.argmax(1).cpu().numpy()
            ordered = CalibrationScores.build(grouping, _scores(used), predicted)
            for name, by_group in ordered.scores.items():
                for group, scores in enumerate(by_group):
                    artifact.calibration[f"{precision}.{name}.{group}"] = torch.from_numpy(scores)
            artifact.splits["calibration"] = sorted_ids(used.ids)
            tolerance[precision] = self._tolerance(backbone, Subset(dataset, kept[:TOLERANCE_IMAGES].numpy()))
        record = CalibrationRecord(
            n=len(kept), timestamp=time.time(), source=source, grouped=groups is not None, dropped=dropped
        )
        splits = {name: len(ids) for name, ids in artifact.splits.items()}
        artifact.manifest = manifest.model_copy(
            update={"calibration": record, "score_tolerance": tolerance, "splits": splits}
        )

    def _tolerance(self, backbone: Backbone, dataset: Dataset) -> dict[str, float]:
        """How far a score moves with its batch-mates: four times the largest move between batches of 64, 7 and 1.

        At least four times what float32 can tell: another number of threads may move what did not move here.
        """
        views = [_scores(collect(backbone, dataset, scores=self.fitted, sizes=(size,))) for size in (64, 7, 1)]
        seen = {name: np.array([view[name] for view in views]) for name in (*self.fitted, DOUBT)}
        rounding = float(np.finfo(np.float32).eps)
        return {
            name: 4 * max(float(np.ptp(scores, axis=0).max()), rounding * float(np.abs(scores).max()))
            for name, scores in seen.items()
        }

    def _measure(self, detector: Detector, test: Dataset | None, groups: Sequence[str] | None) -> dict[str, Any]:
        summary: dict[str, Any] = {"expected_acceptance_interval": list(detector.decider.expected_acceptance())}
        if test is None:
            return summary
        collected = collect(detector.backbone, test, report=self.report)
        kept, _ = without_overlap(collected.ids, self.artifact.splits, "test")
        kept = _independent(collected.ids, kept, groups)
        used = collected[kept]
        accepted = sum(verdict.decision == "accept" for verdict in detector.judge(used.outputs))
        accuracy = used.accuracy()
        return summary | {
            "id": {
                "n": len(kept),
                "accuracy": None if np.isnan(accuracy) else accuracy,
                "acceptance": accepted / len(kept),
                "acceptance_interval": list(clopper_pearson(accepted, len(kept))),
            }
        }


def calibrate(
    model: Path,
    dataset: Dataset,
    out: Path,
    *,
    groups: Sequence[str] | None = None,
    check: Dataset | None = None,
    check_groups: Sequence[str] | None = None,
    policy: Policy | None = None,
    device: str = "cpu",
    source: str = "",
    report: Report = silent,
) -> Manifest:
    """Move the promise of a model to other in-distribution images: a new version, same network, same scores.

    Args:
        model: a model directory.
        dataset: in-distribution images, as production sees them.
        out: the directory to write.
        groups: a name for each image (its camera, patient or burst); one image of each is used, and n counts groups.
        check: more such images, to measure the acceptance on.
        check_groups: as `groups`, for `check`.
        policy: another target or guarantee; the model's own where not given.
        device, source, report: as for `fit`.

    Returns:
        the manifest as written.

    Raises:
        SplitOverlap: more than 1 % of the images are also in the fit or tune split.
        TooFewSamples: too few for the guarantee.
    """
    artifact = artifacts.load(model)
    manifest = artifact.manifest
    detector = Detector.from_artifact(artifact, torch.device(device), manifest.precisions[0])
    fresh = {"name": out.parent.name, "version": out.name, "created": now(), "policy": policy or manifest.policy}
    artifact.manifest = manifest.model_copy(update=fresh)
    artifact.splits = {name: ids for name, ids in artifact.splits.items() if name != "calibration"}
    calibrator = Calibrator(artifact, detector.backbone, detector.fitted, report)
    return calibrator.run(dataset, out, source=source, groups=groups, test=check, test_groups=check_groups)


def _scores(collected: Collected) -> dict[str, NDArray[np.float64]]:
    values = {**collected.values, DOUBT: doubt(collected.outputs.logits)}
    return {name: value.cpu().numpy() for name, value in values.items()}


def _independent(ids: Tensor, kept: Tensor, groups: Sequence[str] | None) -> Tensor:
    """One image of each group; without groups, one of each set of identical images."""
    chosen = kept.tolist()
    names = [str(int(ids[index])) for index in chosen] if groups is None else [groups[index] for index in chosen]
    return kept[torch.from_numpy(one_per_group(ids[kept].numpy(), names))]


def _in_precision(backbone: Backbone, precision: Precision) -> Backbone:
    if precision == backbone.precision:
        return backbone
    return Backbone(
        backbone.module,
        backbone.preprocessing,
        head=backbone.head,
        early=backbone.early,
        device=backbone.device,
        precision=precision,
    )


def now() -> str:
    """This moment, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
