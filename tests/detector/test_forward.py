# SPDX-License-Identifier: Apache-2.0
"""The lean form of a network, the precision that `auto` picks, and the way to a device and back."""

from __future__ import annotations

import itertools
import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detector import Detector, artifact as artifacts, staging
from detector.backbone import Backbone
from detector.cifar_resnet import CifarResNet18
from detector.errors import GoldenMismatch
from detector.forward import Forward, Precision
from detector.machine import exact_float32
from detector.networks import CIFAR_PREPROCESSING
from detector.staging import DEPTH, Download, Staging, download
from tests.helpers import toy_images, toy_model, toy_network


class Untraceable(nn.Module):
    """What it does depends on its input, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer1(x).mean((2, 3))
        logits: Tensor = self.fc(features if bool(features.sum() > 0) else -features)
        return logits


def trained(module: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own, so that folding them changes weights."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.rand(part.num_features)
            part.running_var = torch.rand(part.num_features) + 0.5
    return module


def images(n: int = 4) -> Tensor:
    return torch.from_numpy(toy_images(n, seed=7)[0])


def lean(backbone: Backbone) -> Forward:
    assert isinstance(backbone.forward, Forward)
    return backbone.forward


def test_every_batch_norm_after_a_convolution_is_folded() -> None:
    backbone = Backbone(trained(CifarResNet18(5, 8)), CIFAR_PREPROCESSING)
    assert lean(backbone).folded
    assert not [part for part in lean(backbone).modules() if isinstance(part, nn.BatchNorm2d)]


def test_folding_leaves_the_network_itself_as_it_was() -> None:
    module = trained(CifarResNet18(5, 8))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    backbone = Backbone(module, CIFAR_PREPROCESSING)
    backbone.outputs(images())
    after = backbone.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


class Attentive(nn.Module):
    """Has a layer that torch.fx does not look into, with a linear layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layer1(x).flatten(2).transpose(1, 2)
        attended, _ = self.attention(tokens, tokens, tokens)
        logits: Tensor = self.fc(attended.mean(dim=1))
        return logits


def test_in_bfloat16_too_the_network_itself_stays_as_it_was() -> None:
    module = Attentive()
    full, half = Backbone(module, CIFAR_PREPROCESSING), Backbone(module, CIFAR_PREPROCESSING, precision="bf16")
    expected = full.outputs(images()).penultimate
    assert torch.allclose(half.outputs(images()).penultimate, expected, atol=0.05 * float(expected.abs().max()))
    assert torch.equal(full.outputs(images()).penultimate, expected)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_the_lean_form_gives_the_features_of_the_hooked_network() -> None:
    backbone = Backbone(trained(CifarResNet18(5, 8)), CIFAR_PREPROCESSING)
    plain, hooked = backbone.outputs(images()), backbone.outputs(images(), early=True)
    assert torch.allclose(plain.penultimate, hooked.penultimate, rtol=1e-4, atol=1e-5)


