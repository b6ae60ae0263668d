# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import GaussianBlur

from benchmarks.datasets import load
from detector import Detector
from detector.backbone import Backbone
from detector.data import ArrayDataset
from detector.errors import EmptyClass, ScoreError
from detector.evaluation import auroc
from detector.features import collect
from detector.images import image_ids
from detector.networks import CIFAR_PREPROCESSING
from detector.outputs import Outputs
from detector.scores import FitOptions, Grood, GroodNorm
from detector.scores.gather import ClassSums, EarlyMaps
from detector.scores.grood import _blurred, grood_gradient, noise_prototype
from detector.scores.reservoir import Reservoir
from tests.helpers import TOY_CLASSES, toy_images, toy_network

CLASSES = len(TOY_CLASSES)
OPTIONS = FitOptions(num_classes=CLASSES, bank_size=120, mixup_images=40)


def autograd_gradient(features: Tensor, prototypes: Tensor, ood_prototype: Tensor) -> Tensor:
    """dL/dq of the paper's loss for each image alone, by autograd, float64."""
    gradients = []
    for h in features.double():
        q = ood_prototype.double().clone().requires_grad_()
        anchors = torch.vstack([prototypes.double(), q[None]])
        similarities = -(h - anchors).square().sum(1).sqrt()
        nearest = int(similarities[:-1].argmax())
        loss = -torch.log_softmax(similarities, 0)[nearest]
        (gradient,) = torch.autograd.grad(loss, q)
        gradients.append(gradient)
    return torch.stack(gradients)


def oracle(features: Tensor, prototypes: Tensor, ood_prototype: Tensor, bank: Tensor) -> Tensor:
    """The definition in float64: every pairwise distance, no shortcut."""
    direction, log_pi = grood_gradient(features, prototypes, ood_prototype)
    gradients = log_pi.exp()[:, None] * direction
    return torch.stack([(gradient - bank.double()).square().sum(1).sqrt().min() for gradient in gradients])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    network = toy_network()
    return Backbone(network.module, network.preprocessing)


@pytest.fixture(scope="module")
def seen(backbone: Backbone) -> tuple[Outputs, Tensor]:
    images, labels = toy_images(400, seed=1)
    labels[::20] = (labels[::20] + 1) % CLASSES  # some labels that the network disagrees with
    outputs = backbone.outputs(torch.from_numpy(images), early=True).with_ids(torch.from_numpy(image_ids(images)))
    return outputs, torch.from_numpy(labels)


@pytest.fixture(scope="module")
def fitted(backbone: Backbone, seen: tuple[Outputs, Tensor]) -> Grood:
    return Grood(OPTIONS).partial_fit(*seen).finalize(backbone)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_closed_form_is_the_gradient_of_the_loss(scale: float) -> None:
    features, prototypes, q = (scale * torch.randn(*size, dtype=torch.float64) for size in ((50, 16), (7, 16), (16,)))
    direction, log_pi = grood_gradient(features, prototypes, q)
    expected = autograd_gradient(features, prototypes, q)
    assert (log_pi.exp()[:, None] * direction - expected).abs().max() < 1e-9


def test_an_image_at_the_ood_prototype_has_a_finite_gradient() -> None:
    direction, log_pi = grood_gradient(torch.ones(1, 4), torch.zeros(2, 4), torch.ones(4))
    assert torch.isfinite(direction).all()
    assert torch.isfinite(log_pi).all()


def test_prototypes_are_class_means_over_all_images_by_true_label(fitted: Grood, seen: tuple[Outputs, Tensor]) -> None:
    outputs, labels = seen
    for label in range(CLASSES):
        mean = outputs.penultimate[labels == label].double().mean(0)
        assert torch.allclose(fitted.prototypes[label].double(), mean, atol=1e-6)


