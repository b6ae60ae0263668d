# SPDX-License-Identifier: Apache-2.0
"""The model card, for a terminal."""

from __future__ import annotations

from detector.artifact import OOD_SPLIT, Manifest


def card(manifest: Manifest) -> str:
    """What a model is, what it promises and what was measured, in about ten lines."""
    policy, calibration = manifest.policy, manifest.calibration
    guarantee = policy.guarantee
    promise = {
        "pac": f"with probability {1 - guarantee.delta:.0%} over calibrations",
        "marginal": "on average over calibrations",
        "simultaneous": f"for every target at once, with probability {1 - guarantee.delta:.0%} over calibrations",
    }[guarantee.kind]
    unit = "groups" if calibration.grouped else "images"
    low, high = manifest.report["expected_acceptance_interval"]
    shown = {policy.score_name, *manifest.shadow_scores}
    others = [name for name in manifest.scores if name not in shown]
    lines = [
        f"{manifest.name} version {manifest.version}  {manifest.model_digest}",
        f"network      {manifest.network.kind} {manifest.network.name}".rstrip(),
        f"input        {manifest.preprocessing.crop[0]} x {manifest.preprocessing.crop[1]}",
        f"classes      {len(manifest.class_names)}: {', '.join(manifest.class_names[:12])}",
        f"score        {policy.score_name}; beside it {', '.join(manifest.shadow_scores) or 'none'}",
        *([f"fitted too   {', '.join(others)}"] if others else []),
        f"fitted on    {manifest.fit.n:,} images, of which the network gets {manifest.fit.accuracy:.1%} right",
        f"calibrated   on {calibration.n:,} {unit} of {calibration.source or 'unnamed'}",
        f"promise      accepts {policy.target_id_acceptance:.1%} of such images or more, {promise};",
        f"             95 % of calibrations give between {low:.2%} and {high:.2%}",
    ]
    if manifest.fit.generator == "images":
        images = f"{manifest.splits[OOD_SPLIT]:,} images" if OOD_SPLIT in manifest.splits else "images"
        lines.append(f"OOD images   the OOD prototype of the GROOD forms is made of {images} given to the fit")
    if manifest.group_names == ("other",):
        lines.append("thresholds   one for all classes: no class had enough tune images for a threshold of its own")
    elif len(manifest.group_names) > 1:
        lines.append(f"thresholds   by predicted class: {', '.join(manifest.group_names)}")
    measured = manifest.report.get("id")
    if measured:
        accuracy = "" if measured["accuracy"] is None else f"accuracy {measured['accuracy']:.2%}, "
        interval = "{:.2%} to {:.2%}".format(*measured["acceptance_interval"])
        seen = f"{accuracy}accepted {measured['acceptance']:.2%} ({interval})"
        lines.append(f"measured     on {measured['n']:,} test images: {seen}")
    return "\n".join(lines)
