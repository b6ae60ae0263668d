# SPDX-License-Identifier: Apache-2.0
"""The whole chain for a batch of images, from an artifact."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detector import artifact as artifacts
from detector.artifact import GOLDEN_TOLERANCE, Artifact, Manifest
from detector.backbone import Backbone, Mode, Precision, Run
from detector.errors import ArtifactCorrupt, ArtifactError, CalibrationError, GoldenMismatch, OodgateError
from detector.features import bind
from detector.images import Limits, Pixels, decode, image_ids
from detector.machine import exact_float32, fast_in_bfloat16, one_thread, resolve_device, return_freed_memory
from detector.networks import build, load_export
from detector.outputs import BATCH, Outputs
from detector.policy import CalibrationScores, Decider, Grouping, Policy, Verdict
from detector.scores import Score, registry, score_all
from detector.staging import Download, download

log = logging.getLogger(__name__)

Images = Pixels | Tensor | Sequence[bytes]
LIGHT_CELLS = 2**22  # of the largest tensor of a score, up to which one thread is as fast as several


@dataclass(frozen=True)
class Scored:
    """A batch between its scores and its verdicts: on their way from the device, logits [N, C] and each score [N]."""

    names: tuple[str, ...]
    download: Download


class Detector:
    """Outputs, scores and verdicts of one model.

    Args:
        manifest: names, preprocessing, policy.
        backbone: the network, on its device, in its precision.
        fitted: fitted scores by name.
        calibration: sorted calibration scores in the backbone's precision.
        splits: ids of the images that evaluation must not use.
    """

    def __init__(
        self,
        manifest: Manifest,
        backbone: Backbone,
        fitted: Mapping[str, Score],
        calibration: CalibrationScores,
        splits: Mapping[str, Tensor],
    ) -> None:
        self.manifest, self.backbone, self.fitted, self.calibration = manifest, backbone, fitted, calibration
        self.splits = splits
        self.decider = self.with_policy(manifest.policy)
        cells = [tensor.numel() for score in fitted.values() for tensor in score.state().values()]
        self._light = backbone.device.type == "cpu" and max(cells, default=0) <= LIGHT_CELLS

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
    ) -> Self:
        """Read, verify and build a model, and prove it on its golden inputs.

        Args:
            path: a model directory.
            device: cpu, cuda, cuda:N, or auto: cuda where there is one.
            precision: fp32, bf16, or auto: bf16 where it is calibrated, the device multiplies in it and its golden
                answers are met, else fp32.

        Raises:
            ArtifactNotFound, ArtifactCorrupt, SplitOverlap: see `artifact.load`.
            ArtifactError: the precision asked for was never calibrated, or the files do not fit each other.
            BackboneError: the device is not there.
            GoldenMismatch: this machine answers otherwise than the one that wrote the artifact.
        """
        artifact = artifacts.load(Path(path))
        unread = artifacts.mapped_weights(Path(path), artifact.manifest)
        target = resolve_device(device)
        exact_float32(target)
        detector = cls._best(artifact, target, precision)
        artifact.weights = unread  # what was read to build the network leaves the memory until it is built again
        return detector

    @classmethod
    def from_artifact(
        cls, artifact: Artifact, device: torch.device, precision: Precision, module: nn.Module | None = None
    ) -> Self:
        """Build a detector from an artifact in memory, without the golden self-test.

        `module` is its network, where that is in memory already.
        """
        manifest = artifact.manifest
        backbone = _backbone(artifact, module, device, precision)
        scores = {name: registry()[name].from_state(_part(artifact.scores, name), backbone) for name in manifest.scores}
        bind(scores)
        return cls(manifest, backbone, scores, calibration_scores(artifact, precision), artifact.splits)

    @classmethod
    def _best(cls, artifact: Artifact, device: torch.device, asked: str) -> Self:
        *preferred, last = _candidates(artifact.manifest, device, asked)
        for candidate in preferred:
            try:
                return cls._proven(artifact, device, candidate)
            except GoldenMismatch as error:
                log.warning("%s is left for %s: %s", candidate, last, error, extra={"model": artifact.manifest.name})
        return cls._proven(artifact, device, last)

    @classmethod
    def _proven(cls, artifact: Artifact, device: torch.device, precision: Precision) -> Self:
        try:
            detector = cls.from_artifact(artifact, device, precision)
            detector.self_test(artifact.golden)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, OodgateError):
                raise
            name = f"{artifact.manifest.name}/{artifact.manifest.version}"
            raise ArtifactError(f"{name} cannot be used: {type(error).__name__}: {error}") from error
        return_freed_memory()
        return detector

    def with_forward(self, forward: Run, moves: Mapping[str, float], mode: Mode = "compiled") -> Self:
        """The same model with its network in another form.

        Args:
            forward: that form.
            moves: by score, and DOUBT, how far it may differ from the form that was calibrated; no tolerance becomes
                smaller.
            mode: what that form is.
        """
        precision = self.backbone.precision
        known = self.manifest.score_tolerance[precision]
        tolerance = {name: max(known.get(name, 0.0), move) for name, move in moves.items()}
        manifest = self.manifest.model_copy(
            update={"score_tolerance": self.manifest.score_tolerance | {precision: known | tolerance}}
        )
        backbone = self.backbone.with_forward(forward, mode)
        return type(self)(manifest, backbone, self.fitted, self.calibration, self.splits)

    @cached_property
    def scores_without_backward(self) -> tuple[str, ...]:
        """The scores that `scores` computes where none are named."""
        return tuple(name for name, score in self.fitted.items() if not score.backward)

    def with_policy(self, policy: Policy, shadows: Sequence[str] | None = None) -> Decider:
        """A decider for another policy over the same calibration.

        Raises:
            CalibrationError: the target was moved after calibration without the `simultaneous` guarantee; or as for
                `Decider`.
        """
        check_target(policy, self.manifest)
        tolerances = self.manifest.score_tolerance[self.backbone.precision]
        chosen = self.manifest.shadow_scores if shadows is None else shadows
        return Decider(policy, self.calibration, self.manifest.class_names, tolerances=tolerances, shadows=chosen)

    def outputs(self, images: Images) -> Outputs:
        """Run the network.

        Args:
            images: uint8 [N, H, W, 3] of the network's input size, or a list of encoded images.

        Raises:
            DataError: wrong shape or dtype.
            ImageError: an encoded image cannot be used.
        """
        pixels = self.pixels(images)
        parts = [self.backbone.outputs(part) for part in torch.split(pixels, BATCH)] or [self.backbone.outputs(pixels)]
        logits, penultimate = torch.cat([p.logits for p in parts]), torch.cat([p.penultimate for p in parts])
        return Outputs(logits, penultimate, ids=torch.from_numpy(image_ids(pixels.numpy())), inputs=pixels)

    def scores(self, outputs: Outputs, names: Sequence[str] | None = None) -> dict[str, NDArray[np.float64]]:
        """Scores float64 [N] by name, larger = more OOD; all that need no backward pass where none are named."""
        chosen = self.scores_without_backward if names is None else names
        computed = score_all(self.fitted, chosen, outputs)
        return {name: values.numpy() for name, values in zip(computed, download([*computed.values()]), strict=True)}

    def verdicts(self, images: Images) -> list[Verdict]:
        """Verdicts, one an image; arguments and errors as for `outputs`."""
        return self.judge(self.outputs(images))

    def judge(self, outputs: Outputs, decider: Decider | None = None) -> list[Verdict]:
        """Verdicts from outputs, under the artifact's policy where no other is given."""
        decider = decider or self.decider
        return self.finish_judging(self.start_judging(outputs, decider), decider)

    @property
    def asynchronous(self) -> bool:
        """Whether the device works on its own: what is started there returns before it is done."""
        return self.backbone.device.type == "cuda"

    def start_judging(self, outputs: Outputs, decider: Decider, *, shadows: bool = True) -> Scored:
        """Start the deciding score, and the shadows unless they are sampled out; does not wait for the device."""
        names = (decider.policy.score_name, *(decider.shadows if shadows else ()))
        with torch.inference_mode(), self.scoring_threads():
            scores = score_all(self.fitted, names, outputs)
            if not outputs.checked:
                finite = outputs.finite()
                scores = {name: values.where(finite, torch.nan) for name, values in scores.items()}
            return Scored((*scores,), Download([outputs.logits, *scores.values()]))

    def finish_judging(self, scored: Scored, decider: Decider) -> list[Verdict]:
        """Fetch what `start_judging` started, and decide: verdicts, one an image."""
        with self.scoring_threads():
            logits, *scores = scored.download.tensors()
            return decider.decide(
                logits, {name: values.numpy() for name, values in zip(scored.names, scores, strict=True)}
            )

    def scoring_threads(self) -> AbstractContextManager[None]:
        """As many threads for a block of scoring as are worth it: one, where no score is large."""
        return one_thread() if self._light else nullcontext()

    def pixels(self, images: Images) -> Tensor:
        """Images as one tensor uint8 [N, H, W, 3] on the CPU."""
        if isinstance(images, Tensor):
            return images.cpu()
        if isinstance(images, np.ndarray):
            return torch.from_numpy(images)
        preprocessing = self.manifest.preprocessing
        limits = Limits()
        decoded = [decode(data, preprocessing, limits) for data in images]
        return torch.from_numpy(np.stack(decoded) if decoded else np.zeros((0, *self.backbone.input_shape), np.uint8))

    def self_test(self, golden: Mapping[str, Tensor]) -> None:
        """Compare this machine's answers to the golden inputs with the stored ones.

        Raises:
            GoldenMismatch: a label or decision differs, or a logit by more than the precision's tolerance.
        """
        precision = self.backbone.precision
        outputs = self.outputs(golden["images"])
        expected = golden[f"{precision}.logits"]
        logits = outputs.logits.cpu()
        allowed = GOLDEN_TOLERANCE[precision] * float(expected.abs().max())
        error = float((logits - expected).abs().max())
        if error > allowed:
            raise GoldenMismatch(f"a golden logit differs by {error:.3g}; {precision} allows {allowed:.3g}")
        deferred = torch.tensor([verdict.decision == "defer" for verdict in self.judge(outputs)])
        same = (logits.argmax(1) == golden[f"{precision}.labels"]) & (deferred == golden[f"{precision}.deferred"])
        if not bool(same.all()):
            wrong = (~same).nonzero().flatten().tolist()
            raise GoldenMismatch(f"golden inputs {wrong} get another label or decision than the artifact stores")


