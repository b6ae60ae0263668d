# SPDX-License-Identifier: Apache-2.0
"""A gate inside one process: logits and verdicts from one forward of a network that is already in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detector import artifact as artifacts
from detector.artifact import Artifact
from detector.detector import Detector, Images, network_of
from detector.errors import ArtifactError, DataError, WeightsMismatch
from detector.outputs import Outputs
from detector.policy import Verdict


@dataclass(frozen=True)
class GatedOutput:
    """What one forward gives for N images.

    Args:
        logits: float32 [N, C], of the untouched network.
        accept: bool [N], on the device of the logits.
        verdicts: N of them, the objects that the server answers with.
    """

    logits: Tensor
    accept: Tensor
    verdicts: list[Verdict]


class GatedModel(nn.Module):
    """Your network and its gate as one module; the network is shared, not copied.

    It is taken over as it is: put into eval mode, frozen, channels-last. `to` moves both; `state_dict` is the network's
    own, under its own names. Weights loaded into it must be those that were calibrated.

    Args:
        module: float images [N, 3, H, W] -> logits [N, C], with the weights that the model directory was fitted on.
        path: the model directory.

    It runs in float32, the one precision in which your network and the form that was calibrated (batch norms folded)
    agree to the tolerance of a score.

    Raises:
        WeightsMismatch: the module has other weights or another structure than the calibrated network.
        GoldenMismatch: it has the same weights and yet answers otherwise.
        ArtifactNotFound, ArtifactCorrupt, ArtifactError: see `Detector.load`.
    """

    def __init__(self, module: nn.Module, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        artifact = artifacts.load(self._path)
        _check_weights(module, artifact)
        self.module = module
        self._artifact = replace(artifact, weights=None, export=None)  # the module has them
        if "fp32" not in artifact.manifest.precisions:
            raise ArtifactError(f"{path} was not calibrated in fp32; fit it with that precision too")
        self._detector = self._bind()
        self._detector.self_test(artifact.golden)
        self.eval()
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]

    @property
    def detector(self) -> Detector:
        """The chain behind the verdicts, on the device where the network is now."""
        if self._detector.backbone.device != self._device:
            self._detector = self._bind()
        return self._detector

    def prepare(self, images: Images) -> Tensor:
        """Images -> the network's input, exactly as they were prepared in the fit.

        Args:
            images: a list of encoded images, or uint8 [N, H, W, 3] of the network's input size.

        Returns:
            float32 [N, 3, H, W] on the network's device.

        Raises:
            ImageError: an encoded image cannot be used.
        """
        detector = self.detector
        return detector.backbone.normalised(detector.pixels(images))

    def forward(self, x: Tensor) -> GatedOutput:
        """Run the network once and judge each image.

        Args:
            x: float32 [N, 3, H, W], what the network takes. The promise holds for images prepared as in the fit: by
                `prepare`, or by your own code where it does the same.

        Raises:
            DataError: another shape or dtype, or the network is in training mode.
            NonFiniteFeatures: NaN or infinity came out of the network.
        """
        if self.module.training:
            raise DataError("the network is in training mode, in which nothing was calibrated; call eval()")
        detector = self.detector
        height, width, channels = detector.backbone.input_shape
        if x.dtype != torch.float32 or tuple(x.shape[1:]) != (channels, height, width):
            seen = f"{x.dtype} {tuple(x.shape)}"
            raise DataError(
                f"the network takes float32 [N, {channels}, {height}, {width}]; got {seen}. See `prepare` for images"
            )
        outputs = _run(detector, x)
        verdicts = detector.judge(outputs)
        accept = torch.tensor([verdict.decision == "accept" for verdict in verdicts], dtype=torch.bool)
        return GatedOutput(outputs.logits, accept.to(outputs.logits.device), verdicts)

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _bind(self) -> Detector:
        detector = Detector.from_artifact(self._artifact, self._device, "fp32", self.module)
        detector.backbone.forward = detector.backbone.lean(whole=True)  # no folded copy beside the network
        return detector


def _run(detector: Detector, x: Tensor) -> Outputs:
    backbone = detector.backbone
    if not len(x):
        return backbone.outputs(torch.zeros(0, *backbone.input_shape, dtype=torch.uint8))
    return backbone.outputs_of(x.to(backbone.device).contiguous(memory_format=torch.channels_last))


def _check_weights(module: nn.Module, artifact: Artifact) -> None:
    state: dict[str, Tensor] = module.state_dict()
    expected = network_of(artifact).state_dict() if artifact.weights is None else artifact.weights
    odd = sorted(
        name
        for name, value in expected.items()
        if name not in state
        or value.shape != state[name].shape
        or not torch.equal(value.to(state[name].dtype), state[name].cpu())
    )
    if odd:
        raise WeightsMismatch(
            f"{len(odd)} of {len(expected)} tensors of the calibrated network, {odd[0]} first, are missing in the "
            "module or differ from its own. Load the weights that the model was fitted on, or fit and calibrate again "
            "(a fit with half weights rounds them: take them from its backbone.safetensors)"
        )


def _strip_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, f"{prefix}module.", prefix)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    _rename(state, prefix, f"{prefix}module.")


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    own = [key for key in state if key.startswith(old)]
    state.update({new + key.removeprefix(old): value for key, value in [(key, state.pop(key)) for key in own]})


def _check_loaded(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, GatedModel)
    _check_weights(module.module, artifacts.load(module._path))
