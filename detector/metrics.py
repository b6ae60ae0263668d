# SPDX-License-Identifier: Apache-2.0
"""Measures of scores, as pure functions of arrays; larger score = more OOD, ties always resolved in expectation.

OOD detection: AUROC, AUPR and "FPR at 95 %" under both conventions. Intervals: the bootstrap, stratified over the
in-distribution images and each OOD set.

Classify or defer: images are accepted from the lowest score up. At coverage c = k / N, k of N images are accepted and
F_k of those are failures.
- AURC is the mean over k of the selective risk F_k / k (Geifman, Uziel and El-Yaniv, arXiv 1805.08206).
- AUGRC is the area under the generalised risk F_k / N over c by the trapezoid rule: the average risk of undetected
  failures (Traub et al., arXiv 2407.01032). It equals (1 - AUROC_f) a (1 - a) + (1 - a)^2 / 2, where a is the share of
  images that are no failures and AUROC_f tells those from failures.
A failure is an in-distribution image with a wrong answer, and, where an OOD set is mixed in, every image of it. With an
OOD set both areas therefore depend on how many of its images there are to one in-distribution image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError

Scores = NDArray[np.float64]
Flags = NDArray[np.bool_]
REPLICATES = 1_000
CHUNK = 50  # replicates at a time: a few megabytes of weights
LEVEL = 0.95


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Probability that an OOD image scores above an in-distribution one, ties counting half."""
    from scipy.stats import rankdata  # here: it takes 46 MB and 0.4 s, and a server never measures an AUROC

    ranks = rankdata(np.concatenate([id_scores, ood_scores]))
    n_id, n_ood = len(id_scores), len(ood_scores)
    return float((ranks[n_id:].sum() - n_ood * (n_ood + 1) / 2) / (n_id * n_ood))


def ood_miss_rate_at_id95(id_scores: Scores, ood_scores: Scores) -> float:
    """Share of OOD images accepted where 95 % of in-distribution images are: the FPR95 of most papers."""
    cut = np.quantile(id_scores, 0.95, method="inverted_cdf")
    return float(np.mean(ood_scores <= cut))


def id_flag_rate_at_ood95(id_scores: Scores, ood_scores: Scores) -> float:
    """Share of in-distribution images flagged where 95 % of OOD images are: the FPR@95 of OpenOOD."""
    cut = np.quantile(-ood_scores, 0.95, method="inverted_cdf")
    return float(np.mean(-id_scores <= cut))


def aupr_ood(id_scores: Scores, ood_scores: Scores) -> float:
    """Average precision of finding OOD images by high scores; with no skill, the share of OOD images.

    A sum over the steps of recall, as scikit-learn's `average_precision_score`; OpenOOD interpolates between them.
    """
    return _average_precision(ood_scores, id_scores)


def aupr_id(id_scores: Scores, ood_scores: Scores) -> float:
    """Average precision of finding in-distribution images by low scores, otherwise as `aupr_ood`."""
    return _average_precision(-id_scores, -ood_scores)


def measures(id_scores: Scores, ood_scores: Scores) -> dict[str, float]:
    """All five, by name: scores float64 [N] and [M], each of at least one image."""
    kinds = (auroc, ood_miss_rate_at_id95, id_flag_rate_at_ood95, aupr_ood, aupr_id)
    return {kind.__name__: kind(id_scores, ood_scores) for kind in kinds}


def roc(id_scores: Scores, ood_scores: Scores) -> tuple[Scores, Scores]:
    """Shares of in-distribution and of OOD images flagged, float64 [K] each, as the cut falls through every score."""
    cuts = np.unique(np.concatenate([id_scores, ood_scores]))[::-1]
    return _share_at_least(id_scores, cuts), _share_at_least(ood_scores, cuts)


def risk_coverage(scores: Scores, failures: Flags) -> tuple[Scores, Scores]:
    """Coverage and generalised risk as images are accepted one by one from the lowest score up.

    Args:
        scores: float64 [N], N > 0.
        failures: bool [N], whether accepting the image is a mistake.

    Returns:
        coverage k / N and joint risk F_k / N, float64 [N] each for k = 1 ... N; F_k is the expected number of failures
        among the first k over all orders of tied images. Their ratio is the selective risk.
    """
    total = len(scores)
    _, block, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], sizes.cumsum()])
    failed = np.concatenate([[0.0], np.bincount(block, weights=failures).cumsum()])
    accepted = np.arange(1, total + 1)
    return accepted / total, np.interp(accepted, ends, failed) / total


def aurc(scores: Scores, failures: Flags) -> float:
    """Area under the risk-coverage curve, the mean selective risk; scores float64 [N], failures bool [N]."""
    coverage, joint = risk_coverage(scores, failures)
    return float(np.mean(joint / coverage))


def augrc(scores: Scores, failures: Flags) -> float:
    """Area under the generalised risk-coverage curve; scores float64 [N], failures bool [N]."""
    _, joint = risk_coverage(scores, failures)
    return float((joint.sum() - joint[-1] / 2) / len(joint))


