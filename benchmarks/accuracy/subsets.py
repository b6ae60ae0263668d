# SPDX-License-Identifier: Apache-2.0
"""Which scores to fuse: every subset of twelve, and two ways to put them together, on the development networks.

    python -m benchmarks.accuracy.subsets

All subsets are ranked on a sample of each set; the best, and what was frozen, are measured on the whole sets. Writes
benchmarks/accuracy/results/subsets.json. The search came before the third freeze (frozen.toml).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp

from benchmarks.accuracy import subjects
from benchmarks.accuracy.features import features
from benchmarks.accuracy.fitting import fitted
from benchmarks.accuracy.marks import frozen
from detector.evaluation import auroc
from detector.scores import score_all
from detector.scores.fusion import NormalMap, NormalMaps

RESULT = Path("benchmarks/accuracy/results/subsets.json")
NETWORKS = ("resnet20", "resnet56")
CANDIDATES = (
    "knn", "fdbd", "nci", "vim", "rg", "energy", "gen",
    "grood_margin", "grood_w", "grood_margin_w", "grood_noise", "grood_margin_noise",
)  # fmt: skip
SIZES, SAMPLE, KEPT = range(3, 10), 1_200, 10
RULES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": lambda z: z.mean(axis=0),
    "log mean exp": lambda z: np.asarray(logsumexp(z, axis=0)),
}


@dataclass(frozen=True)
class Known:
    """Normal scores of one network.

    Args:
        sets: `test` and the OOD sets: float64 [candidates, images].
        groups: `near` or `far` of each OOD set.
    """

    sets: Mapping[str, NDArray[np.float64]]
    groups: Mapping[str, str]

    def sample(self, images: int) -> Known:
        """So many images of each set, drawn with a fixed seed."""
        generator = np.random.default_rng(0)
        return replace(
            self, sets={name: z[:, generator.permutation(z.shape[1])[:images]] for name, z in self.sets.items()}
        )

    def means(self, members: Sequence[str], rule: str) -> dict[str, float]:
        """Near and far mean AUROC of a fusion."""
        rows = [CANDIDATES.index(name) for name in members]
        fused = {name: RULES[rule](z[rows]) for name, z in self.sets.items()}
        found = {name: auroc(fused["test"], fused[name]) for name in self.groups}
        return {
            group: float(np.mean([found[name] for name, its in self.groups.items() if its == group]))
            for group in ("near", "far")
        }


def main() -> None:
    known = {name: normal_scores(name) for name in NETWORKS}
    lean = frozen()["third"]["fusion_lean"]
    rows = [{"why": "`fusion_lean`", "members": lean, "rule": rule} for rule in RULES]
    rows += [{"why": "and whitened", "members": [*lean, "grood_w", "grood_margin_w"], "rule": rule} for rule in RULES]
    rows += best({name: one.sample(SAMPLE) for name, one in known.items()})
    measured = [row | {name: one.means(row["members"], row["rule"]) for name, one in known.items()} for row in rows]
    weights = {name: subjects.weights(name) for name in NETWORKS}
    RESULT.write_text(json.dumps({"weights": weights, "rows": measured}, indent=1) + "\n")


def normal_scores(network: str) -> Known:
    """The candidates' scores of a network, on the scale that a fusion puts them on."""
    its = features(network)
    scores = fitted(CANDIDATES, its, subjects.subject(network).backbone)
    tuned = score_all(scores, CANDIDATES, its.outputs("tune"))
    maps = NormalMaps([NormalMap.fit(tuned[name].numpy()) for name in CANDIDATES])

    def normal(part: str) -> NDArray[np.float64]:
        values = score_all(scores, CANDIDATES, its.outputs(part))
        return maps(torch.stack([values[name] for name in CANDIDATES])).numpy()

    return Known({part: normal(part) for part in ("test", *its.groups)}, its.groups)


def best(sampled: Mapping[str, Known]) -> list[dict[str, Any]]:
    """The subsets with the largest sum of near and far means over the networks."""

    def total(choice: tuple[tuple[str, ...], str]) -> float:
        return sum(sum(known.means(*choice).values()) for known in sampled.values())

    chosen = sorted(_choices(), key=total, reverse=True)[:KEPT]
    return [{"why": f"rank {rank}", "members": [*names], "rule": rule} for rank, (names, rule) in enumerate(chosen, 1)]


def _choices() -> Iterator[tuple[tuple[str, ...], str]]:
    for size in SIZES:
        for members in combinations(CANDIDATES, size):
            yield from ((members, rule) for rule in RULES)


if __name__ == "__main__":
    main()