def check_target(policy: Policy, manifest: Manifest) -> None:
    """Refuse, as CalibrationError, a target moved after calibration without the `simultaneous` guarantee."""
    fixed = manifest.policy.target_id_acceptance
    if policy.target_id_acceptance != fixed and policy.guarantee.kind != "simultaneous":
        raise CalibrationError(
            f"a {policy.guarantee.kind} promise holds for the target that was fixed before calibration, {fixed}; "
            "use the simultaneous guarantee or calibrate again"
        )


def calibration_scores(artifact: Artifact, precision: Precision) -> CalibrationScores:
    """The calibration of one precision, as stored.

    Raises:
        ArtifactCorrupt: a group's scores are missing.
    """
    grouping = Grouping(artifact.manifest.group_of_class, artifact.manifest.group_names)
    stored = {key: value for key, value in artifact.calibration.items() if key.startswith(f"{precision}.")}
    names = dict.fromkeys(key.split(".")[1] for key in stored)
    try:
        split = {
            name: [stored[f"{precision}.{name}.{group}"].numpy() for group in range(len(grouping.names))]
            for name in names
        }
    except KeyError as error:
        raise ArtifactCorrupt(f"the calibration has no {error}") from None
    return CalibrationScores(grouping, split)


def network_of(artifact: Artifact) -> nn.Module:
    """The network that an artifact carries, with its weights."""
    if artifact.export is not None:
        return load_export(artifact.export, artifacts.EXPORT)
    if artifact.weights is None:
        raise ArtifactCorrupt("the artifact holds neither backbone.safetensors nor backbone.pt2")
    module = build(artifact.manifest.network)
    module.load_state_dict(artifact.weights)
    return module


def _backbone(artifact: Artifact, module: nn.Module | None, device: torch.device, precision: Precision) -> Backbone:
    manifest = artifact.manifest
    rebuild = partial(network_of, artifact)
    backbone = Backbone(
        rebuild() if module is None else module,
        manifest.preprocessing,
        head=manifest.head,
        early=manifest.early,
        device=device,
        precision=precision,
        rebuild=rebuild if module is None else None,
    )
    backbone.release()
    return backbone


def _candidates(manifest: Manifest, device: torch.device, asked: str) -> list[Precision]:
    """Precisions to try, best first; never empty."""
    if asked == "auto":
        calibrated: list[Precision] = [name for name in ("bf16", "fp32") if name in manifest.precisions]
        return calibrated if fast_in_bfloat16(device) else calibrated[-1:]
    for precision in manifest.precisions:
        if precision == asked:
            return [precision]
    raise ArtifactError(f"precision {asked} was never calibrated; this artifact has {', '.join(manifest.precisions)}")


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
