# SPDX-License-Identifier: Apache-2.0
"""Scores from gradients: against plain autograd, image by image; and the contract of scores for those of a backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detector.backbone import Backbone
from detector.errors import EmptyClass, NonFiniteFeatures, ScoreError, TapNotFound
from detector.evaluation import auroc
from detector.images import image_ids
from detector.networks import CIFAR_PREPROCESSING
from detector.outputs import Outputs
from detector.scores import FitOptions, Score, registry
from detector.scores.gaia import FewImages, GaiaA, GaiaZ, batch_norms, late_batch_norms, output_gradient
from detector.scores.lowdim import LowDimLastKnn, last_layer_blocks, train_probe
from detector.scores.nac import FULL_POOLED, FULL_STAGE, THRESHOLDS, Nac, thresholds
from detector.scores.subspace import LARGEST, WhitenedRows, class_averages, principal, refuse_large
from tests.helpers import TOY_CLASSES, toy_images

CLASSES = len(TOY_CLASSES)
OPTIONS = FitOptions(num_classes=CLASSES, bank_size=48)
BACKWARD = sorted(name for name, kind in registry().items() if kind.backward)
ALL = sorted({*BACKWARD, *(name for name in registry() if name.startswith("lowdim"))})
FITTED = [name for name in ALL if registry()[name].gathers]
LEVELS = {"gaia_z": 230, "lowdim_average": 20, "lowdim_last": 20}  # of a grey that is OOD beyond doubt


class Small(nn.Module):
    """Four stages of one convolution; its activations work in place, as torchvision's do."""

    def __init__(self, activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True), norm: bool = True) -> None:
        super().__init__()
        for index, (before, after) in enumerate([(3, 6), (6, 8), (8, 8), (8, 12)], 1):
            batch_norm = nn.BatchNorm2d(after) if norm else nn.Identity()
            stage = nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), batch_norm, activation())
            self.add_module(f"layer{index}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(1, 5):
            x = self.get_submodule(f"layer{index}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def small(module: nn.Module) -> Backbone:
    return Backbone(module, CIFAR_PREPROCESSING)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Trained for a moment, so that its features mean something."""
    torch.manual_seed(0)
    module = Small()
    images, labels = toy_images(640, seed=7)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25
    parameters = list(module.parameters())
    for step in range(40):
        part = slice(64 * (step % 10), 64 * (step % 10) + 64)
        loss = nn.functional.cross_entropy(module(pixels[part]), torch.from_numpy(labels[part]))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(0.3 * gradient)
    return small(module)


def outputs_of(backbone: Backbone, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Outputs:
    outputs = backbone.outputs(torch.from_numpy(images), early=True)
    return outputs.with_ids(torch.from_numpy(image_ids(images)))


@pytest.fixture(scope="module")
def seen(backbone: Backbone) -> tuple[Outputs, Tensor]:
    images, labels = toy_images(160, seed=1)
    return outputs_of(backbone, images), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def held_out(backbone: Backbone) -> Outputs:
    return outputs_of(backbone, toy_images(40, seed=2)[0])


@pytest.fixture(scope="module")
def fitted(backbone: Backbone, seen: tuple[Outputs, Tensor]) -> dict[str, Score]:
    return {name: registry()[name](OPTIONS).partial_fit(*seen).finalize(backbone) for name in ALL}


@pytest.fixture(scope="module")
def exact(backbone: Backbone) -> Small:
    """The same network in float64, its parameters differentiable."""
    module = Small(nn.ReLU).double()
    module.load_state_dict(backbone.module.state_dict())
    return module.eval()


def pixels_of(outputs: Outputs) -> Tensor:
    """The network's input, float64 [N, 3, H, W]."""
    assert outputs.inputs is not None
    mean, std = (255 * torch.tensor(part, dtype=torch.float64).view(3, 1, 1) for part in
                 (CIFAR_PREPROCESSING.mean, CIFAR_PREPROCESSING.std))  # fmt: skip
    return (outputs.inputs.permute(0, 3, 1, 2).double() - mean) / std


def activations(module: Small, kind: type[nn.Module] | tuple[str, ...], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Outputs of the modules of one class, or of these paths, and the logits, with a graph."""
    kept: list[Tensor] = []
    handles = []
    for name, part in module.named_modules():
        if name in kind if isinstance(kind, tuple) else isinstance(part, kind):
            handles.append(part.register_forward_hook(lambda _module, _inputs, output: kept.append(output)))
    logits = module(x)
    for handle in handles:
        handle.remove()
    return kept, logits


def parameter_gradient(module: Small, scalar: Tensor) -> Tensor:
    gradients = torch.autograd.grad(scalar, list(module.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_score_is_one_finite_float64_for_each_image(name: str, fitted: dict[str, Score], held_out: Outputs) -> None:
    found = fitted[name].score(held_out)
    assert found.dtype == torch.float64
    assert found.shape == (40,)
    assert torch.isfinite(found).all()


def test_only_scores_that_look_at_more_than_the_last_layer_run_backward() -> None:
    assert set(ALL) - set(BACKWARD) == {"lowdim_last", "lowdim_last_knn"}


@pytest.mark.parametrize("name", ALL)
def test_a_score_does_not_depend_on_batch_mates(name: str, fitted: dict[str, Score], held_out: Outputs) -> None:
    together = fitted[name].score(held_out)
    alone = torch.cat([fitted[name].score(held_out[i : i + 1]) for i in range(6)])
    assert torch.allclose(together[:6], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_no_images_have_no_scores(name: str, backbone: Backbone, fitted: dict[str, Score]) -> None:
    empty = backbone.outputs(torch.zeros(0, 32, 32, 3, dtype=torch.uint8))
    assert fitted[name].score(empty).shape == (0,)


@pytest.mark.parametrize("name", FITTED)
def test_merged_shards_equal_one_pass(
    name: str, backbone: Backbone, fitted: dict[str, Score], seen: tuple[Outputs, Tensor]
) -> None:
    outputs, labels = seen
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    shards = [registry()[name](OPTIONS).partial_fit(outputs[part], labels[part]) for part in torch.chunk(order, 3)]
    merged = shards[2].merge(shards[0]).merge(shards[1]).finalize(backbone).state()
    assert all(torch.equal(value, merged[key]) for key, value in fitted[name].state().items())


@pytest.mark.parametrize("name", ALL)
def test_state_survives_a_round_trip(
    name: str, backbone: Backbone, fitted: dict[str, Score], held_out: Outputs
) -> None:
    state = {key: value.clone() for key, value in fitted[name].state().items()}
    again = registry()[name].from_state(state, backbone)
    assert torch.equal(fitted[name].score(held_out), again.score(held_out))


@pytest.mark.parametrize("name", [name for name in FITTED if name != "gaia_z"])
def test_fitted_tensors_are_float32(name: str, fitted: dict[str, Score]) -> None:
    state = fitted[name].state()
    assert all(value.dtype == torch.float32 for key, value in state.items() if key != "parameters")


@pytest.mark.parametrize("name", ["lowdim", "lowdim_last", "nac"])
def test_two_fits_are_the_same_whatever_the_global_seed(
    name: str, backbone: Backbone, fitted: dict[str, Score], seen: tuple[Outputs, Tensor]
) -> None:
    torch.manual_seed(12345)
    again = registry()[name](OPTIONS).partial_fit(*seen).finalize(backbone).state()
    assert all(torch.equal(value, again[key]) for key, value in fitted[name].state().items())


@pytest.mark.parametrize("name", BACKWARD)
def test_outputs_without_images_are_refused(name: str, fitted: dict[str, Score], held_out: Outputs) -> None:
    with pytest.raises(ScoreError, match="needs the images"):
        fitted[name].score(replace(held_out, inputs=None))


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_without_images_names_what_is_missing(name: str, backbone: Backbone) -> None:
    with pytest.raises(EmptyClass, match="no training image"):
        registry()[name](OPTIONS).finalize(backbone)


@pytest.mark.parametrize("name", ALL)
def test_a_class_without_images_is_named_where_its_label_is_needed(
    name: str, backbone: Backbone, seen: tuple[Outputs, Tensor], held_out: Outputs
) -> None:
    kept = torch.nonzero(seen[1] != 2).flatten()
    score = registry()[name](OPTIONS).partial_fit(seen[0][kept], seen[1][kept])
    if name.startswith("lowdim"):
        with pytest.raises(EmptyClass, match=r"\[2\]"):
            score.finalize(backbone)
    else:
        assert torch.isfinite(score.finalize(backbone).score(held_out)).all()


@pytest.mark.parametrize("name", ALL)
def test_features_that_are_no_numbers_are_refused_by_name(
    name: str, fitted: dict[str, Score], held_out: Outputs
) -> None:
    spoilt = held_out[:3]
    spoilt = replace(spoilt, penultimate=spoilt.penultimate * torch.tensor([[1.0], [math.nan], [1.0]]))
    with pytest.raises(NonFiniteFeatures, match=name):
        fitted[name].score(spoilt)


@pytest.mark.parametrize("name", ALL)
def test_a_fit_on_one_image_again_and_again_gives_finite_scores(
    name: str, backbone: Backbone, seen: tuple[Outputs, Tensor], held_out: Outputs
) -> None:
    same = seen[0][torch.zeros(len(seen[1]), dtype=torch.int64)]
    score = registry()[name](OPTIONS).partial_fit(same, seen[1]).finalize(backbone)
    assert torch.isfinite(score.score(same)).all()
    assert torch.isfinite(score.score(held_out)).all()


@pytest.mark.parametrize("name", BACKWARD)
def test_scoring_leaves_the_network_as_it_was(
    name: str, backbone: Backbone, fitted: dict[str, Score], held_out: Outputs
) -> None:
    before = {key: value.clone() for key, value in backbone.module.state_dict().items()}
    with torch.inference_mode():
        fitted[name].score(held_out[:4])
    assert all(torch.equal(value, before[key]) for key, value in backbone.module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in backbone.module.modules())
    assert all(parameter.grad is None for parameter in backbone.module.parameters())


# --- the differentiable pass ----------------------------------------------------------------------------------------


def test_the_differentiable_pass_gives_the_outputs_of_the_plain_one(backbone: Backbone, held_out: Outputs) -> None:
    assert held_out.inputs is not None
    outputs, _ = backbone.differentiable(held_out.inputs)
    assert torch.equal(outputs.logits, held_out.logits)
    assert torch.equal(outputs.penultimate, held_out.penultimate)


def test_a_captured_activation_is_not_what_an_in_place_relu_left(backbone: Backbone, held_out: Outputs) -> None:
    assert held_out.inputs is not None
    _, taps = backbone.differentiable(held_out.inputs, ["layer2.1", "layer2"])
    assert taps["layer2.1"].min() < 0
    assert torch.equal(taps["layer2.1"].relu(), taps["layer2"])


def test_the_differentiable_pass_runs_in_float32_whatever_the_precision(held_out: Outputs) -> None:
    assert held_out.inputs is not None
    half = Backbone(Small(), CIFAR_PREPROCESSING, precision="bf16")
    outputs, taps = half.differentiable(held_out.inputs[:2], ["layer1.0"])
    assert {outputs.logits.dtype, outputs.penultimate.dtype, taps["layer1.0"].dtype} == {torch.float32}


def test_a_layer_that_does_not_exist_is_named(backbone: Backbone, held_out: Outputs) -> None:
    assert held_out.inputs is not None
    with pytest.raises(TapNotFound, match="layer9"):
        backbone.differentiable(held_out.inputs, ["layer9"])


# --- GAIA -----------------------------------------------------------------------------------------------------------


def test_gaia_z_is_the_mean_square_share_of_gradients_that_are_not_zero(
    exact: Small, fitted: dict[str, Score], held_out: Outputs
) -> None:
    expected = []
    for image in pixels_of(held_out)[:12]:
        kept, logits = activations(exact, nn.BatchNorm2d, image[None])
        gradients = torch.autograd.grad(logits.max(), kept)
        shares = torch.cat([(gradient[0] != 0).double().mean(dim=(1, 2)) for gradient in gradients])
        expected.append(shares.square().mean())
    assert torch.allclose(fitted["gaia_z"].score(held_out[:12]), torch.stack(expected), rtol=1e-6)


def test_gaia_a_is_the_quotient_of_both_gradients(exact: Small, fitted: dict[str, Score], held_out: Outputs) -> None:
    expected = []
    for image in pixels_of(held_out)[:12]:
        kept, logits = activations(exact, ("layer3.1", "layer4.1", "layer4"), image[None])
        inner = torch.autograd.grad(kept[2].mean(dim=(2, 3)).sum(), kept[:2], retain_graph=True)
        (outer,) = torch.autograd.grad(torch.log_softmax(logits, dim=1).sum(), kept[2:])
        values = torch.cat([part[0].mean(dim=(1, 2)) for part in inner])
        expected.append(values.square().mean() / outer[0].mean(dim=(1, 2)).abs().mean())
    assert torch.allclose(fitted["gaia_a"].score(held_out[:12]), torch.stack(expected), rtol=1e-6)


def test_the_output_gradient_of_gaia_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    h, weight = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((20, 9), (5, 9)))
    h.requires_grad_()
    (expected,) = torch.autograd.grad(torch.log_softmax(h @ weight.T, dim=1).sum(), h)
    assert torch.allclose(output_gradient((h @ weight.T).detach(), weight), expected, rtol=1e-9, atol=1e-12)


def test_gaia_z_looks_at_all_batch_norms_and_gaia_a_at_the_last_two_stages() -> None:
    assert batch_norms(Small(), "gaia_z") == ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    assert late_batch_norms(Small(), "gaia_a") == ["layer3.1", "layer4.1"]


def test_without_named_stages_gaia_a_looks_at_the_last_half_of_the_batch_norms() -> None:
    plain = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(5)))
    assert late_batch_norms(plain, "gaia_a") == ["2", "3", "4"]


@pytest.mark.parametrize("kind", [GaiaA, GaiaZ])
def test_a_network_without_batch_norms_is_refused(
    kind: type[GaiaA] | type[GaiaZ], seen: tuple[Outputs, Tensor]
) -> None:
    with pytest.raises(ScoreError, match="no BatchNorm2d"):
        kind(OPTIONS).partial_fit(*seen).finalize(small(Small(norm=False)))


def test_gaia_z_is_fitted_on_the_32_smallest_ids_whatever_their_classes(seen: tuple[Outputs, Tensor]) -> None:
    outputs, labels = seen
    assert outputs.ids is not None
    assert outputs.inputs is not None
    found, _ = GaiaZ(OPTIONS).partial_fit(outputs, labels).got(FewImages).images()
    assert torch.equal(found, outputs.inputs[outputs.ids.argsort()[:32]])


def test_gaia_z_refuses_a_network_whose_gradients_hold_no_zeros(seen: tuple[Outputs, Tensor]) -> None:
    with pytest.raises(ScoreError, match="needs ReLUs"):
        GaiaZ(OPTIONS).partial_fit(*seen).finalize(small(Small(nn.SiLU)))


def test_gaia_a_takes_a_network_whose_gradients_hold_no_zeros(held_out: Outputs) -> None:
    score = GaiaA(OPTIONS).finalize(small(Small(nn.SiLU)))
    assert torch.isfinite(score.score(held_out)).all()


# --- NAC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [50, 500, 1000])
def test_thresholds_are_mirrored_at_one_half(count: int) -> None:
    edges = thresholds(count)
    assert len(edges) == count
    assert bool((edges.diff() > 0).all())
    assert edges[count // 2 - 1] == 0.5
    assert torch.allclose(edges[1:-2] + edges[1:-2].flip(0), torch.ones(count - 3, dtype=torch.float64))
    assert edges[-2:].tolist() == pytest.approx([1.01, 1.2])


def test_nac_is_the_mean_coverage_of_the_neuron_states(
    exact: Small, fitted: dict[str, Score], seen: tuple[Outputs, Tensor], held_out: Outputs
) -> None:
    def products(x: Tensor) -> list[Tensor]:
        kept, logits = activations(exact, ("layer1", "layer2", "layer3", "avgpool"), x)
        gradients = torch.autograd.grad(-torch.log_softmax(logits, dim=1).mean(dim=1).sum(), kept)
        pairs = list(zip(kept, gradients, strict=True))[::-1]
        return [z.detach().sum(dim=(2, 3)) * g.sum(dim=(2, 3)) for z, g in pairs]

    rows = registry()["nac"](OPTIONS).partial_fit(*seen).got(Nac.gathers[0])
    train = replace(held_out, inputs=rows.images()[0])  # type: ignore[attr-defined]
    layers = []
    full = (FULL_POOLED, FULL_STAGE, FULL_STAGE, FULL_STAGE)
    edges = thresholds(THRESHOLDS).numpy()
    for known, new, enough in zip(products(pixels_of(train)), products(pixels_of(held_out)), full, strict=True):
        columns = []
        for channel in range(known.shape[1]):
            states = [torch.sigmoid(part[:, channel] / known.abs().mean()).numpy() for part in (known, new)]
            histogram = np.histogram(states[0], bins=edges)[0]
            columns.append(np.minimum(histogram / enough, 1)[np.digitize(states[1], edges) - 1])
        layers.append(np.mean(columns, axis=0))
    found = fitted["nac"].score(held_out).numpy()
    # A state on an edge may fall to either side of it in float32: hence not all images.
    assert np.quantile(np.abs(found + np.mean(layers, axis=0)), 0.9) < 1e-6


class Widened(Small):
    """Small with every feature 64 times, and the same logits."""

    def __init__(self, narrow: Small) -> None:
        super().__init__()
        self.load_state_dict(narrow.state_dict())
        self.fc = nn.Linear(64 * 12, CLASSES)
        self.fc.weight.data = narrow.fc.weight.repeat(1, 64) / 64
        self.fc.bias.data = narrow.fc.bias.clone()
        self.avgpool = nn.Sequential(self.avgpool, nn.Flatten(), Repeated())  # type: ignore[assignment]


class Repeated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 64)


def test_nac_is_the_same_however_many_features_make_the_logits(
    backbone: Backbone, fitted: dict[str, Score], held_out: Outputs
) -> None:
    assert isinstance(backbone.module, Small)
    images, labels = toy_images(160, seed=1)
    wide = small(Widened(backbone.module))
    score = Nac(OPTIONS).partial_fit(outputs_of(wide, images), torch.from_numpy(labels)).finalize(wide)
    found = score.score(wide.outputs(held_out.inputs))  # type: ignore[arg-type]
    difference = (found - fitted["nac"].score(held_out)).abs()
    assert difference.quantile(0.9) < 1e-6  # a state on an edge may fall to either side of it


def test_a_layer_that_is_off_for_all_images_leaves_nac_finite(seen: tuple[Outputs, Tensor], held_out: Outputs) -> None:
    module = Small()
    off = module.get_submodule("layer4.1")
    assert isinstance(off, nn.BatchNorm2d)
    off.bias.data.fill_(-100)
    dead = Nac(OPTIONS).partial_fit(*seen).finalize(small(module))
    assert torch.isfinite(dead.score(held_out)).all()


# --- ExGrad ---------------------------------------------------------------------------------------------------------


def test_exgrad_over_all_parameters_is_the_expected_norm(
    exact: Small, fitted: dict[str, Score], held_out: Outputs
) -> None:
    expected = []
    for image in pixels_of(held_out)[:8]:
        log_p = torch.log_softmax(exact(image[None])[0], dim=0)
        norms = torch.stack([parameter_gradient(exact, value).norm() for value in log_p])
        expected.append((log_p.exp() * norms).sum())
    assert torch.allclose(fitted["exgrad_all"].score(held_out[:8]), torch.stack(expected).detach(), rtol=5e-6)


# --- low-dimensional gradients --------------------------------------------------------------------------------------


def probe_energy(score: Score, gradient: Tensor) -> Tensor:
    """The score of gradients [N, P] in float64, from the score's state."""
    state = {key: value.double() for key, value in score.state().items()}
    rows = gradient @ state["basis"] - state["offset"]
    return -torch.logsumexp(rows @ state["probe_weight"].T + state["probe_bias"], dim=1)


def test_the_last_layer_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    h, weight, bias = (torch.randn(*size, generator=generator) for size in ((20, 9), (5, 9), (5,)))
    (found,) = last_layer_blocks(h, weight, bias)()
    for row, image in zip(found, h.double(), strict=True):
        w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
        parts = torch.autograd.grad((w @ image + b).logsumexp(dim=0), [w, b])
        expected = torch.cat([parts[0], parts[1][:, None]], dim=1).flatten()
        assert torch.allclose(row.double(), expected, rtol=1e-6, atol=1e-9)


def test_lowdim_last_scores_the_last_layer_gradient(
    backbone: Backbone, fitted: dict[str, Score], held_out: Outputs
) -> None:
    (gradient,) = last_layer_blocks(held_out.penultimate, backbone.weight, backbone.bias)()
    expected = probe_energy(fitted["lowdim_last"], gradient.double())
    assert torch.allclose(fitted["lowdim_last"].score(held_out), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lowdim", "lowdim_average"])
def test_lowdim_scores_the_gradient_of_all_parameters(
    name: str, exact: Small, fitted: dict[str, Score], held_out: Outputs
) -> None:
    images = pixels_of(held_out)[:8]
    gradient = torch.stack([parameter_gradient(exact, exact(image[None]).logsumexp(dim=1).sum()) for image in images])
    expected = probe_energy(fitted[name], gradient)
    assert torch.allclose(fitted[name].score(held_out[:8]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lowdim_knn", "lowdim_average_knn", "lowdim_last_knn"])
def test_neighbours_in_the_subspace_are_those_of_the_formula(
    name: str, exact: Small, fitted: dict[str, Score], seen: tuple[Outputs, Tensor], held_out: Outputs
) -> None:
    """Whitening, directions and distance in numpy and float64, from nothing that the score holds."""
    outputs, labels = seen
    assert outputs.ids is not None
    by_id = np.argsort(outputs.ids.numpy(), kind="stable")
    chosen = np.concatenate([by_id[labels.numpy()[by_id] == label][: OPTIONS.bank_size // CLASSES]  # type: ignore[operator]
                             for label in range(CLASSES)])  # fmt: skip
    size = CLASSES * 13 if name == "lowdim_last_knn" else None  # the last layer's parameters come last

    def gradients(images: Tensor) -> NDArray[np.float64]:
        free = [parameter_gradient(exact, exact(image[None]).logsumexp(dim=1).sum()) for image in images]
        rows: NDArray[np.float64] = torch.stack(free).detach().numpy()
        return rows if size is None else rows[:, -size:]

    train = gradients(pixels_of(outputs)[chosen])
    mean, spread = train.mean(axis=0), train.std(axis=0)
    varies = spread > 1e-5 * np.sqrt(np.square(train).mean(axis=0))
    whitened = (train[:, varies] - mean[varies]) / spread[varies]
    if name == "lowdim_average_knn":
        means = whitened.reshape(CLASSES, -1, whitened.shape[1]).mean(axis=1)
        directions = means / np.linalg.norm(means, axis=1, keepdims=True)
    else:
        _, singular, directions = np.linalg.svd(whitened, full_matrices=False)
        directions = directions[singular > 1e-4 * singular[0]]

    def coordinates(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        found = rows @ directions.T
        unit: NDArray[np.float64] = found / np.linalg.norm(found, axis=1, keepdims=True)
        return unit

    queries = (gradients(pixels_of(held_out)[:8])[:, varies] - mean[varies]) / spread[varies]
    apart = np.linalg.norm(coordinates(queries)[:, None] - coordinates(whitened)[None], axis=2)
    expected = np.sort(apart, axis=1)[:, 4]
    assert np.allclose(fitted[name].score(held_out[:8]).numpy(), expected, rtol=1e-3)


def test_chosen_parameters_alone_are_looked_at(backbone: Backbone, seen: tuple[Outputs, Tensor]) -> None:
    options = replace(OPTIONS, lowdim_parameters=("layer4.1", "fc"))
    score = registry()["lowdim_knn"](options).partial_fit(*seen).finalize(backbone)
    assert len(score.state()["basis"]) == 2 * 12 + 12 * CLASSES + CLASSES


def test_the_gradient_of_the_last_layer_alone_gives_the_scores_of_lowdim_last(
    backbone: Backbone, seen: tuple[Outputs, Tensor], held_out: Outputs
) -> None:
    options = replace(OPTIONS, lowdim_parameters=("fc",))
    full = registry()["lowdim_knn"](options).partial_fit(*seen).finalize(backbone).score(held_out)
    last = LowDimLastKnn(OPTIONS).partial_fit(*seen).finalize(backbone).score(held_out)
    assert torch.allclose(full, last, rtol=1e-3)


def test_a_parameter_that_does_not_exist_is_named(backbone: Backbone, seen: tuple[Outputs, Tensor]) -> None:
    options = replace(OPTIONS, lowdim_parameters=("layer9",))
    with pytest.raises(ScoreError, match="layer9"):
        registry()["lowdim"](options).partial_fit(*seen).finalize(backbone)


def test_a_basis_of_more_than_two_gigabytes_is_refused_with_its_size() -> None:
    with pytest.raises(ScoreError, match=r"9\.0 GB.*groups"):
        refuse_large(11_200_000, 200, "Choose parameter groups.")
    refuse_large(LARGEST // 800, 200, "")


def gradients(count: int = 60, size: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(count, 6, generator=generator) @ torch.randn(6, size, generator=generator)
    return 3 + mixed + 0.1 * torch.randn(count, size, generator=generator)


def test_whitened_rows_have_mean_zero_and_variance_one() -> None:
    rows = torch.cat(list(WhitenedRows(lambda: iter(torch.split(gradients(), 7)))))
    assert torch.allclose(rows.mean(dim=0), torch.zeros(40), atol=1e-5)
    assert torch.allclose(rows.var(dim=0, correction=0), torch.ones(40), rtol=1e-4)


def test_entries_that_do_not_vary_become_zero() -> None:
    constant = gradients()
    constant[:, 3] = 0.7
    rows = torch.cat(list(WhitenedRows(lambda: iter([constant]))))
    assert not rows[:, 3].any()


def test_the_sketch_finds_the_principal_directions() -> None:
    rows = WhitenedRows(lambda: iter(torch.split(gradients(), 7)))
    whitened = torch.cat(list(rows)).double()
    exact = torch.linalg.svdvals(whitened)[:6]
    found = torch.linalg.svdvals(principal(rows, 6).rows.double())
    assert torch.allclose(found, exact, rtol=1e-5)


def test_coordinates_are_those_of_the_raw_gradient() -> None:
    space = principal(WhitenedRows(lambda: iter(torch.split(gradients(), 7))), 6)
    assert torch.allclose(gradients() @ space.basis - space.offset, space.rows, atol=1e-4)


def test_there_are_no_more_directions_than_the_rank() -> None:
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(60, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    assert principal(WhitenedRows(lambda: iter([low])), 20).rows.shape[1] == 3


def test_class_averages_are_of_length_one() -> None:
    rows, labels = WhitenedRows(lambda: iter(torch.split(gradients(), 7))), torch.arange(60) % 3
    whitened = torch.cat(list(rows))
    means = torch.stack([nn.functional.normalize(whitened[labels == label].mean(dim=0), dim=0) for label in range(3)])
    assert torch.allclose(class_averages(rows, labels, 3).rows, whitened @ means.T, atol=1e-4)


def test_beyond_many_entries_the_last_layer_is_projected_on_class_averages(
    monkeypatch: pytest.MonkeyPatch, backbone: Backbone, seen: tuple[Outputs, Tensor]
) -> None:
    monkeypatch.setattr("detector.scores.lowdim.LARGEST_PCA", 10)
    score = LowDimLastKnn(OPTIONS).partial_fit(*seen).finalize(backbone)
    assert score.bank.shape[1] == CLASSES


def test_the_probe_learns_classes_that_a_line_divides() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(900) % 3
    rows = 5 * nn.functional.one_hot(labels, 3) + torch.randn(900, 3, generator=generator)
    weight, bias = train_probe(rows, labels, 3)
    assert ((rows @ weight.T + bias).argmax(dim=1) == labels).float().mean() > 0.95


def test_training_the_probe_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    train_probe(gradients(), torch.arange(60) % 3, 3)
    assert torch.equal(torch.rand(1), expected)


def test_neighbours_are_at_the_fifth_distance_in_the_subspace(fitted: dict[str, Score], held_out: Outputs) -> None:
    score = fitted["lowdim_last_knn"]
    assert isinstance(score, LowDimLastKnn)
    rows = nn.functional.normalize(torch.randn(30, score.bank.shape[1], dtype=torch.float64), dim=1)
    expected = torch.cdist(rows, score.bank.double(), compute_mode="donot_use_mm_for_euclid_dist").sort().values[:, 4]
    assert torch.allclose(score._rank(rows), expected, rtol=1e-6)


# What a network of a few seconds makes of white noise says nothing of those that have a case of their own below.
@pytest.mark.parametrize("name", [name for name in ALL if name not in LEVELS])
def test_noise_scores_above_known_colours(
    name: str, backbone: Backbone, fitted: dict[str, Score], held_out: Outputs
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    known, ood = fitted[name].score(held_out), fitted[name].score(outputs_of(backbone, noise))
    assert auroc(known.numpy(), ood.numpy()) > 0.8


class Colours(nn.Module):
    """One channel a colour, on where that colour is bright; each class has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.fc = nn.Linear(3, 3)
        self.layer1[0].weight.data = torch.eye(3)[:, :, None, None]
        self.fc.weight.data = 4 * torch.eye(3) - 1
        self.fc.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layer1(x).mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize(("name", "level"), LEVELS.items())
def test_all_colours_at_once_or_none_score_above_known_colours(name: str, level: int) -> None:
    backbone = small(Colours())
    images, labels = toy_images(300, seed=1)
    coloured = labels < 3
    known, classes = outputs_of(backbone, images[coloured]), torch.from_numpy(labels[coloured])
    grey = level + np.random.default_rng(0).normal(0, 8, (40, 32, 32, 3))
    score = registry()[name](FitOptions(num_classes=3)).partial_fit(known[:160], classes[:160]).finalize(backbone)
    inside, outside = score.score(known[160:]), score.score(outputs_of(backbone, grey.astype(np.uint8)))
    assert auroc(inside.numpy(), outside.numpy()) > 0.95