def test_the_ood_prototype_is_the_mean_of_resumed_mixes(
    backbone: Backbone, fitted: Grood, seen: tuple[Outputs, Tensor]
) -> None:
    outputs, labels = seen
    assert outputs.early is not None
    assert outputs.ids is not None
    ids = outputs.ids.tolist()
    early = outputs.early.double()
    means = torch.stack([early[labels == label].mean(0) for label in range(CLASSES)])
    runner_up = outputs.logits.topk(2, dim=1).indices[:, 1]
    chosen = [
        index
        for label in range(CLASSES)
        for index in sorted((labels == label).nonzero().flatten().tolist(), key=lambda i: ids[i])[:10]
    ]
    mixed = torch.stack([0.5 * early[i] + 0.5 * means[runner_up[i]] for i in chosen])
    expected = backbone.resume(mixed.float()).double().mean(0)
    assert torch.allclose(fitted.ood_prototype.double(), expected, atol=1e-5)


def test_the_bank_holds_correct_images_only_balanced_by_smallest_id(
    fitted: Grood, seen: tuple[Outputs, Tensor]
) -> None:
    outputs, labels = seen
    correct = outputs.logits.argmax(1) == labels
    assert not correct.all()  # or the test would show nothing
    wrong = outputs.penultimate[~correct]
    direction, log_pi = grood_gradient(wrong, fitted.prototypes, fitted.ood_prototype)
    gradients = (log_pi.exp()[:, None] * direction).float()
    assert torch.cdist(gradients, fitted.bank).min() > 0
    assert len(fitted.bank) <= 120


