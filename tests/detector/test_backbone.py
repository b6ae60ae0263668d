# SPDX-License-Identifier: Apache-2.0
"""One battery for every kind of network, with random weights; then what only some of them show."""

from __future__ import annotations

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detector.backbone import Backbone
from detector.cifar_resnet import CifarResNet18
from detector.errors import BackboneError, DataError, NonFiniteFeatures, TapNotFound, UnknownBackbone, UnsafeArchive
from detector.images import Preprocessing
from detector.machine import resolve_device
from detector.networks import (
    CIFAR_PREPROCESSING,
    build,
    default_preprocessing,
    export_network,
    load_export,
    load_network,
    parse_spec,
    read_weights,
)

NETWORKS = (
    "cifar_resnet18",
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_large",
    "torchvision:convnext_tiny",
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "timm:resnet18",
    "timm:vit_tiny_patch16_224",
)
CLASSES = 12


@pytest.fixture(scope="module", params=NETWORKS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    spec = parse_spec(request.param).model_copy(update={"num_classes": CLASSES, "width": 8})
    return Backbone(build(spec), default_preprocessing(spec))


def some_images(backbone: Backbone, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, *backbone.input_shape), dtype=torch.uint8, generator=generator)


def test_logits_are_those_of_the_bare_network(backbone: Backbone) -> None:
    images = some_images(backbone)
    mean, std = (torch.tensor(getattr(backbone.preprocessing, part)).view(3, 1, 1) for part in ("mean", "std"))
    with torch.inference_mode():
        expected = backbone.module((images.permute(0, 3, 1, 2) / 255 - mean) / std)
    logits = backbone.outputs(images).logits
    assert logits.shape == (2, CLASSES)
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_the_penultimate_layer_gives_the_logits_exactly(backbone: Backbone) -> None:
    outputs = backbone.outputs(some_images(backbone))
    again = outputs.penultimate.double() @ backbone.weight.double().T + backbone.bias.double()
    assert torch.allclose(outputs.logits.double(), again, atol=1e-5 * float(again.abs().max()) + 1e-9)


def test_resuming_from_the_early_layer_gives_the_whole_forward(backbone: Backbone) -> None:
    images = some_images(backbone)
    outputs = backbone.outputs(images, early=True)
    assert outputs.early is not None
    backbone.check_resume(images)
    changed = backbone.resume(torch.randn_like(outputs.early))
    moved = (changed - outputs.penultimate).abs().max()
    assert moved > 1e-2 * outputs.penultimate.abs().max()  # the early layer is really what is replaced


def test_images_do_not_see_their_batch_mates(backbone: Backbone) -> None:
    images = some_images(backbone, 3)
    together = backbone.outputs(images).penultimate
    alone = backbone.outputs(images[1:2]).penultimate
    assert torch.allclose(together[1:2], alone, atol=1e-4 * float(together.abs().max()))


def test_no_hook_is_left_behind(backbone: Backbone) -> None:
    backbone.outputs(some_images(backbone, 1), early=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.module.modules())


@pytest.mark.parametrize("name", ["cifar_resnet18", "torchvision:resnet18", "torchvision:vit_b_16"])
def test_an_exported_network_gives_the_same_outputs_and_taps(name: str) -> None:
    torch.manual_seed(0)
    spec = parse_spec(name).model_copy(update={"num_classes": CLASSES, "width": 8})
    preprocessing = default_preprocessing(spec)
    module = build(spec)
    original = Backbone(module, preprocessing)
    exported = Backbone(load_export(export_network(module, preprocessing), "test"), preprocessing)
    images = some_images(original, 3)
    expected, found = original.outputs(images, early=True), exported.outputs(images, early=True)
    assert (exported.head, exported.early) == (original.head, original.early)
    assert expected.early is not None
    assert found.early is not None
    for first, second in (
        (expected.logits, found.logits),
        (expected.penultimate, found.penultimate),
        (expected.early, found.early),
    ):
        assert torch.allclose(first, second, atol=1e-4 * float(first.abs().max()) + 1e-9)
    exported.check_resume(images)
    assert len(exported.outputs(images[:1])) == 1


def test_an_export_with_sample_inputs_is_refused_unopened() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    archive = io.BytesIO()
    torch.export.save(program, archive)
    with pytest.raises(UnsafeArchive, match="example_inputs = None"):
        load_export(archive.getvalue(), "mine.pt2")


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        ("data/constants/model_constants_config.json", b'{"config": {"x": {"use_pickle": true}}}'),
        ("data/weights/model_weights_config.json", b"not json"),
        ("data/aotinductor/model/wrapper.so", b"\x7fELF"),
        ("code/payload.pkl", b"\x80\x02."),
    ],
)
def test_an_archive_with_a_payload_that_could_run_is_refused(entry: str, content: bytes) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("m/archive_format", "pt2")
        file.writestr(f"m/{entry}", content)
    with pytest.raises(UnsafeArchive):
        load_export(archive.getvalue(), "theirs.pt2")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_export_is_refused(content: bytes) -> None:
    with pytest.raises(BackboneError, match="archive"):
        load_export(content, "no.pt2")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_class_count_is_read_from_the_weights(tmp_path: Path, suffix: str) -> None:
    spec = parse_spec("torchvision:resnet50").model_copy(update={"num_classes": CLASSES})
    state = build(spec).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        save_file(state, path)
    module, completed, preprocessing = load_network(parse_spec("torchvision:resnet50"), str(path))
    assert completed.num_classes == CLASSES
    assert preprocessing.crop == (224, 224)
    assert Backbone(module, preprocessing).num_classes == CLASSES


