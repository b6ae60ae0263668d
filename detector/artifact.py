# SPDX-License-Identifier: Apache-2.0
"""The model directory: JSON and safetensors, every file under a digest, the manifest written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from detector.backbone import Precision
from detector.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound, SplitOverlap
from detector.images import Preprocessing
from detector.networks import NetworkSpec
from detector.policy import Policy

LARGEST_OVERLAP = 0.01  # of a set of images; more means that the sets were not held apart
OOD_SPLIT = "ood"  # images that the OOD prototype is made of, where the user gave some
MANIFEST, REPORT = "manifest.json", "report.json"
WEIGHTS, EXPORT = "backbone.safetensors", "backbone.pt2"
SPLITS, SCORES, CALIBRATION, GOLDEN = (
    "splits.safetensors", "scores.safetensors", "calibration.safetensors", "golden.safetensors",
)  # fmt: skip
# Tolerance of the golden logits, as a share of the largest one.
GOLDEN_TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "bf16": 5e-2}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationRecord(_Record):
    """Where the promise comes from.

    Args:
        n: images, or groups of images where `grouped`.
        timestamp: seconds since 1970 when they were scored.
        source: what the person who calibrated called them.
        grouped: one image was drawn of each camera, patient or burst.
        dropped: images left out because they are also in the fit or tune split.
    """

    n: int
    timestamp: float
    source: str
    grouped: bool = False
    dropped: int = 0


class FitRecord(_Record):
    """How the scores were fitted: images, the network's accuracy on them, and the options."""

    n: int
    accuracy: float
    bank_size: int | None
    mixup_images: int
    mixup_coefficient: float
    generator: str = "mixup"


class Manifest(_Record):
    """What a model directory is and holds; the schema of manifest.json."""

    schema_version: Literal[1] = 1
    name: str
    version: str
    created: str
    network: NetworkSpec
    head: str
    early: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    scores: tuple[str, ...]
    shadow_scores: tuple[str, ...]
    policy: Policy
    group_of_class: tuple[int, ...]
    group_names: tuple[str, ...]
    precisions: tuple[Precision, ...]
    score_tolerance: dict[str, dict[str, float]] = {}  # by precision and score, and policy.DOUBT
    splits: dict[str, int] = {}
    fit: FitRecord
    calibration: CalibrationRecord
    report: dict[str, Any] = {}
    files: dict[str, str] = {}
    model_digest: str = ""

    def digest(self) -> str:
        """SHA-256 over everything that influences a verdict: not the report, nor when anything was done."""
        return _model_digest(self.model_dump(mode="json"))


@dataclass
class Artifact:
    """A model directory in memory.

    Args:
        manifest: without digests until saved.
        weights: the network's tensors, or None where `export` holds the network.
        export: the bytes of backbone.pt2.
        scores: fitted tensors, `SCORE.TENSOR`.
        splits: sorted int64 image ids by split.
        calibration: sorted float64 scores, `PRECISION.SCORE.GROUP`.
        golden: `images` uint8 [G, H, W, 3], and `PRECISION.logits`, `PRECISION.labels`, `PRECISION.deferred`.
        report: the content of report.json.
    """

    manifest: Manifest
    weights: dict[str, Tensor] | None
    export: bytes | None
    scores: dict[str, Tensor]
    splits: dict[str, Tensor]
    calibration: dict[str, Tensor] = field(default_factory=dict)
    golden: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into an ArtifactError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be written: {error}. Make room there, or choose another place") from error


