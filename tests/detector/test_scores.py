# SPDX-License-Identifier: Apache-2.0
"""The contract, for every registered score; and each forward score against its formula, written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from torch import Tensor

from detector import Detector
from detector.backbone import Backbone
from detector.errors import EmptyClass, NonFiniteFeatures, ScoreError
from detector.evaluation import auroc
from detector.features import bind
from detector.images import image_ids
from detector.outputs import Outputs
from detector.scores import FitOptions, Grood, Score, registry, score_all
from detector.scores.fusion import Fusion, FusionImage, NormalMap, NormalMaps
from detector.scores.grood import noise_prototype
from tests.helpers import EMBEDDED, TOY_CLASSES, toy_images, toy_network

CLASSES = len(TOY_CLASSES)
OPTIONS = FitOptions(num_classes=CLASSES, bank_size=120, mixup_images=40)
FORWARD = sorted(name for name, kind in registry().items() if not kind.backward)
PLAIN = sorted(name for name in FORWARD if not registry()[name].members and not name.startswith("lowdim"))
FUSIONS = sorted(name for name in FORWARD if registry()[name].members)
FITTED = [name for name in FORWARD if registry()[name].gathers]
TAPS = [(4, 16), (10, 64)]  # classes, features


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    network = toy_network()
    return Backbone(network.module, network.preprocessing)


def outputs_of(backbone: Backbone, n: int, seed: int) -> tuple[Outputs, Tensor]:
    images, labels = toy_images(n, seed)
    outputs = backbone.outputs(torch.from_numpy(images), early=True)
    return outputs.with_ids(torch.from_numpy(image_ids(images))), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def seen(backbone: Backbone) -> tuple[Outputs, Tensor]:
    outputs, labels = outputs_of(backbone, 300, 1)
    labels[::20] = (labels[::20] + 1) % CLASSES
    return outputs, labels


@pytest.fixture(scope="module")
def held_out(backbone: Backbone) -> tuple[Outputs, Tensor]:
    return outputs_of(backbone, 150, 2)


@pytest.fixture(scope="module")
def fitted(backbone: Backbone, seen: tuple[Outputs, Tensor], held_out: tuple[Outputs, Tensor]) -> dict[str, Score]:
    scores = {name: registry()[name](OPTIONS).partial_fit(*seen).finalize(backbone) for name in FORWARD}
    bind(scores)
    for name in sorted(FORWARD, key=lambda name: name in FUSIONS):
        scores[name].tune(*held_out)
    return scores


@pytest.mark.parametrize("name", FORWARD)
def test_a_score_is_one_finite_float64_for_each_image(
    name: str, fitted: dict[str, Score], held_out: tuple[Outputs, Tensor]
) -> None:
    found = fitted[name].score(held_out[0])
    assert found.dtype == torch.float64
    assert found.shape == (150,)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", FORWARD)
def test_a_score_does_not_depend_on_batch_mates(
    name: str, fitted: dict[str, Score], held_out: tuple[Outputs, Tensor]
) -> None:
    outputs = held_out[0]
    together = fitted[name].score(outputs)
    alone = torch.cat([fitted[name].score(outputs[i : i + 1]) for i in range(20)])
    assert torch.allclose(together[:20], alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FORWARD)
def test_no_images_have_no_scores(name: str, backbone: Backbone, fitted: dict[str, Score]) -> None:
    empty = backbone.outputs(torch.zeros(0, 32, 32, 3, dtype=torch.uint8))
    assert fitted[name].score(empty).shape == (0,)


@pytest.mark.parametrize("name", FORWARD)
def test_features_that_are_no_numbers_are_refused_by_name(
    name: str, fitted: dict[str, Score], held_out: tuple[Outputs, Tensor]
) -> None:
    outputs = held_out[0][:3]
    spoilt = replace(outputs, penultimate=outputs.penultimate * torch.tensor([[1.0], [math.nan], [1.0]]))
    with pytest.raises(NonFiniteFeatures, match=name):
        fitted[name].score(spoilt)


@pytest.mark.parametrize("name", FITTED)
def test_merged_shards_equal_one_pass(name: str, backbone: Backbone, seen: tuple[Outputs, Tensor]) -> None:
    outputs, labels = seen
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    shards = [registry()[name](OPTIONS).partial_fit(outputs[part], labels[part]) for part in torch.chunk(order, 3)]
    merged = shards[2].merge(shards[0]).merge(shards[1]).finalize(backbone)
    whole = registry()[name](OPTIONS).partial_fit(outputs, labels).finalize(backbone)
    found, expected = merged.score(outputs), whole.score(outputs)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FORWARD)
def test_state_survives_a_round_trip_through_float32_files(
    name: str, backbone: Backbone, fitted: dict[str, Score], held_out: tuple[Outputs, Tensor]
) -> None:
    score = fitted[name]
    again = registry()[name].from_state({key: value.clone() for key, value in score.state().items()}, backbone)
    again.bind(fitted)
    assert torch.equal(score.score(held_out[0]), again.score(held_out[0]))


@pytest.mark.parametrize("name", [name for name in FORWARD if registry()[name].tensors])
def test_a_state_that_lacks_a_tensor_is_refused_by_name(name: str, backbone: Backbone) -> None:
    with pytest.raises(ScoreError, match=registry()[name].tensors[0]):
        registry()[name].from_state({}, backbone)


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_without_images_names_what_is_missing(name: str, backbone: Backbone) -> None:
    with pytest.raises((EmptyClass, ScoreError), match="no training image"):
        registry()[name](OPTIONS).finalize(backbone)


@pytest.mark.parametrize("name", FITTED)
def test_a_class_without_images_is_named_where_its_mean_or_label_is_needed(
    name: str, backbone: Backbone, seen: tuple[Outputs, Tensor], held_out: tuple[Outputs, Tensor]
) -> None:
    kept = torch.nonzero(seen[1] != 2).flatten()
    score = registry()[name](OPTIONS).partial_fit(seen[0][kept], seen[1][kept])
    if name.startswith(("grood", "lowdim")) or name in ("mds", "rmds"):
        with pytest.raises(EmptyClass, match=r"\[2\]"):
            score.finalize(backbone)
    else:
        assert torch.isfinite(score.finalize(backbone).score(held_out[0])).all()


@pytest.mark.parametrize("name", FORWARD)
def test_constant_features_give_finite_scores(
    name: str, backbone: Backbone, fitted: dict[str, Score], seen: tuple[Outputs, Tensor]
) -> None:
    outputs, _ = seen
    same = replace(
        outputs,
        penultimate=outputs.penultimate[:1].expand(len(outputs), -1).contiguous(),
        logits=outputs.logits[:1].expand(len(outputs), -1).contiguous(),
        early=None if outputs.early is None else outputs.early[:1].expand(len(outputs), -1, -1, -1).contiguous(),
    )
    labels = torch.arange(len(outputs)) % CLASSES
    score = registry()[name](OPTIONS).partial_fit(same, labels).finalize(backbone)
    score.bind(fitted)
    score.tune(same, labels)
    assert torch.isfinite(score.score(same)).all()
    assert torch.isfinite(score.score(outputs)).all()


@pytest.mark.parametrize("name", FORWARD)
def test_larger_is_more_ood(name: str) -> None:
    """Clusters along the class weights, against weak features between all classes: every method agrees there."""
    backbone, known, labels, ood = clusters()
    options = FitOptions(num_classes=4, bank_size=400, mixup_images=40)
    needed = [*registry()[name].members, name]
    scores = {each: registry()[each](options).partial_fit(known[:300], labels[:300]) for each in needed}
    for each in needed:
        scores[each].finalize(backbone)
    bind(scores)
    for each in needed:
        scores[each].tune(known[300:500], labels[300:500])
    inside, outside = scores[name].score(known[500:]), scores[name].score(ood)
    assert auroc(inside.numpy(), outside.numpy()) > 0.8


# --- the formulas, in float64 ---------------------------------------------------------------------------------------


class Case:
    """Outputs of an imagined network, with what the formulas need of its training images."""

    def __init__(self, classes: int, size: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        centres = torch.randn(classes, size, generator=g).abs() * 2
        self.labels = torch.arange(40 * classes) % classes
        self.h = (centres[self.labels] + torch.randn(len(self.labels), size, generator=g)).clamp_min(0)
        self.weight = centres - centres.mean(dim=0)
        self.bias = torch.randn(classes, generator=g)
        self.query = torch.cat([self.h[:30] * 0.9, torch.randn(30, size, generator=g).abs()])
        self.backbone = linear_backbone(self.weight, self.bias)

    def outputs(self, h: Tensor) -> Outputs:
        logits = h @ self.weight.T + self.bias
        ids = torch.arange(len(h), dtype=torch.int64)
        return Outputs(logits, h, early=h[:, :, None, None], ids=ids)

    def fit(self, name: str) -> Score:
        options = FitOptions(num_classes=len(self.weight), bank_size=None, mixup_images=40)
        return registry()[name](options).partial_fit(self.outputs(self.h), self.labels).finalize(self.backbone)


def linear_backbone(weight: Tensor, bias: Tensor) -> Backbone:
    """A network whose penultimate features are its early map, pooled: resuming from features is the identity."""
    from detector.images import Preprocessing

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = torch.nn.Conv2d(3, weight.shape[1], 1)
            self.fc = torch.nn.Linear(weight.shape[1], weight.shape[0])

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.layer1(x).mean(dim=(2, 3)))
            return logits

    module = Pooled()
    with torch.no_grad():
        module.fc.weight.copy_(weight)
        module.fc.bias.copy_(bias)
    return Backbone(module, Preprocessing(resize=4, crop=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3))


def clusters() -> tuple[Backbone, Outputs, Tensor, Outputs]:
    g = torch.Generator().manual_seed(7)
    weight, bias = torch.zeros(4, 32), torch.zeros(4)
    for label in range(4):
        weight[label, 8 * label : 8 * label + 8] = 1.0
    labels = torch.arange(700) % 4
    known = (4 * weight[labels] + 0.6 * torch.randn(700, 32, generator=g)).clamp_min(0)
    strange = (0.8 + 0.6 * torch.randn(200, 32, generator=g)).clamp_min(0)
    strange[:, ::2] *= 0.2

    def outputs(h: Tensor, first: int) -> Outputs:
        logits = h @ weight.T / 4
        pictures = torch.randint(0, 256, (len(h), 8, 8, 3), generator=g, dtype=torch.uint8)
        inputs = pictures if first == 0 else pictures // 4
        return Outputs(logits, h, early=h[:, :, None, None], ids=torch.arange(len(h)) + first, inputs=inputs)

    return linear_backbone(weight / 4, bias), outputs(known, 0), labels, outputs(strange, 10_000)


def softmax(f: np.ndarray) -> np.ndarray:
    e = np.exp(f - f.max(axis=1, keepdims=True))
    shares: np.ndarray = e / e.sum(axis=1, keepdims=True)
    return shares


def log_sum_exp(f: np.ndarray) -> np.ndarray:
    top = f.max(axis=1)
    values: np.ndarray = top + np.log(np.exp(f - top[:, None]).sum(axis=1))
    return values


def gen(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    p = softmax(f)
    rest = np.stack([np.delete(p, c, axis=1).sum(axis=1) for c in range(p.shape[1])], axis=1)  # 1 - p, to all digits
    values: np.ndarray = (p**0.1 * rest**0.1).sum(axis=1)
    return values


def exgrad(order: int) -> Callable[[Case, np.ndarray, np.ndarray], np.ndarray]:
    def oracle(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
        p, eye = softmax(f), np.eye(f.shape[1])
        values = [
            sum(p[i, y] * np.linalg.norm(np.outer(p[i] - eye[y], h[i]).ravel(), ord=order) for y in range(f.shape[1]))
            for i in range(len(f))
        ]
        return np.array(values)

    return oracle


def gradnorm(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    classes = f.shape[1]
    gradients = [np.outer(classes * p - 1, row) for p, row in zip(softmax(f), h, strict=True)]
    return -np.array([np.abs(gradient).sum() for gradient in gradients])


def clip_of(case: Case) -> float:
    values = np.sort(case.h.numpy().astype(np.float64).ravel())
    return float(values[round(0.9 * len(values)) - 1])


def rg(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    strength = np.minimum(h, clip_of(case)).sum(axis=1)
    values: np.ndarray = -strength * log_sum_exp(f)
    assert (log_sum_exp(f) > 0).all()
    return values


def react(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    clipped = np.minimum(h, np.float32(clip_of(case)))
    return -log_sum_exp(clipped @ case.weight.double().numpy().T + case.bias.double().numpy())


def scale(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    kept = h.shape[1] - round(h.shape[1] * 0.85)
    largest = np.sort(h, axis=1)[:, -kept:].sum(axis=1)
    stretched = h * np.exp(h.sum(axis=1) / largest)[:, None]
    return -log_sum_exp(stretched @ case.weight.double().numpy().T + case.bias.double().numpy())


def knn(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    def unit(rows: np.ndarray) -> np.ndarray:
        values: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return values

    bank = unit(case.h.numpy().astype(np.float64))
    k = min(50, len(bank) // len(case.weight) // 10)
    distances = [np.sort(np.linalg.norm(bank - row, axis=1))[k - 1] for row in unit(h)]
    return np.array(distances)


def class_means(case: Case) -> np.ndarray:
    h, labels = case.h.numpy().astype(np.float64), case.labels.numpy()
    return np.stack([h[labels == c].mean(axis=0) for c in range(len(case.weight))])


def mahalanobis(rows: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    inverse = np.linalg.pinv(covariance, rcond=1e-7, hermitian=True)
    values: np.ndarray = np.einsum("nd,de,ne->n", rows, inverse, rows)
    return values


def mds(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    means = class_means(case)
    within = np.cov((case.h.numpy().astype(np.float64) - means[case.labels.numpy()]).T, bias=True)
    values: np.ndarray = np.min([mahalanobis(h - mean, within) for mean in means], axis=0)
    return values


def rmds(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    known = case.h.numpy().astype(np.float64)
    values: np.ndarray = mds(case, h, f) - mahalanobis(h - known.mean(axis=0), np.cov(known.T, bias=True))
    return values


def vim(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    weight, bias = case.weight.double().numpy(), case.bias.double().numpy()
    origin = -np.linalg.pinv(weight, rcond=1e-5) @ bias
    known = case.h.numpy().astype(np.float64)
    moment = (known - origin).T @ (known - origin) / len(known)
    _, vectors = np.linalg.eigh(moment)
    outside = vectors[:, : h.shape[1] - h.shape[1] // 2]
    lengths = np.linalg.norm((known - origin) @ outside, axis=1)
    alpha = (known @ weight.T + bias).max(axis=1).mean() / lengths.mean()
    values: np.ndarray = alpha * np.linalg.norm((h - origin) @ outside, axis=1) - log_sum_exp(f)
    return values


def fdbd(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    weight, mean = case.weight.double().numpy(), case.h.double().numpy().mean(axis=0)
    values = []
    for row, logits in zip(h, f, strict=True):
        y = int(logits.argmax())
        margins = [
            abs(logits[c] - logits[y]) / np.linalg.norm(weight[c] - weight[y]) for c in range(len(weight)) if c != y
        ]
        values.append(-np.mean(margins) / np.linalg.norm(row - mean))
    return np.array(values)


def nci(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    weight, mean = case.weight.double().numpy(), case.h.double().numpy().mean(axis=0)
    centred = h - mean
    aligned = (weight[f.argmax(axis=1)] * centred).sum(axis=1) / np.linalg.norm(centred, axis=1)
    values: np.ndarray = -(aligned + 1e-3 * np.abs(h).sum(axis=1))
    return values


def mixed_prototype(case: Case, share: float) -> np.ndarray:
    """The early map is the feature itself, so the mix needs no network."""
    means = class_means(case)
    f = (case.h @ case.weight.T + case.bias).numpy()
    chosen = [
        i for c in range(len(means)) for i in np.flatnonzero(case.labels.numpy() == c)[: math.ceil(40 / len(means))]
    ]
    runner_up = np.argsort(f, axis=1)[:, -2]
    mixes = [share * case.h[i].double().numpy() + (1 - share) * means[runner_up[i]] for i in chosen]
    prototype: np.ndarray = np.mean(mixes, axis=0)
    return prototype


def distances_to(h: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    return np.stack([np.linalg.norm(h - anchor, axis=1) for anchor in anchors], axis=1)


def grood_norm(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    q = mixed_prototype(case, 0.5)
    d = distances_to(h, np.vstack([class_means(case), q]))
    pi = softmax(-d)[:, -1]
    values: np.ndarray = pi * np.abs((h - q) / d[:, -1:]).sum(axis=1)
    return values


def grood_margin(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    d = distances_to(h, np.vstack([class_means(case), mixed_prototype(case, 0.8)]))
    values: np.ndarray = d[:, :-1].min(axis=1) - d[:, -1]
    return values


def grood_margin_noise(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    d = distances_to(h, np.vstack([class_means(case), noise_prototype(case.backbone).numpy()]))
    values: np.ndarray = d[:, :-1].min(axis=1) - d[:, -1]
    return values


def whitener(case: Case) -> np.ndarray:
    residual = case.h.numpy().astype(np.float64) - class_means(case)[case.labels.numpy()]
    within = residual.T @ residual / len(residual)
    shrunk = 0.9 * within + 0.1 * np.trace(within) / len(within) * np.eye(len(within))
    values, vectors = np.linalg.eigh(shrunk)
    transform: np.ndarray = vectors / np.sqrt(values) / 0.5
    return transform


def grood_margin_w(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    a = whitener(case)
    d = distances_to(h @ a, np.vstack([class_means(case), mixed_prototype(case, 0.8)]) @ a)
    values: np.ndarray = d[:, :-1].min(axis=1) - d[:, -1]
    return values


def grood_w(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    return to_nearest_gradient(case, h, mixed_prototype(case, 0.8), whitener(case))


def grood_noise(case: Case, h: np.ndarray, f: np.ndarray) -> np.ndarray:
    return to_nearest_gradient(case, h, noise_prototype(case.backbone).numpy(), np.eye(h.shape[1]))


def to_nearest_gradient(case: Case, h: np.ndarray, q: np.ndarray, a: np.ndarray) -> np.ndarray:
    anchors = np.vstack([class_means(case), q]) @ a

    def gradients(rows: np.ndarray) -> np.ndarray:
        d = distances_to(rows @ a, anchors)
        values: np.ndarray = softmax(-d)[:, -1:] * (rows @ a - anchors[-1]) / d[:, -1:]
        return values

    correct = (case.h @ case.weight.T + case.bias).argmax(1) == case.labels
    bank = gradients(case.h[correct].double().numpy())
    return np.array([np.linalg.norm(bank - g, axis=1).min() for g in gradients(h)])


PRODUCT_STRENGTHS: dict[str, Callable[[Case, np.ndarray], np.ndarray]] = {
    "one": lambda case, h: np.ones(len(h)),
    "l1": lambda case, h: np.abs(h).sum(axis=1),
    "l2": lambda case, h: np.linalg.norm(h, axis=1),
    "clipped": lambda case, h: np.abs(np.minimum(h, clip_of(case))).sum(axis=1),
}
PRODUCT_CONFIDENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max_prob": lambda f: softmax(f).max(axis=1),
    "from_uniform": lambda f: np.abs(softmax(f) - 1 / f.shape[1]).sum(axis=1),
    "energy": log_sum_exp,
    "max_logit": lambda f: f.max(axis=1),
    "square_prob": lambda f: (softmax(f) ** 2).sum(axis=1),
}
ORACLES: dict[str, Callable[[Case, np.ndarray, np.ndarray], np.ndarray]] = {
    "msp": lambda case, h, f: 1 - softmax(f).max(axis=1),
    "max_logit": lambda case, h, f: -f.max(axis=1),
    "energy": lambda case, h, f: -log_sum_exp(f),
    "gen": gen, "exgrad": exgrad(1), "exgrad_l2": exgrad(2), "gradnorm": gradnorm, "rg": rg, "react": react,
    "scale": scale, "knn": knn, "mds": mds, "rmds": rmds, "vim": vim, "fdbd": fdbd, "nci": nci,
    "grood_norm": grood_norm, "grood_margin": grood_margin, "grood_margin_w": grood_margin_w, "grood_w": grood_w,
    "grood_noise": grood_noise, "grood_margin_noise": grood_margin_noise,
}  # fmt: skip
for _v, _strength in PRODUCT_STRENGTHS.items():
    for _u, _confidence in PRODUCT_CONFIDENCES.items():
        ORACLES[f"product_{_v}_{_u}"] = lambda case, h, f, v=_strength, u=_confidence: -v(case, h) * u(f)  # type: ignore[misc]


def test_every_plain_score_has_an_oracle() -> None:
    elsewhere = {
        "grood",
        "image_statistics",
    }  # in test_grood.py and test_image_statistics.py; that of a fusion is below
    assert set(ORACLES) | elsewhere == set(PLAIN)


@pytest.mark.parametrize("taps", TAPS, ids=str)
@pytest.mark.parametrize("name", sorted(ORACLES))
def test_a_score_equals_its_formula_in_float64(name: str, taps: tuple[int, int]) -> None:
    case = Case(*taps)
    outputs = case.outputs(case.query)
    expected = ORACLES[name](case, outputs.penultimate.double().numpy(), outputs.logits.double().numpy())
    found = case.fit(name).score(outputs).numpy()
    assert np.allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "factor"), [("exgrad", 1), ("exgrad_l2", 2)])
def test_exgrad_is_the_expected_norm_of_gradients_that_autograd_finds(name: str, factor: int) -> None:
    case = Case(5, 12)
    outputs = case.outputs(case.query[:8])
    expected = []
    for h in outputs.penultimate.double():
        weight = case.weight.double().clone().requires_grad_()
        log_p = torch.log_softmax(weight @ h + case.bias.double(), 0)
        norms = [torch.autograd.grad(log_p[y], weight, retain_graph=True)[0].flatten().norm(factor) for y in range(5)]
        expected.append(sum(p * norm for p, norm in zip(log_p.exp().detach(), norms, strict=True)))
    found = case.fit(name).score(outputs)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-4)


def test_gradnorm_is_the_gradient_of_the_cross_entropy_to_the_uniform() -> None:
    case = Case(5, 12)
    outputs = case.outputs(case.query[:8])
    for h, found in zip(outputs.penultimate.double(), case.fit("gradnorm").score(outputs), strict=True):
        weight = case.weight.double().clone().requires_grad_()
        loss = -torch.log_softmax(weight @ h + case.bias.double(), 0).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert float(found) == pytest.approx(-float(gradient.abs().sum()), rel=1e-4)


def test_msp_keeps_its_digits_where_the_network_is_certain() -> None:
    logits = torch.tensor([[40.0, 0.0], [45.0, 0.0], [60.0, 0.0]])
    found = registry()["msp"](FitOptions(num_classes=2)).score(Outputs(logits, torch.zeros(3, 2)))
    assert torch.allclose(found, torch.exp(torch.tensor([-40.0, -45.0, -60.0], dtype=torch.float64)), rtol=1e-9)


def test_rg_does_not_turn_round_where_the_energy_is_not_positive() -> None:
    case = Case(4, 16)
    score = case.fit("rg")
    weak, strong = case.query[:1] * 0.5, case.query[:1] * 1.5
    logits = torch.full((1, 4), -9.0)
    found = [float(score.score(Outputs(logits, h))) for h in (weak, strong)]
    assert found[0] > found[1]  # the stronger feature stays the less OOD one
    around = [float(score.score(Outputs(torch.full((1, 4), level), strong))) for level in (-1.5, -1.38, 2.0)]
    assert around == sorted(around, reverse=True)


def test_the_shrinkage_is_the_one_that_makes_held_out_images_likeliest() -> None:
    case, other = Case(4, 16, seed=0), Case(4, 16, seed=0)
    generator = torch.Generator().manual_seed(9)
    held_out = case.outputs(case.h + torch.randn(case.h.shape, generator=generator))  # wider than the training images
    score = case.fit("grood_margin_w")
    before = score.state()["whitening"].clone()
    score.tune(held_out, other.labels)
    residual = held_out.penultimate.double().numpy() - class_means(case)[case.labels.numpy()]
    within = (case.h.double().numpy() - class_means(case)[case.labels.numpy()]).T
    covariance = within @ within.T / within.shape[1]

    def likelihood(share: float) -> float:
        shrunk = (1 - share) * covariance + share * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return float(-0.5 * (mahalanobis(residual, shrunk).mean() + np.linalg.slogdet(shrunk)[1]))

    best = max((10 ** (e / 4) for e in range(-16, 1)), key=likelihood)
    shrunk = (1 - best) * covariance + best * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    found = score.state()["whitening"].double().numpy()
    found = found / np.linalg.norm(found) * np.sqrt(np.trace(np.linalg.inv(shrunk)))  # without the temperature
    assert np.allclose(found @ found.T, np.linalg.inv(shrunk), rtol=1e-4, atol=1e-6)
    assert best != 0.1
    assert not torch.equal(before, score.state()["whitening"])


def test_the_temperature_is_the_one_that_makes_held_out_labels_likeliest() -> None:
    case = Case(4, 16)
    generator = torch.Generator().manual_seed(9)
    held_out = case.outputs(case.h + torch.randn(case.h.shape, generator=generator))
    score = case.fit("grood_w").tune(held_out, case.labels)
    a = score.state()["whitening"].double().numpy()
    d = distances_to(held_out.penultimate.double().numpy() @ a, class_means(case) @ a)

    def loss(factor: float) -> float:
        return -float(np.log(softmax(-d / factor)[np.arange(len(d)), case.labels.numpy()]).mean())

    assert loss(1.0) <= min(loss(2**0.25), loss(2**-0.25))


# --- fusion ---------------------------------------------------------------------------------------------------------


class Column(Score):
    """One column of the logits."""

    name = "column"

    def __init__(self, index: int) -> None:
        super().__init__(OPTIONS)
        self.index = index

    def _score(self, outputs: Outputs) -> Tensor:
        return outputs.logits[:, self.index]


def normal_score(tune: NDArray[np.float64], query: NDArray[np.float64]) -> NDArray[np.float64]:
    """Phi^-1 of the mid-rank, linear between the tune scores and beyond them as over their outer tenths."""
    known = np.unique(tune)
    normal = np.array([norm.ppf((np.mean(tune < one) + np.mean(tune <= one)) / 2) for one in known])
    outer = round(0.1 * len(known))
    low, high = (np.ptp(normal[part]) / np.ptp(known[part]) for part in (np.s_[:outer], np.s_[-outer:]))
    inside = np.interp(query, known, normal)
    z: NDArray[np.float64] = inside + low * np.minimum(query - known[0], 0) + high * np.maximum(query - known[-1], 0)
    return z


def test_the_fused_score_is_the_mean_normal_score_inside_and_beyond_the_tune_scores() -> None:
    generator = np.random.default_rng(0)
    tune = np.stack(
        [
            generator.exponential(size=230).round(1),  # with ties
            generator.normal(size=230),
            1e-3 * generator.lognormal(size=230) - 5,
        ],
        axis=1,
    ).astype(np.float32)
    reach = 3 * np.ptp(tune, axis=0)
    beyond = np.linspace(tune.min(axis=0) - reach, tune.max(axis=0) + reach, 500)
    query = np.concatenate([beyond, tune], dtype=np.float32)
    fusion = Fusion(OPTIONS)
    fusion.members = ("0", "1", "2")  # type: ignore[misc]
    fusion.bind({name: Column(int(name)) for name in fusion.members})
    tuned, asked = (Outputs(torch.from_numpy(rows), torch.zeros(len(rows), 2)) for rows in (tune, query))
    fusion.tune(tuned, torch.zeros(len(tune), dtype=torch.int64))
    columns = [normal_score(tune[:, one].astype(np.float64), query[:, one].astype(np.float64)) for one in range(3)]
    assert np.allclose(fusion.score(asked).numpy(), np.mean(columns, axis=0), rtol=1e-9, atol=1e-9)


def test_a_fusion_of_one_member_ranks_as_the_member_does(
    fitted: dict[str, Score], backbone: Backbone, held_out: tuple[Outputs, Tensor]
) -> None:
    images = torch.randint(0, 256, (200, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ood = backbone.outputs(images)
    beyond = ood.image_statistics * 1000
    far = replace(
        ood, penultimate=ood.penultimate * 1000, logits=ood.logits * 1000, statistics=beyond
    )  # every tune score
    for name in {*Fusion.members, *FusionImage.members}:
        one = Fusion(OPTIONS)
        one.members = (name,)  # type: ignore[misc]
        one.bind(fitted).tune(*held_out)
        for strange in (ood, far):
            member = auroc(fitted[name].score(held_out[0]).numpy(), fitted[name].score(strange).numpy())
            assert auroc(one.score(held_out[0]).numpy(), one.score(strange).numpy()) == member


def normal_scores(tune: NDArray[np.float64]) -> Callable[[ArrayLike], Tensor]:
    """The map fitted on tune scores, beside one of another size."""
    maps = NormalMaps([NormalMap.fit(np.arange(1000.0)), NormalMap.fit(tune)])
    return lambda values: maps(torch.from_numpy(np.stack([values, values]).astype(np.float64)))[1]


def test_the_map_to_normal_scores_increases_strictly_and_has_no_end() -> None:
    tune = np.random.default_rng(0).exponential(size=500).round(1)  # with ties
    normal = normal_scores(tune)
    z = normal(np.linspace(-50, 200, 20_000))
    assert bool((z.diff() > 0).all())
    assert abs(float(normal(tune).mean())) < 0.05


def test_the_map_of_constant_tune_scores_still_increases() -> None:
    z = normal_scores(np.zeros(20))([-1.0, 0.0, 1.0])
    assert z.tolist() == [-1.0, 0.0, 1.0]


def test_the_map_stays_finite_where_tune_scores_nearly_underflow() -> None:
    tune = np.concatenate([np.linspace(1, 50, 50) * 1e-312, np.linspace(0.1, 1, 50)])
    z = normal_scores(tune)([0.0, 1e-311, 0.5, 10.0])
    assert torch.isfinite(z).all()
    assert bool((z.diff() > 0).all())


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_without_a_member_names_it(name: str, fitted: dict[str, Score]) -> None:
    kind = registry()[name]
    for missing in kind.members:
        with pytest.raises(ScoreError, match=f"fit {missing} too"):
            kind(OPTIONS).bind({other: score for other, score in fitted.items() if other != missing})


def test_a_fusion_before_its_tune_split_says_what_it_needs(
    fitted: dict[str, Score], seen: tuple[Outputs, Tensor]
) -> None:
    with pytest.raises(ScoreError, match="tune split"):
        Fusion(OPTIONS).bind(fitted).score(seen[0])


def on_meta(part: object) -> object:
    """The same with tensors that have a shape and no content."""
    if isinstance(part, Tensor):
        return part.to("meta")
    if isinstance(part, dict):
        return {key: on_meta(value) for key, value in part.items()}
    if isinstance(part, Score | NormalMaps):
        moved = copy(part)
        vars(moved).update({key: on_meta(value) for key, value in vars(part).items() if key != "gathered"})
        return moved
    return part


@pytest.mark.parametrize("checked", [False, True])
def test_only_a_check_waits_for_the_device(fitted: dict[str, Score], checked: bool) -> None:
    scores = cast(dict[str, Score], on_meta(fitted))
    features = next(score.prototypes for score in scores.values() if isinstance(score, Grood)).shape[1]
    logits, penultimate = (torch.empty(5, size, device="meta") for size in (CLASSES, features))
    images = torch.empty(5, 32, 32, 3, dtype=torch.uint8, device="meta")
    # What has no content cannot be read by the host, and what the host reads it waits for.
    with pytest.raises(RuntimeError, match="meta") if checked else nullcontext():
        found = score_all(scores, FORWARD, Outputs(logits, penultimate, inputs=images, checked=checked))
        assert all(values.shape == (5,) for values in found.values())


def test_unchecked_outputs_that_are_no_numbers_have_nan_for_a_score() -> None:
    detector = Detector.load(EMBEDDED, device="cpu", precision="fp32")
    features, classes = detector.backbone.weight.shape[1], detector.backbone.num_classes
    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    outputs = Outputs(torch.ones(3, classes), torch.ones(3, features), inputs=images, checked=False)
    outputs.penultimate[1, 0], outputs.logits[2, 0] = torch.nan, torch.inf
    verdicts = detector.finish_judging(detector.start_judging(outputs, detector.decider), detector.decider)
    assert [verdict.ood.sound for verdict in verdicts] == [True, False, False]