def test_the_width_of_a_cifar_resnet_is_read_from_the_weights(tmp_path: Path) -> None:
    save_file(CifarResNet18(5, 16).state_dict(), tmp_path / "w.safetensors")
    _, completed, preprocessing = load_network(parse_spec("cifar_resnet18"), str(tmp_path / "w.safetensors"))
    assert (completed.num_classes, completed.width) == (5, 16)
    assert preprocessing == CIFAR_PREPROCESSING


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "whole_module.pth")
    with pytest.raises(BackboneError, match="cannot be read as weights"):
        read_weights(tmp_path / "whole_module.pth")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(CifarResNet18(5, 8).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError):
        load_network(parse_spec("torchvision:resnet18"), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("text", ["resnet18", "torchvision:", "keras:x", "cifar_resnet18:64"])
def test_a_spec_that_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(UnknownBackbone):
        parse_spec(text)


def test_a_name_that_is_neither_file_nor_weights_is_refused_with_the_choices() -> None:
    with pytest.raises(BackboneError, match="IMAGENET1K_V2"):
        load_network(parse_spec("torchvision:resnet50"), "IMAGENET21K")


@pytest.mark.parametrize(
    ("spec", "weights", "loader", "source"),
    [
        ("torchvision:resnet18", "IMAGENET1K_V1", "torchvision.models.get_model", "https://download.pytorch.org/"),
        ("timm:resnet18", "pretrained", "timm.create_model", "timm's hub"),
    ],
)
def test_weights_that_cannot_be_fetched_are_one_line_that_asks_for_a_file(
    spec: str, weights: str, loader: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, Mock(side_effect=URLError("no network")))
    with pytest.raises(BackboneError, match=rf"{weights}.* could not be fetched from {source}.*no network.*--weights"):
        load_network(parse_spec(spec), weights)


def test_a_network_without_a_linear_end_is_refused() -> None:
    convolution = nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten())
    with pytest.raises(TapNotFound, match="linear layer"):
        Backbone(convolution, CIFAR_PREPROCESSING)


def test_an_unknown_layer_is_refused_with_those_there_are() -> None:
    with pytest.raises(TapNotFound, match=r"layer9.*layer1"):
        Backbone(CifarResNet18(3, 8), CIFAR_PREPROCESSING, early="layer9")


def test_a_path_around_the_early_layer_is_found() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Conv2d(3, 4, 3, padding=1)
            self.fc = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(torch.cat([self.layer1(x).mean((2, 3)), x.mean((2, 3))], dim=1))
            return out

    backbone = Backbone(Around(), CIFAR_PREPROCESSING)
    with pytest.raises(BackboneError, match="path around"):
        backbone.check_resume(some_images(backbone))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 32, 32, 3), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)],
)
def test_images_of_another_shape_or_type_are_refused(images: Tensor) -> None:
    with pytest.raises(DataError, match="uint8"):
        Backbone(CifarResNet18(3, 8), CIFAR_PREPROCESSING).outputs(images)


def test_a_network_that_gives_nan_is_refused() -> None:
    module = CifarResNet18(3, 8)
    backbone = Backbone(module, CIFAR_PREPROCESSING)
    module.conv1.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteFeatures, match="image 0"):
        backbone.outputs(some_images(backbone))


def test_the_networks_own_input_gives_its_images_back() -> None:
    backbone = Backbone(CifarResNet18(5, 8), CIFAR_PREPROCESSING)
    images = torch.arange(256, dtype=torch.uint8).repeat(24).view(2, 32, 32, 3)
    found = backbone.outputs_of(backbone.normalised(images)).inputs
    assert found is not None
    assert torch.equal(found, images)


def test_two_threads_get_their_own_features() -> None:
    backbone = Backbone(CifarResNet18(5, 8), CIFAR_PREPROCESSING)
    batches = [some_images(backbone, 2), 255 - some_images(backbone, 2)]

    def tapped(index: int) -> Tensor:
        return backbone.outputs(batches[index % 2], early=True).penultimate

    expected = [tapped(0), tapped(1)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tapped, range(80)))
    assert all(torch.allclose(features, expected[index % 2], atol=1e-6) for index, features in enumerate(found))


def test_what_another_thread_does_with_the_network_itself_is_not_seen() -> None:
    class Meeting(CifarResNet18):
        """A second thread runs it whole before the first is out of it."""

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            with ThreadPoolExecutor(1) as other:
                other.submit(super().forward, torch.ones_like(x)).result()
            return logits

    module = Meeting(5, 8)
    backbone = Backbone(module, CIFAR_PREPROCESSING)
    x = backbone.normalised(some_images(backbone, 2))
    expected = CifarResNet18.forward(module, x)
    assert torch.allclose(backbone.outputs_of(x).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_network_built_again_while_nothing_needs_gradients_has_gradients_all_the_same() -> None:
    network = CifarResNet18(5, 8)
    backbone = Backbone(network, CIFAR_PREPROCESSING, rebuild=lambda: deepcopy(network))
    _ = backbone.forward
    backbone.release()
    backbone.outputs(some_images(backbone, 2), early=True)
    outputs, taps = backbone.differentiable(some_images(backbone, 2), ("layer1",))
    (gradient,) = torch.autograd.grad(outputs.logits.sum(), [taps["layer1"]])
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(BackboneError, match="cpu"):
        resolve_device(device)


def test_bfloat16_is_close_to_float32() -> None:
    module = CifarResNet18(5, 8)
    full = Backbone(module, CIFAR_PREPROCESSING)
    half = Backbone(module, CIFAR_PREPROCESSING, precision="bf16")
    images = some_images(full, 8)
    expected, found = full.outputs(images).logits, half.outputs(images).logits
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 5e-2 * expected.abs().max()


def test_preprocessing_flags_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="resize"):
        Preprocessing(resize=0, crop=(1, 1))
