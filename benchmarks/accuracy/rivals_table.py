# SPDX-License-Identifier: Apache-2.0
"""The comparison with pytorch-ood as Markdown: on the same features, and ODIN on the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.marks import label
from benchmarks.accuracy.subjects import named

GROUPS = ("near", "far")
SEEN = ("embedded", "resnet20", "densenet_cifar10", "densenet_cifar100")
KNOWN = {"densenet_cifar100": "cifar100"}  # others: cifar10
ABSENT = {"adascale": "AdaSCALE", "weiper": "WeiPer"}
ON_FEATURES = """\
AUROC in per cent on the same features. `aligned`: the library with our parameters; `defaults`: with its own.
`their way`: our `gen` with p clipped to [1e-7, 1 - 1e-7] and our `mds` with a ridge of 1e-6 in place of the
cut of small eigenvalues; these two conventions of the library explain every difference of more than 0.2 points.
"""
ON_IMAGES = """### ODIN

The library's ODIN takes a gradient at the input, so two forward passes and a backward pass an image; it was measured on
samples, beside `msp` on the same images. Temperature 1,000 and step 0.0014 are its published defaults, tuned to no
network here. `aligned`: the step in pixels scaled to 0-1, as its authors take it; `defaults`: in the normalised input,
as the library does unless told the std.
"""


def rivals_section(results: Path, published: Mapping[str, Any]) -> str:
    """The tables of the results `rivals-NETWORK.json` and `odin-NETWORK.json` in a folder, beside published figures."""
    on_features, on_images = (_read(results, kind) for kind in ("rivals", "odin"))
    parts = [ON_FEATURES, *_feature_lines(on_features, published), "", *_subjects(on_features), "", ON_IMAGES]
    parts += [*_odin_lines(on_images, published), "", *_subjects(on_images), "", _absent(published)]
    return "\n".join(parts) + "\n"


def _read(results: Path, kind: str) -> list[dict[str, Any]]:
    paths = [results / f"{kind}-{name}.json" for name in SEEN]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _feature_lines(found: list[dict[str, Any]], published: Mapping[str, Any]) -> list[str]:
    lines = [
        "| network | score | group | ours | their way | aligned | defaults | ours - aligned | published |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in found:
        for score, row in result["scores"].items():
            for group in (group for group in GROUPS if group in row):
                cell = row[group]
                figures = [_percent(cell, side) for side in ("ours", "ours_their_way", "aligned", "defaults")]
                gap = f"{100 * cell['ours_minus_aligned']:+.2f}" if "ours_minus_aligned" in cell else ""
                name = label(score, result["network"], score)
                cells = [result["network"], name, group, *figures, gap, _theirs(result, score, group, published)]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _odin_lines(found: list[dict[str, Any]], published: Mapping[str, Any]) -> list[str]:
    lines = [
        "| network | images of each set | group | `msp` | ODIN, aligned | ODIN, defaults | ODIN, published |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for result in found:
        for group in GROUPS:
            msp, odin = (result["scores"][score][group] for score in ("msp", "odin"))
            figures = [_percent(msp, "ours"), _percent(odin, "aligned"), _percent(odin, "defaults")]
            images = f"{max(result['images'].values()):,}"
            cells = [result["network"], images, group, *figures, _theirs(result, "odin", group, published)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _subjects(found: list[dict[str, Any]]) -> list[str]:
    return [f"- {result['network']}: accuracy {result['accuracy']:.2%}. {named(result)}." for result in found]


def _absent(published: Mapping[str, Any]) -> str:
    told = []
    for key, name in ABSENT.items():
        rows = [published[known][key] for known in ("cifar10", "cifar100")]
        figures = " and ".join(f"{row['near']:.2f} / {row['far']:.2f}" for row in rows)
        told.append(f"{name} ({figures})")
    return f"Not in the library and so not run, with published near / far of CIFAR-10 and CIFAR-100: {', '.join(told)}."


def _theirs(result: Mapping[str, Any], score: str, group: str, published: Mapping[str, Any]) -> str:
    row = published[KNOWN.get(result["network"], "cifar10")].get(score, {})
    return f"{row[group]:.2f}" if group in row else ""


def _percent(cell: Mapping[str, float], side: str) -> str:
    return f"{100 * cell[side]:.2f}" if side in cell else ""