def histogram_edges(parts: Sequence[Scores], bins: int) -> Scores:
    """Bin edges float64 [bins + 1] over the bulk of all the parts, whatever their extremes."""
    together = np.concatenate(parts)
    low, high = np.quantile(together[np.isfinite(together)], [0.005, 0.995]) if np.isfinite(together).any() else (0, 0)
    margin = 0.0 if low < high else max(abs(low), 1.0) / 2  # a constant score still gets bins
    return np.linspace(low - margin, high + margin, bins + 1)


def histogram(values: Scores, edges: Scores) -> NDArray[np.int64]:
    """Counts int64 [bins]; the end bins hold what lies beyond the edges."""
    bins = len(edges) - 1
    return np.bincount(np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1), minlength=bins)


def bootstrap_auroc(
    id_scores: Scores, ood: Scores | Mapping[str, Scores], n: int = REPLICATES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the AUROC of one score, or of its unweighted mean over several OOD sets.

    Args:
        id_scores: float64 [N].
        ood: float64 [M], or one such array by set.
        n: bootstrap replicates; each draws the in-distribution images and every OOD set anew, in its own size.
        seed: of the draws.
    """
    sets = list(ood.values()) if isinstance(ood, Mapping) else [ood]
    return percentiles(auroc_replicates([(id_scores, sets)], n, seed)[0].mean(axis=0))


def paired_bootstrap(
    id_a: Scores,
    ood_a: Mapping[str, Scores],
    id_b: Scores,
    ood_b: Mapping[str, Scores],
    n: int = REPLICATES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much higher the mean AUROC of score a is than that of score b, on the same images.

    Args:
        id_a, id_b: float64 [N], in the same order.
        ood_a, ood_b: float64 [M] by OOD set, in the same order.
        n, seed: as for `bootstrap_auroc`; a replicate draws the same images for both scores.

    Returns:
        the difference of the unweighted means over the sets, and its 95 % percentile interval.

    Raises:
        DataError: the two scores are not of the same images.
    """
    both = [(id_a, ood_a), (id_b, ood_b)]
    first, second = ([len(known), {name: len(values) for name, values in ood.items()}] for known, ood in both)
    if not ood_a or first != second:
        raise DataError(f"give both scores for the same images and at least one OOD set; got {first} and {second}")
    views = [(known, [ood[name] for name in ood_a]) for known, ood in both]
    means = [float(np.mean([auroc(known, values) for values in sets])) for known, sets in views]
    replicates = auroc_replicates(views, n, seed).mean(axis=1)
    return means[0] - means[1], *percentiles(replicates[0] - replicates[1])


def percentiles(replicates: Scores, level: float = LEVEL) -> tuple[float, float]:
    """The central interval that holds this share of the replicates float64 [n]."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def auroc_replicates(
    views: Sequence[tuple[Scores, Sequence[Scores]]], n: int = REPLICATES, seed: int = 0
) -> NDArray[np.float64]:
    """Bootstrap replicates of the AUROC of several scores on the same images and OOD sets.

    Sorts each score once: a replicate is a count for each image, and the AUROC a sum over counts.

    Args:
        views: for each score, float64 [N] in-distribution and float64 [M_s] for each OOD set s; the sizes agree.
        n, seed: as for `bootstrap_auroc`.

    Returns:
        float64 [scores, sets, n]; in a replicate all scores see the same draw, and all sets the same
        in-distribution images.
    """
    sizes = [len(views[0][0]), *map(len, views[0][1])]
    streams = np.random.default_rng(seed).spawn(len(sizes))
    orders = [np.argsort(known) for known, _ in views]
    places = [
        [_places(known[order], values) for values in sets] for order, (known, sets) in zip(orders, views, strict=True)
    ]
    result = np.empty((len(views), len(sizes) - 1, n))
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        known, *ood = (_draws(stream, size, rows.stop - start) for stream, size in zip(streams, sizes, strict=True))
        for view, order in enumerate(orders):
            below = np.zeros((sizes[0] + 1, rows.stop - start))  # in-distribution images drawn among the lowest
            np.cumsum(known[order], axis=0, out=below[1:])
            for index, (left, right) in enumerate(places[view]):
                twice = np.einsum("ij,ij->j", ood[index], below[left] + below[right])
                result[view, index, rows] = twice / (2 * sizes[0] * sizes[index + 1])
    return result


def _places(known: Scores, values: Scores) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """How many of the sorted in-distribution scores lie below each value, and how many not above it."""
    return np.searchsorted(known, values, side="left"), np.searchsorted(known, values, side="right")


def _draws(stream: np.random.Generator, size: int, rows: int) -> NDArray[np.float64]:
    """How often each of `size` images is drawn in `size` draws with replacement, again and again: [size, rows]."""
    drawn = stream.integers(size, size=(rows, size)) * rows + np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(size, rows).astype(np.float64)


def _average_precision(positives: Scores, negatives: Scores) -> float:
    """Sum over the cuts of precision times the recall gained there; positives score high."""
    cuts, gained = np.unique(positives, return_counts=True)
    found = gained[::-1].cumsum()[::-1]
    wrong = _share_at_least(negatives, cuts) * len(negatives)
    return float(np.sum(gained * found / (found + wrong)) / len(positives))


def _share_at_least(scores: Scores, cuts: Scores) -> Scores:
    return 1 - np.searchsorted(np.sort(scores), cuts, side="left") / len(scores)
