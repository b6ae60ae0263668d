# SPDX-License-Identifier: Apache-2.0
"""Measure one cheap score of each committed result again: is it of the weights that are at hand?

    python -m benchmarks.accuracy.verify
    python -m benchmarks.accuracy.verify resnet20 embedded-backward

The accuracy must be the same and the AUROC of the smallest OOD set within 0.0001: threads and processors change last
digits. An ablation, and the subsets, must have the figures of their networks' results, for the scores that both have. A
result from before results named their weights is given their digest where that holds, in either precision, and what
that rests on; of the model that they were read from, and of most versions, nothing is known then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import subjects
from benchmarks.accuracy.subjects import AskedPrecision
from detector.evaluation import auroc
from detector.features import Collected, collect, fit_scores
from detector.scores import FitOptions

RESULTS = Path("benchmarks/accuracy/results")
UNFITTED = ("msp", "product_one_energy")  # it does not matter which images they are fitted on; others: accuracy alone
ABLATED = {"knn": "plain: KNN (`knn`)", "mds": "plain: Mahalanobis (`mds`)"}
TOLERANCE = 1e-4

Figures = dict[str, float]  # accuracy, and AUROC by OOD set, or by score and group


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("*.json"))
    differ = [name for name in names if not _verified(name)]
    if differ:
        raise SystemExit(f"not of the weights at hand: {', '.join(differ)}")


def _verified(name: str) -> bool:
    result = _read(name)
    if name.startswith("ablations-"):
        return _told(name, _ablation(result), "fp32")
    if name == "subsets":
        return _told(name, _subsets(result), "fp32")
    either = result["network"] == "embedded" and "precision" not in result
    asked: tuple[AskedPrecision, ...] = ("fp32", "bf16") if either else (result.get("precision", "fp32"),)
    return any(_told(name, _run(result, precision), precision) for precision in asked)


def _told(name: str, found: tuple[Figures, Figures, str], precision: AskedPrecision) -> bool:
    """Whether what a result says is what is measured now; told, and written into a result that lacks its weights."""
    stored, again, by = found
    same = stored.keys() == again.keys() and all(abs(stored[key] - again[key]) <= TOLERANCE for key in stored)
    same = same and stored.get("accuracy") == again.get("accuracy")
    sys.stdout.write(f"{name}, {precision}: {'the same' if same else f'{stored} then, {again} now'}, by {by}\n")
    result = _read(name)
    if same and "weights" not in result:
        (RESULTS / f"{name}.json").write_text(json.dumps(_named(result, by), indent=1) + "\n")
    return same


def _run(result: Mapping[str, Any], precision: AskedPrecision) -> tuple[Figures, Figures, str]:
    """What a result says, what is measured now, and of which score."""
    images = result.get("ood_images") or {key: n for key, n in result["images"].items() if key not in ("train", "test")}
    limit, ood = max(result["images"]["test"], *images.values()), min(images, key=lambda key: (images[key], key))
    score = next((score for score in UNFITTED if score in result["scores"]), None)
    stored = {"accuracy": result["accuracy"]}
    if score is None:
        return stored, _measured(result["network"], None, ood, limit, precision), "accuracy"
    row = result["scores"][score]
    stored[ood] = row["sets"]["ours"][ood] if "sets" in row else row["ood"][ood]["auroc"]
    return stored, _measured(result["network"], score, ood, limit, precision), f"accuracy and {score}"


@cache
def _measured(network: str, score: str | None, ood: str, limit: int, precision: AskedPrecision) -> Figures:
    found = subjects.subject(network, limit, 1_000, precision)
    options = FitOptions(num_classes=found.backbone.num_classes)
    scores, _ = fit_scores([score] if score else [], found.backbone, found.sets.train, options)
    test = collect(found.backbone, found.sets.test, scores=scores)
    figures = {"accuracy": test.accuracy()}
    if score is not None:
        dataset = {**found.sets.near, **found.sets.far}[ood]
        figures[ood] = auroc(_values(test), _values(collect(found.backbone, dataset, scores=scores)))
    return figures


def _values(collected: Collected) -> NDArray[np.float64]:
    (values,) = collected.values.values()
    return np.asarray(values.cpu())


def _ablation(result: Mapping[str, Any]) -> tuple[Figures, Figures, str]:
    network = result["network"]
    if not _verified(network):
        raise SystemExit(f"not of the weights at hand: {network}")
    of_network = _read(network)["scores"]
    keys = [(score, group) for score in ABLATED for group in ("near", "far")]
    stored = {f"{score} {group}": result["rows"][ABLATED[score]][group] for score, group in keys}
    again = {f"{score} {group}": of_network[score][group]["auroc"] for score, group in keys}
    return stored, again, f"{' and '.join(ABLATED)} of {network}.json"


def _subsets(result: Mapping[str, Any]) -> tuple[Figures, Figures, str]:
    (fused,) = (row for row in result["rows"] if (row["why"], row["rule"]) == ("`fusion_lean`", "mean"))
    others = {network: _read(f"second-{network}") for network in result["weights"]}
    if any(other["weights"]["sha256"] != result["weights"][name]["sha256"] for name, other in others.items()):
        raise SystemExit("not of the weights at hand: subsets")
    keys = [(network, group) for network in others for group in ("near", "far")]
    stored = {f"{network} {group}": fused[network][group] for network, group in keys}
    again = {f"{network} {group}": others[network]["scores"]["fusion_lean"][group]["auroc"] for network, group in keys}
    return stored, again, " and ".join(f"fusion_lean of second-{network}.json" for network in others)


def _named(result: Mapping[str, Any], by: str) -> dict[str, Any]:
    weights = subjects.weights(result["network"]) | {"known_by": by}
    weights.pop("model_digest", None)
    versions = {"torch": result["torch"]} if "torch" in result else {}
    told = {"network": result["network"], "weights": weights, "versions": versions}
    return told | {key: value for key, value in result.items() if key != "torch"}


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


if __name__ == "__main__":
    main()
