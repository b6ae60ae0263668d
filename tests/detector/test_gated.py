# SPDX-License-Identifier: Apache-2.0
"""The gate around a network that is already in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detector import Detector, GatedModel, artifact as artifacts
from detector.cifar_resnet import CifarResNet18
from detector.detector import network_of
from detector.errors import ArtifactError, DataError, GoldenMismatch, WeightsMismatch
from detector.policy import Verdict
from tests.helpers import EMBEDDED, TOY_SPEC, encoded, toy_images

IMAGES = np.concatenate(
    [toy_images(9, seed=60)[0], np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)]
)


@pytest.fixture
def network(toy: Path) -> nn.Module:
    """The user's own network, with the weights that the toy model was fitted on."""
    return network_of(artifacts.load(toy))


@pytest.fixture
def gated(network: nn.Module, toy: Path) -> GatedModel:
    return GatedModel(network, toy)


def assert_alike(got: list[Verdict], expected: list[Verdict], model: Path) -> None:
    """The same decisions, from scores as near as rounding in batches of other sizes brings them."""
    assert [verdict.decision for verdict in got] == [verdict.decision for verdict in expected]
    name = expected[0].ood.score_name
    tolerance = 10 * artifacts.read_manifest(model).score_tolerance["fp32"][name]
    assert [verdict.ood.score for verdict in got] == pytest.approx([v.ood.score for v in expected], abs=tolerance)


def test_the_verdicts_are_those_of_the_detector(gated: GatedModel, toy: Path) -> None:
    out = gated(gated.prepare(IMAGES))
    expected = Detector.load(toy, device="cpu", precision="fp32").verdicts(IMAGES)
    assert_alike(out.verdicts, expected, toy)
    assert out.accept.tolist() == [verdict.decision == "accept" for verdict in expected]
    assert 0 < int(out.accept.sum()) < len(IMAGES)


def test_the_logits_are_the_networks_own_from_one_forward(gated: GatedModel, network: nn.Module) -> None:
    x = gated.prepare(IMAGES)
    passes: list[Any] = []
    network.get_submodule("conv1").register_forward_hook(lambda *call: passes.append(call))
    out = gated(x)
    assert len(passes) == 1
    with torch.no_grad():
        torch.testing.assert_close(out.logits, network(x))


def test_the_network_is_shared_and_adds_no_tensors(gated: GatedModel, network: nn.Module) -> None:
    assert gated.module is network
    assert {id(parameter) for parameter in gated.parameters()} == {id(parameter) for parameter in network.parameters()}


def test_encoded_images_are_prepared_as_in_the_fit(gated: GatedModel) -> None:
    assert torch.equal(gated.prepare([encoded(image) for image in IMAGES]), gated.prepare(IMAGES))


def test_an_empty_batch_gives_an_empty_answer(gated: GatedModel) -> None:
    out = gated(torch.zeros(0, 3, 32, 32))
    assert (out.logits.shape, out.accept.shape, out.verdicts) == ((0, 4), (0,), [])


def test_the_state_dict_is_the_networks_own_and_goes_back_in(gated: GatedModel, network: nn.Module) -> None:
    assert gated.state_dict().keys() == network.state_dict().keys()
    gated.load_state_dict(network.state_dict())
    app = nn.ModuleDict({"eye": gated})
    assert set(app.state_dict()) == {f"eye.{name}" for name in network.state_dict()}
    app.load_state_dict(app.state_dict())


def test_weights_that_were_not_calibrated_are_refused(gated: GatedModel, network: nn.Module, toy: Path) -> None:
    other = {name: value.clone() for name, value in network.state_dict().items()} | {"fc.bias": torch.ones(4)}
    with pytest.raises(WeightsMismatch, match=r"1 of \d+ tensors .* fc.bias"):
        gated.load_state_dict(other)
    with pytest.raises(WeightsMismatch, match=r"fc.bias"):
        GatedModel(network, toy)
    with pytest.raises(WeightsMismatch):
        GatedModel(nn.Linear(3, 4), toy)


def test_a_network_with_the_same_weights_that_computes_otherwise_is_refused(network: nn.Module, toy: Path) -> None:
    class Brighter(CifarResNet18):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1)

    other = Brighter(TOY_SPEC.num_classes, TOY_SPEC.width)
    other.load_state_dict(network.state_dict())
    with pytest.raises(GoldenMismatch):
        GatedModel(other, toy)


def test_training_mode_is_refused_until_eval(gated: GatedModel) -> None:
    assert not gated.training
    x = gated.prepare(IMAGES)
    gated.train()
    with pytest.raises(DataError, match=r"eval\(\)"):
        gated(x)
    assert len(gated.eval()(x).verdicts) == len(IMAGES)


def test_weights_stored_as_half_are_known_again() -> None:
    stored = artifacts.load(EMBEDDED)
    assert stored.weights is not None
    assert stored.weights["conv1.weight"].dtype == torch.float16
    gated = GatedModel(network_of(stored), EMBEDDED)
    expected = Detector.load(EMBEDDED, device="cpu", precision="fp32").verdicts(IMAGES)
    assert_alike(gated(gated.prepare(IMAGES)).verdicts, expected, EMBEDDED)


def test_a_model_without_fp32_calibration_is_refused(network: nn.Module, toy: Path, tmp_path: Path) -> None:
    artifact = artifacts.load(toy)
    artifact.manifest = artifact.manifest.model_copy(update={"precisions": ("bf16",)})
    artifacts.save(artifact, tmp_path / "bf16")
    with pytest.raises(ArtifactError, match="not calibrated in fp32"):
        GatedModel(network, tmp_path / "bf16")


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, 16, 16), torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(3, 32, 32)]
)
def test_what_the_network_does_not_take_is_refused(gated: GatedModel, x: Tensor) -> None:
    with pytest.raises(DataError, match="prepare"):
        gated(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gate_follows_the_network_to_another_device(gated: GatedModel) -> None:
    expected = gated(gated.prepare(IMAGES)).accept
    gated.to("cuda")
    out = gated(gated.prepare(IMAGES))
    assert out.logits.device.type == out.accept.device.type == "cuda"
    assert torch.equal(out.accept.cpu(), expected)