def test_scores_equal_the_float64_oracle(fitted: Grood, seen: tuple[Outputs, Tensor]) -> None:
    outputs, _ = seen
    features = torch.cat([outputs.penultimate, 3 * torch.randn(100, outputs.penultimate.shape[1])])
    expected = oracle(features, fitted.prototypes, fitted.ood_prototype, fitted.bank)
    found = fitted.score(Outputs(torch.zeros(len(features), CLASSES), features))
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_scores_equal_the_oracle_where_pi_underflows_float32(backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(3)
    prototypes = 100 * torch.eye(CLASSES, 16)
    q = torch.full((16,), 60.0)  # far from all: pi about exp(-150), its square far below float32
    features = prototypes[torch.arange(80) % CLASSES] + torch.randn(80, 16, generator=generator)
    direction, log_pi = grood_gradient(features, prototypes, q)
    assert log_pi.max() < -100
    bank = log_pi.exp()[:, None] * direction
    score = Grood.from_state({"prototypes": prototypes, "ood_prototype": q, "bank": bank[:40]}, backbone)
    found = score.score(Outputs(torch.zeros(40, CLASSES), features[40:]))
    large = 1e60 * bank  # the same distances, scaled so that their squares do not vanish in float64 either
    expected = torch.stack([(g - large[:40]).square().sum(1).sqrt().min() / 1e60 for g in large[40:]])
    assert len(set(found.tolist())) == 40
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("query", [-196.0, -150.0, -122.0, -60.0, -1.0])
def test_scores_are_exact_however_far_pi_lies_from_the_banks(query: float, backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.zeros(16)
    log_pi = torch.linspace(-125, -120, 60, dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator, dtype=torch.float64))
    bank = log_pi.exp()[:, None] * directions
    score = Grood.from_state({"prototypes": torch.zeros(CLASSES, 16), "ood_prototype": q, "bank": bank}, backbone)
    own = torch.nn.functional.normalize(torch.randn(1, 16, generator=generator, dtype=torch.float64))
    score_of = torch.tensor([query], dtype=torch.float64)
    unit = torch.maximum(score_of, log_pi.min())
    found = score._distance((score_of - unit).exp() * own, unit, torch.arange(60)) * unit.exp()
    large = (score_of.exp() * own - bank) * 1e60
    assert torch.allclose(found, large.square().sum(1).sqrt() / 1e60, rtol=1e-9)


def test_rows_closer_than_float32_can_tell_apart_are_measured_exactly(backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(6)
    prototypes = torch.randn(CLASSES, 64, generator=generator)
    q = torch.randn(64, generator=generator)
    features = prototypes[0] + 1e-4 * torch.randn(400, 64, generator=generator)
    direction, log_pi = grood_gradient(features, prototypes, q)
    bank = (log_pi.exp()[:, None] * direction)[:300].float()
    score = Grood.from_state({"prototypes": prototypes, "ood_prototype": q, "bank": bank}, backbone)
    expected = oracle(features[300:], prototypes, q, bank)
    found = score.score(Outputs(torch.zeros(100, CLASSES), features[300:]))
    assert torch.allclose(found, expected, rtol=1e-9)
    own, log_pi = grood_gradient(features[300:], prototypes, q)
    assert torch.allclose(score._nearest_unawaited(own, log_pi), expected, rtol=1e-9)


def test_a_bank_too_short_for_float32_is_kept_in_float64(backbone: Backbone) -> None:
    features, labels = torch.zeros(8, 64), torch.arange(8) % CLASSES
    features[torch.arange(8), labels] = 200
    logits = 10 * torch.nn.functional.one_hot(labels, CLASSES).float()
    early = torch.zeros(8, 8, 32, 32)
    outputs = Outputs(logits, features, early, ids=torch.arange(8))
    assert Grood(OPTIONS).partial_fit(outputs, labels).finalize(backbone).bank.dtype == torch.float64


@pytest.mark.parametrize("shortest", [-200.0, -400.0, -700.0])
def test_a_bank_whose_squares_underflow_float64_is_searched_all_the_same(shortest: float, backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(8)
    q = torch.zeros(16)
    lengths = torch.linspace(shortest, shortest / 2, 60, dtype=torch.float64).exp()
    bank = lengths[:, None] * torch.nn.functional.normalize(torch.randn(60, 16, generator=generator).double())
    score = Grood.from_state({"prototypes": torch.zeros(CLASSES, 16), "ood_prototype": q, "bank": bank}, backbone)
    log_pi = lengths.log()[[0, 20, 59]]
    own = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator).double())
    expected = [
        torch.linalg.vector_norm(one - bank / float(length.exp()), dim=1).min() * length.exp()
        for one, length in zip(own, log_pi, strict=True)
    ]
    for search in (score._nearest, score._nearest_unawaited):
        assert torch.allclose(search(own, log_pi).log(), torch.stack(expected).log(), rtol=1e-9)


def test_grood_norm_is_the_one_norm_of_the_gradient(fitted: Grood, seen: tuple[Outputs, Tensor]) -> None:
    outputs, _ = seen
    gradients = autograd_gradient(outputs.penultimate[:50], fitted.prototypes, fitted.ood_prototype)
    norm = GroodNorm.from_state(fitted.state(), backbone=_anywhere())
    assert torch.allclose(norm.score(outputs[:50]), gradients.abs().sum(1), rtol=1e-7)


@pytest.mark.parametrize("bank_size", [None, 60])
def test_merged_shards_equal_one_pass(bank_size: int | None, backbone: Backbone, seen: tuple[Outputs, Tensor]) -> None:
    outputs, labels = seen
    options = FitOptions(num_classes=CLASSES, bank_size=bank_size, mixup_images=40)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    shards = [Grood(options).partial_fit(outputs[part], labels[part]) for part in torch.chunk(order, 5)]
    merged = shards[3]
    for shard in (shards[0], shards[4], shards[2], shards[1]):
        merged.merge(shard)
    whole = Grood(options).partial_fit(outputs, labels).finalize(backbone).state()
    parts = merged.finalize(backbone).state()
    assert whole.keys() == parts.keys()
    for name in whole:  # float32 tensors of float64 sums: one unit in the last place
        assert torch.allclose(whole[name].double(), parts[name].double(), rtol=2e-7, atol=1e-10), name


def test_prototypes_of_merged_shards_agree_to_ten_digits_in_float64(seen: tuple[Outputs, Tensor]) -> None:
    outputs, labels = seen
    one = Grood(OPTIONS).partial_fit(outputs, labels)
    two = Grood(OPTIONS).partial_fit(outputs[:170], labels[:170])
    two.merge(Grood(OPTIONS).partial_fit(outputs[170:], labels[170:]))
    for kind in (ClassSums, EarlyMaps):
        whole, merged = one.got(kind).progress(), two.got(kind).progress()
        assert whole.keys() == merged.keys()
        for name in whole:
            assert torch.allclose(whole[name].double(), merged[name].double(), rtol=1e-10, atol=1e-10), name


def test_progress_restores_to_the_same_fit(backbone: Backbone, seen: tuple[Outputs, Tensor]) -> None:
    outputs, labels = seen
    first = Grood(OPTIONS).partial_fit(outputs[:150], labels[:150])
    resumed = Grood(OPTIONS)
    for kind, gatherer in resumed.gathered.items():
        gatherer.restore(first.gathered[kind].progress())
    resumed.partial_fit(outputs[150:], labels[150:]).finalize(backbone)
    straight = Grood(OPTIONS).partial_fit(outputs[:150], labels[:150]).partial_fit(outputs[150:], labels[150:])
    expected = straight.finalize(backbone).state()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state().items())