def save(artifact: Artifact, directory: Path) -> Manifest:
    """Write a new model directory; it appears whole or not at all.

    Returns:
        the manifest with its digests.

    Raises:
        ArtifactError: the directory exists already, or cannot be written.
        SplitOverlap: one image lies in two splits.
    """
    if directory.exists():
        raise ArtifactError(f"{directory} exists; choose another version")
    check_disjoint(artifact.splits)
    with writing(directory):
        partial = directory.with_name(f"{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {SCORES: artifact.scores, CALIBRATION: artifact.calibration, SPLITS: artifact.splits}
        for name, content in (tensors | {GOLDEN: artifact.golden}).items():
            save_file(_stored(content), partial / name)
        if artifact.weights is not None:
            save_file(_stored(artifact.weights), partial / WEIGHTS)
        if artifact.export is not None:
            (partial / EXPORT).write_bytes(artifact.export)
        (partial / REPORT).write_text(_pretty(artifact.report))
        for path in partial.iterdir():
            path.chmod(0o644)  # the server often runs as another user than the one who fitted
        files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
        manifest = artifact.manifest.model_copy(update={"files": files})
        manifest = manifest.model_copy(update={"model_digest": manifest.digest()})
        _write_manifest(manifest, partial)
        partial.rename(directory)
    return manifest


def load(directory: Path) -> Artifact:
    """Read a model directory and verify it.

    Raises:
        ArtifactNotFound: no manifest there.
        ArtifactCorrupt: a file is missing, foreign or altered, or the manifest is not of this schema.
        SplitOverlap: one image lies in two splits.
    """
    manifest = read_manifest(directory)
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    if present != set(manifest.files) or REPORT not in present:
        odd = ", ".join(sorted(present ^ set(manifest.files))) or REPORT
        raise ArtifactCorrupt(f"{directory}: {odd}: not both on disk and in the manifest; copy the directory again")
    for name, expected in manifest.files.items():
        if name != REPORT and file_digest(directory / name) != expected:
            raise ArtifactCorrupt(
                f"{directory / name} differs from its digest in the manifest; copy the directory again"
            )
    weights = mapped_weights(directory, manifest)
    try:
        artifact = Artifact(
            manifest=manifest,
            weights=weights,
            export=(directory / EXPORT).read_bytes() if EXPORT in manifest.files else None,
            scores=load_file(directory / SCORES),
            calibration=load_file(directory / CALIBRATION),
            splits=load_file(directory / SPLITS),
            golden=load_file(directory / GOLDEN),
            report=read_report(directory, manifest),
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactCorrupt(f"{directory}: {error}") from error
    check_disjoint(artifact.splits)
    return artifact


def mapped_weights(directory: Path, manifest: Manifest) -> dict[str, Tensor] | None:
    """The network's tensors as the file has them, or None where it has none; each takes memory once it is read.

    Raises:
        ArtifactCorrupt: they cannot be read.
    """
    try:
        return load_file(directory / WEIGHTS) if WEIGHTS in manifest.files else None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactCorrupt(f"{directory}: {error}") from error


def read_manifest(directory: Path) -> Manifest:
    """The manifest alone, checked against its own digest; errors as for `load`."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactNotFound(f"{directory} holds no {MANIFEST}; it is no model, or was never completely written")
    try:
        content = path.read_bytes()
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactCorrupt(f"{path} is no manifest of schema 1: {where}: {first['msg']}") from error
    # Of the file as it stands: a field that a later version adds must not condemn it.
    try:
        digest = _model_digest(json.loads(content))
    except ValueError as error:  # NaN, which JSON does not know
        raise ArtifactCorrupt(f"{path} is not JSON: {error}") from error
    if digest != manifest.model_digest:
        raise ArtifactCorrupt(f"{path} differs from its own digest; it was edited after it was written")
    return manifest


def read_report(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """The stored evaluation; empty where it is missing or damaged, for it influences no verdict and keeps none back."""
    try:
        content = (directory / REPORT).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.files.get(REPORT):
            return {}
        report: dict[str, Any] = json.loads(content)
    except (OSError, ValueError):
        return {}
    return report


def replace_report(directory: Path, report: Mapping[str, Any], summary: Mapping[str, Any]) -> Manifest:
    """Store a new evaluation: report.json whole, `summary` in the manifest. No verdict changes, nor the model digest.

    A crash between the two replacements leaves a report that differs from its digest: `load` then gives an empty one,
    and evaluating again mends it.
    """
    manifest = read_manifest(directory)
    fresh = directory.with_name(f"{directory.name}.{REPORT}.partial")
    fresh.write_text(_pretty(report))
    files = manifest.files | {REPORT: file_digest(fresh)}
    manifest = manifest.model_copy(update={"report": dict(summary), "files": files})
    fresh.replace(directory / REPORT)
    _write_manifest(manifest, directory)
    return manifest


def check_disjoint(splits: Mapping[str, Tensor]) -> None:
    """Raise SplitOverlap where one image id lies in two splits."""
    names = sorted(splits)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            shared = np.intersect1d(splits[first].numpy(), splits[second].numpy())
            if len(shared):
                raise SplitOverlap(
                    f"{len(shared)} images lie in both the {first} and the {second} split; "
                    "the promise needs disjoint ones"
                )


def without_overlap(ids: Tensor, splits: Mapping[str, Tensor], name: str) -> tuple[Tensor, int]:
    """Which images are new to all splits, and how many are not.

    Raises:
        SplitOverlap: more than 1 % are in another split.
    """
    taken = torch.cat(list(splits.values())) if splits else torch.zeros(0, dtype=torch.int64)
    new = ~torch.isin(ids, taken)
    dropped = int((~new).sum())
    if dropped > LARGEST_OVERLAP * len(ids):
        raise SplitOverlap(
            f"{dropped} of {len(ids)} {name} images are also in the {' or '.join(splits)} split; "
            "the promise needs images that nothing was fitted on"
        )
    return new.nonzero().flatten(), dropped


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sorted_ids(ids: Tensor) -> Tensor:
    """Ids of a split as the artifact keeps them: int64, ascending, each once."""
    unique: Tensor = torch.unique(ids.to(torch.int64), sorted=True)
    return unique


def _model_digest(content: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in content.items() if name not in ("report", "created", "model_digest")}
    kept["calibration"] = {name: value for name, value in content["calibration"].items() if name != "timestamp"}
    kept["files"] = {name: digest for name, digest in content["files"].items() if name != REPORT}
    return "sha256:" + hashlib.sha256(_canonical(kept)).hexdigest()


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies: two scores may hold one tensor, which the format refuses.
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _write_manifest(manifest: Manifest, directory: Path) -> None:
    partial = directory.with_name(f"{directory.name}.{MANIFEST}.partial")
    with partial.open("w") as file:
        file.write(_pretty(manifest.model_dump(mode="json")))
        file.flush()
        os.fsync(file.fileno())
    partial.chmod(0o644)
    partial.replace(directory / MANIFEST)


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _pretty(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