def test_a_network_that_runs_as_it_is_runs_alone() -> None:
    """Otherwise the hooks of a pass for an explanation, say, would change or catch what another pass computes."""
    backbone = Backbone(Untraceable(), CIFAR_PREPROCESSING)
    assert not lean(backbone).folded
    alone: list[bool] = []
    handle = backbone.module.register_forward_pre_hook(lambda *_: alone.append(backbone._one_at_a_time.locked()))
    backbone.outputs(images())
    handle.remove()
    assert alone == [True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_is_traced_wrongly_runs_as_it_is(precision: Precision, caplog: pytest.LogCaptureFixture) -> None:
    class TwoNames(nn.Module):
        """torch.fx records a new tensor for `y += ...`, although x is changed too."""

        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer1(x)
            y = x
            y += self.layer2(x)
            logits: Tensor = self.fc((y - 2.0 * x).mean((2, 3)))
            return logits

    backbone = Backbone(TwoNames(), CIFAR_PREPROCESSING, precision=precision)
    plain, hooked = backbone.outputs(images()), backbone.outputs(images(), early=True)
    assert torch.equal(plain.penultimate, hooked.penultimate)
    assert not lean(backbone).folded
    assert "traced by torch.fx it gives other features" in caplog.text


def test_a_convolution_that_two_layers_read_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer1(x)
            logits: Tensor = self.fc((self.norm(out) + out).mean((2, 3)))
            return logits

    backbone = Backbone(trained(Shared()), CIFAR_PREPROCESSING)
    assert [part for part in lean(backbone).modules() if isinstance(part, nn.BatchNorm2d)]
    plain, hooked = backbone.outputs(images()), backbone.outputs(images(), early=True)
    assert torch.allclose(plain.logits, hooked.logits, atol=1e-5)


def test_a_network_that_cannot_be_traced_runs_as_it_is() -> None:
    backbone = Backbone(Untraceable(), CIFAR_PREPROCESSING)
    assert not lean(backbone).folded
    plain, hooked = backbone.outputs(images()), backbone.outputs(images(), early=True)
    assert torch.equal(plain.logits, hooked.logits)


def test_bfloat16_weights_are_kept_in_bfloat16() -> None:
    backbone = Backbone(CifarResNet18(5, 8), CIFAR_PREPROCESSING, precision="bf16")
    kinds = {part.weight.dtype for part in backbone.lean().network.modules() if isinstance(part, nn.Conv2d)}
    assert kinds == {torch.bfloat16}
    assert backbone.outputs(images()).penultimate.dtype == torch.float32


def test_a_loaded_model_builds_its_network_again_for_gradients(toy: Path) -> None:
    backbone = Detector.load(toy, device="cpu", precision="fp32").backbone
    assert backbone._network is None  # one copy of the weights is enough to serve
    outputs, _ = backbone.differentiable(images())
    assert torch.allclose(outputs.logits, backbone.outputs(images()).logits, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def in_both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both") / "toy" / "1"
    toy_model(out, precisions=("fp32", "bf16"))
    return out


@pytest.mark.parametrize(
    ("able", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")]
)
def test_auto_takes_bfloat16_where_the_processor_multiplies_in_it(
    in_both: Path, monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert Detector.load(in_both, device="cpu").backbone.precision == expected


def test_auto_never_takes_a_precision_that_was_not_calibrated(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert Detector.load(toy, device="cpu").backbone.precision == "fp32"


def test_auto_leaves_bfloat16_that_fails_its_golden_inputs_and_says_so_once(
    in_both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = artifacts.load(in_both)
    artifact.golden["bf16.deferred"] = ~artifact.golden["bf16.deferred"]
    artifacts.save(artifact, tmp_path / "toy" / "1")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    with caplog.at_level(logging.WARNING):
        assert Detector.load(tmp_path / "toy" / "1", device="cpu").backbone.precision == "fp32"
    assert len(caplog.records) == 1
    assert "bf16 is left for fp32" in caplog.text
    with pytest.raises(GoldenMismatch):
        Detector.load(tmp_path / "toy" / "1", device="cpu", precision="bf16")


@pytest.mark.parametrize(("device", "rounded"), [("cuda", False), ("cpu", True)])
def test_float32_on_cuda_is_not_rounded_to_tf32(device: str, rounded: bool) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        exact_float32(torch.device(device))
        assert torch.backends.cudnn.allow_tf32 is rounded
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_staged_images_arrive_whole_though_buffers_are_used_again() -> None:
    ring = Staging((2, 2, 3), torch.device("cpu"))
    sent = [torch.full((1 + index % 5, 2, 2, 3), index, dtype=torch.uint8) for index in range(8 * DEPTH)]
    arrived = [ring.upload(batch) for batch in sent]
    assert all(torch.equal(first, second) for first, second in zip(sent, arrived, strict=True))


def test_a_buffer_is_filled_again_once_its_copy_is_over_and_the_computing_stream_waits_for_its_own_copy_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[str] = []
    empty, numbers = torch.empty, itertools.count()

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            steps.append(f"{self.name} waits for {other.name}")

    class Event:
        def __init__(self) -> None:
            self.number = next(numbers)

        def record(self, stream: Stream) -> None:
            steps.append(f"{self.number} recorded on {stream.name}")

        def synchronize(self) -> None:
            steps.append(f"{self.number} waited for")

    def unpinned(size: Any, *, pin_memory: bool, dtype: torch.dtype) -> torch.Tensor:
        assert pin_memory
        return empty(size, dtype=dtype)

    def kept(tensor: torch.Tensor, stream: Stream) -> None:
        steps.append(f"kept for {stream.name}")

    monkeypatch.setattr(staging, "_works_alone", lambda _: True)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)
    ring = Staging((2, 2, 3), torch.device("cpu"))
    sent = [torch.full((3, 2, 2, 3), value, dtype=torch.uint8) for value in range(DEPTH + 1)]
    arrived = [ring.upload(batch) for batch in sent]
    assert all(torch.equal(first, second) for first, second in zip(sent, arrived, strict=True))
    after = ["computing waits for copying", "kept for computing"]
    used = [*range(DEPTH), 0]  # the first buffer again, after its event
    assert steps == [
        step for number in used for step in (f"{number} waited for", f"{number} recorded on copying", *after)
    ]


def test_results_come_down_in_one_copy_with_their_shapes() -> None:
    values = [torch.rand(3, dtype=torch.float64), torch.rand(3, 2), torch.rand(3)]
    found = download(values)
    assert [part.shape for part in found] == [value.shape for value in values]
    assert all(torch.equal(part, value.double()) for part, value in zip(found, values, strict=True))
    assert download([]) == []
    assert download([torch.zeros(0), torch.zeros(0, 4)])[1].shape == (0, 4)


def test_what_a_device_has_computed_sets_out_at_once_and_its_own_copy_is_all_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[str] = []

    class Event:
        def record(self, stream: str) -> None:
            steps.append(f"recorded on {stream}")

        def synchronize(self) -> None:
            steps.append("waited for")

    def unpinned(*size: Any, pin_memory: bool, dtype: torch.dtype) -> torch.Tensor:
        steps.append("pinned" if pin_memory else "pageable")
        return empty(*size, dtype=dtype)

    empty = torch.empty
    monkeypatch.setattr(staging, "_away", lambda _: True)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of the {device}")
    logits, scores = torch.rand(3, 2), torch.rand(3, dtype=torch.float64)
    sent = Download([logits, scores])
    assert steps == ["pinned", "recorded on the stream of the cpu"]
    found = sent.tensors()
    assert steps[2:] == ["waited for"]
    assert torch.equal(found[0], logits.double())
    assert torch.equal(found[1], scores)


def test_a_network_that_is_traced_on_one_thread_disturbs_no_run_on_another() -> None:
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    images = torch.from_numpy(toy_images(2, seed=0)[0])
    expected = backbone.outputs(images, early=True).logits
    stop = threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        while not stop.is_set():
            try:
                for early in (False, True):
                    assert torch.allclose(backbone.outputs(images, early=early).logits, expected, atol=1e-4)
            except Exception as error:
                failures.append(error)
                return

    runner = threading.Thread(target=run)
    runner.start()
    for _ in range(10):
        assert Backbone(toy_network().module, CIFAR_PREPROCESSING).outputs(images).logits.shape == expected.shape
    stop.set()
    runner.join()
    assert failures == []