@pytest.mark.parametrize("way", ["add", "merge", "restore"])
def test_the_mix_up_is_made_anew_of_what_came_after_it(
    way: str, backbone: Backbone, seen: tuple[Outputs, Tensor]
) -> None:
    outputs, labels = seen
    maps, later = EarlyMaps(OPTIONS), EarlyMaps(OPTIONS)
    maps.add(outputs[:150], labels[:150])
    later.add(outputs[150:], labels[150:])
    before = maps.mean_of_mixed(backbone, 0.5)
    if way == "add":
        maps.add(outputs[150:], labels[150:])
    elif way == "merge":
        maps.merge(later)
    else:
        maps.restore(later.progress())
    fresh = EarlyMaps(OPTIONS)
    fresh.restore(maps.progress())
    assert not torch.equal(fresh.mean_of_mixed(backbone, 0.5), before)
    assert torch.equal(fresh.mean_of_mixed(backbone, 0.5), maps.mean_of_mixed(backbone, 0.5))


def test_the_noise_is_blurred_as_by_torchvision() -> None:
    noise = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    for sigma in (0.3, 1.0, 4.9):
        assert torch.allclose(_blurred(noise, sigma), GaussianBlur((5, 7), (sigma, sigma))(noise), atol=1e-6)


def test_the_noise_prototype_is_the_mean_of_what_the_network_is_least_sure_of(backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(10):
        noise = torch.rand(100, 3, 32, 32, generator=generator)
        sigma = 0.2 + 4.8 * float(torch.rand((), generator=generator))
        blurred = (255 * GaussianBlur((5, 7), (sigma, sigma))(noise)).round().to(torch.uint8)
        outputs = backbone.outputs(blurred.permute(0, 2, 3, 1).contiguous())
        sureness = outputs.logits.double().exp().sum(dim=1)
        kept.append(outputs.penultimate[sureness.argsort()[:10]].double())
    # A pixel on the edge of two values may be rounded to either.
    assert torch.allclose(noise_prototype(backbone), torch.cat(kept).mean(dim=0), rtol=1e-3)


@pytest.mark.parametrize("kind", [Grood, GroodNorm])
def test_state_survives_a_round_trip(
    kind: type[Grood] | type[GroodNorm], backbone: Backbone, fitted: Grood, seen: tuple[Outputs, Tensor]
) -> None:
    score = kind.from_state(fitted.state(), backbone)
    again = kind.from_state(score.state(), backbone)
    assert torch.equal(score.score(seen[0]), again.score(seen[0]))


@pytest.mark.parametrize("kind", [Grood, GroodNorm])
def test_scores_do_not_depend_on_batch_mates(
    kind: type[Grood] | type[GroodNorm], backbone: Backbone, fitted: Grood, seen: tuple[Outputs, Tensor]
) -> None:
    score = kind.from_state(fitted.state(), backbone)
    together = score.score(seen[0])
    alone = torch.cat([score.score(seen[0][i : i + 1]) for i in range(60)])
    assert torch.allclose(together[:60], alone, rtol=1e-9)


@pytest.mark.parametrize("kind", [Grood, GroodNorm])
def test_no_images_have_no_scores(kind: type[Grood] | type[GroodNorm], backbone: Backbone, fitted: Grood) -> None:
    empty = backbone.outputs(torch.zeros(0, 32, 32, 3, dtype=torch.uint8))
    assert kind.from_state(fitted.state(), backbone).score(empty).shape == (0,)


def test_a_class_without_images_is_named(backbone: Backbone, seen: tuple[Outputs, Tensor]) -> None:
    outputs, labels = seen
    with pytest.raises(EmptyClass, match=r"\[2\]"):
        Grood(OPTIONS).partial_fit(outputs[labels != 2], labels[labels != 2]).finalize(backbone)


def test_a_network_that_gets_nothing_right_is_refused(backbone: Backbone, seen: tuple[Outputs, Tensor]) -> None:
    outputs, _ = seen
    wrong = (outputs.logits.argmax(1) + 1) % CLASSES
    with pytest.raises(ScoreError, match="order of the classes"):
        Grood(OPTIONS).partial_fit(outputs, wrong).finalize(backbone)


def test_a_reservoir_that_others_are_merged_into_drops_what_it_will_not_keep() -> None:
    whole = Reservoir(7)
    for start in range(0, 20_000, 500):
        whole.merge(Reservoir(7).add(torch.arange(start, start + 500), torch.arange(500) % 3))
    assert sum(len(chunk["ids"]) for chunk in whole._chunks) < 1_000
    assert whole.rows()["ids"].tolist() == [*range(0, 21, 3), *range(1, 21, 3), *range(2, 21, 3)]


MEMORY_OF_A_RESERVOIR = """
import torch
from detector.scores.reservoir import Reservoir

def peak():  # getrusage would tell the parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

generator, kept, floats = torch.Generator().manual_seed(0), 500, 175_000
row_bytes, maps = kept * floats * 4, Reservoir(kept // 10)
before = peak()
for _ in range(60):
    ids = torch.randint(0, 2**62, (50,), generator=generator)
    maps.add(ids, torch.arange(50) % 10, early=torch.ones(50, floats))
maps.rows()
print((peak() - before) / row_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_reservoir_takes_little_more_than_twice_what_it_keeps() -> None:
    told = subprocess.run([sys.executable, "-c", MEMORY_OF_A_RESERVOIR], capture_output=True, text=True, check=True)
    assert 1 < float(told.stdout) < 2.4  # 3,000 rows were offered, and 500 are kept


def test_a_reservoir_keeps_the_smallest_ids_in_any_order() -> None:
    ids, labels = torch.randperm(3000), torch.arange(3000) % 3
    kept = Reservoir(7).add(ids, labels).rows()["ids"]
    pieces = Reservoir(7)
    for part in torch.randperm(3000).chunk(40):
        pieces.add(ids[part], labels[part])
    expected = torch.cat([ids[labels == label].sort().values[:7] for label in range(3)])
    assert torch.equal(kept, expected)
    assert torch.equal(pieces.rows()["ids"], expected)


@pytest.mark.data
def test_float32_ranks_real_images_as_the_float64_oracle(embedded: Detector) -> None:
    grood = embedded.fitted["grood"]
    assert isinstance(grood, Grood)
    parts = []
    for name in ("cifar10-test", "svhn-test"):
        dataset = ArrayDataset(load(name)[0][:1000], None, CIFAR_PREPROCESSING)
        outputs = collect(embedded.backbone, dataset).outputs
        exact = oracle(outputs.penultimate, grood.prototypes, grood.ood_prototype, grood.bank)
        parts.append((grood.score(outputs).numpy(), exact.numpy()))
    (known, known_exact), (ood, ood_exact) = parts
    assert auroc(known, ood) == pytest.approx(auroc(known_exact, ood_exact), abs=5e-5)
    assert np.allclose(known, known_exact, rtol=1e-5)


def _anywhere() -> Backbone:
    network = toy_network()
    return Backbone(network.module, network.preprocessing)
