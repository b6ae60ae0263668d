# SPDX-License-Identifier: Apache-2.0
"""The accuracy benchmarks: published networks and their sets, another library's scores, the ImageNet protocol."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binom
from torch import nn
from torchvision.models import resnet18

from benchmarks import datasets
from benchmarks.accuracy import compare, networks, odin, rivals, second, sets, subjects, subsets, verify
from benchmarks.accuracy.marks import frozen
from benchmarks.imagenet import __main__ as imagenet, protocol
from detector.backbone import Backbone
from detector.data import ArrayDataset, Dataset, Subset, batches, open_dataset
from detector.errors import DataError
from detector.evaluation import auroc
from detector.features import collect
from detector.images import Preprocessing
from detector.networks import CIFAR_PREPROCESSING, IMAGENET_PREPROCESSING
from detector.outputs import Outputs
from detector.scores import FitOptions, Fusion, registry, score_all
from tests.helpers import TOY_CLASSES, photo, toy_dataset, toy_images, toy_network

IMAGES = {"resnet20": 200, "resnet56": 200, "densenet_cifar10": 100, "densenet_cifar100": 100, "mobilenet_v2": 50}
SEPARATING = ("mds", "knn", "vim", "nnguide", "gmm", "energy", "msp")  # these must flag features that fit no class


@cache
def small_set(name: str) -> tuple[np.ndarray, np.ndarray]:
    return datasets.load(name)


def known_images(known: str, preprocessing: Preprocessing, images: int, start: int = 0) -> Dataset:
    if known == "imagenet":
        return Subset(sets.photos(sets.PHOTO_TEST, preprocessing), np.arange(start, start + images))
    pixels, labels = small_set(f"{known}-test")
    return ArrayDataset(pixels[start : start + images], labels[start : start + images], preprocessing)


@pytest.mark.data
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_published_network_gets_as_many_images_right_as_was_measured(name: str) -> None:
    if not networks.available(name):
        pytest.skip(f"the weights of {name} are not there")
    published, backbone, images = networks.NETWORKS[name], networks.load(name), IMAGES[name]
    dataset = known_images(published.known, backbone.preprocessing, images)
    low, high = (binom.ppf(share, images, published.accuracy) / images for share in (0.0005, 0.9995))
    assert low <= collect(backbone, dataset).accuracy() <= high
    backbone.check_resume(torch.from_numpy(next(batches(dataset, 4)).images))


def test_the_parts_of_the_test_images_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load", lambda name: toy_images(200, seed=len(name)))
    found = sets.load_sets("cifar10", CIFAR_PREPROCESSING, train=40, limit=70)
    parts = {"tune": found.tune, "calibration": found.calibration, "test": found.test}
    assert {name: len(part) for name, part in parts.items()} == {"tune": 40, "calibration": 60, "test": 70}
    pixels = [part.read(index).tobytes() for part in parts.values() for index in range(len(part))]
    assert len(set(pixels)) == 170
    assert np.bincount(found.train.labels).tolist() == [10] * 4
    assert set(found.near) == {"cifar100-test", "tinyimagenet"}
    assert "cifar10-test" in sets.load_sets("cifar100", CIFAR_PREPROCESSING).near


def test_a_balanced_sample_takes_all_of_a_small_class() -> None:
    labels = np.repeat([0, 1, 2], [2, 50, 9])
    chosen = sets.balanced(labels, 15)
    assert np.bincount(labels[chosen]).tolist() == [2, 5, 5]
    assert np.array_equal(chosen, sets.balanced(labels, 15))
    assert np.all(np.diff(chosen) > 0)


FitData = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def features() -> tuple[FitData, dict[str, torch.Tensor]]:
    """Features of three classes with their labels and a linear layer that tells them apart; more, and some of none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.eye(3, 12)
    labels = torch.arange(300) % 3
    train = 6 * weight[labels] + torch.rand(300, 12, generator=generator)
    known = 6 * weight[torch.arange(90) % 3] + torch.rand(90, 12, generator=generator)
    ood = torch.rand(80, 12, generator=generator) * torch.tensor([1.0] * 3 + [4.0] * 9)
    return (train, labels, weight, torch.zeros(3)), {"known": known, "ood": ood}


def test_the_rivals_say_how_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_ood.detector", None)
    with pytest.raises(rivals.RivalsMissing, match=r"oodgate\[rivals\]"):
        rivals.installed()


def test_an_adapter_hands_each_kind_of_detector_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class FeatureMapsDetector:
        pass

    class OfMaps(FeatureMapsDetector):
        requires_fit = True

        def __init__(self, backbone: nn.Module, head: nn.Module, percentile: float = 0.0) -> None:
            self.head, self.percentile = head, percentile

        def fit_feature_maps(self, maps: torch.Tensor, labels: torch.Tensor) -> None:
            self.seen = tuple(maps.shape), len(labels)

        def predict_feature_maps(self, maps: torch.Tensor) -> torch.Tensor:
            assert self.seen == ((300, 12, 1, 1), 300)
            assert self.percentile == 0.5
            logits: torch.Tensor = self.head(maps)
            return -logits.amax(dim=1)

    monkeypatch.setattr(rivals, "installed", lambda: SimpleNamespace(ReAct=OfMaps))
    fitted_on, scored = features()
    found = rivals.rival_scores(*fitted_on, scored, parameters={"react": {"percentile": 0.5}}, names=("react",))
    assert found["react"]["known"].dtype == np.float64
    assert np.allclose(found["react"]["known"], -scored["known"][:, :3].amax(dim=1).numpy())
    with pytest.raises(ValueError, match="no odin on features"):
        rivals.rival_scores(*fitted_on, scored, names=("odin",))


@pytest.mark.parametrize("parameters", [rivals.ALIGNED, rivals.DEFAULTS], ids=["aligned", "defaults"])
def test_larger_means_more_ood_in_every_rival(parameters: dict[str, dict[str, object]]) -> None:
    pytest.importorskip("pytorch_ood")
    pytest.importorskip("sklearn")
    fitted_on, scored = features()
    found = rivals.rival_scores(*fitted_on, scored, parameters=parameters)
    assert set(found) >= {*compare.OURS, *compare.THEIRS_ONLY}
    for name, values in found.items():
        assert all(len(values[key]) == len(scored[key]) for key in scored)
        assert np.isfinite(values["ood"]).all()
        if name in SEPARATING:
            assert auroc(values["known"], values["ood"]) > 0.95, name


def test_gradnorm_is_the_librarys_but_for_the_number_of_classes() -> None:
    pytest.importorskip("pytorch_ood")
    head, h = nn.Linear(32, 10), torch.randn(200, 32).relu()
    theirs = rivals.installed().GradNorm(head, param_filter=lambda name: name == "weight").predict(h)
    with torch.no_grad():
        ours = registry()["gradnorm"](FitOptions(num_classes=10)).score(Outputs(logits=head(h), penultimate=h))
    assert torch.allclose(ours.float(), 10 * theirs.detach(), rtol=1e-4)


@pytest.mark.parametrize("per_pixel", [True, False], ids=["aligned", "defaults"])
def test_odin_is_given_the_networks_own_input_and_its_published_defaults(per_pixel: bool) -> None:
    pytest.importorskip("pytorch_ood")
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    images = toy_images(70, seed=3)[0]  # more than a batch
    std = torch.tensor(CIFAR_PREPROCESSING.std).view(3, 1, 1) if per_pixel else torch.ones(3, 1, 1)
    x = backbone.normalised(torch.from_numpy(images)).requires_grad_()
    logits = backbone.module(x) / 1000
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, logits.argmax(dim=1)), x)
    with torch.no_grad():
        stepped = backbone.module(x - 0.0014 * gradient.sign() / std) / 1000
    parameters = rivals.ODIN | ({"norm_std": list(CIFAR_PREPROCESSING.std)} if per_pixel else {})
    found = rivals.odin_scores(backbone, {"toy": ArrayDataset(images, None, CIFAR_PREPROCESSING)}, parameters)
    assert np.allclose(found["toy"], -stepped.softmax(dim=1).amax(dim=1).numpy(), rtol=1e-6)
    assert len(np.unique(found["toy"])) > 60


@pytest.mark.data
def test_odin_stands_beside_msp_on_the_same_images() -> None:
    pytest.importorskip("pytorch_ood")
    subject = subjects.subject("resnet20", limit=40, train=100)
    result = odin.measure(subject.backbone, subject.sets)
    assert set(result["images"].values()) == {40}
    for group in ("near", "far"):
        msp, rows = (result["scores"][score][group] for score in ("msp", "odin"))
        assert set(msp) == {"ours"}
        assert all(0.6 < rows[side] < 1 for side in ("aligned", "defaults"))


def test_every_result_names_the_weights_it_was_measured_on() -> None:
    ours = {name: subjects.weights(name)["sha256"] for name in ("embedded", "wide")}
    for path in verify.RESULTS.glob("*.json"):
        for network, weights in subjects_of(path).items():
            assert re.fullmatch("[0-9a-f]{64}", weights["sha256"]), path
            if network in ours:
                assert weights["sha256"] == ours[network], (
                    f"{path.name} is of another network of ours: measure it again"
                )
            else:
                assert weights["file"] == networks.NETWORKS[network].file


def subjects_of(result: Path) -> dict[str, dict[str, str]]:
    """The weights that a result is of, by network."""
    content = json.loads(result.read_text())
    found: dict[str, dict[str, str]] = (
        {content["network"]: content["weights"]} if "network" in content else content["weights"]
    )
    return found


@pytest.mark.parametrize("path", sorted(verify.RESULTS.glob("ablations-*.json")), ids=lambda path: path.stem)
def test_an_ablation_is_of_the_images_that_its_networks_result_is_of(path: Path) -> None:
    ablation = json.loads(path.read_text())
    scores = json.loads((verify.RESULTS / f"{ablation['network']}.json").read_text())["scores"]
    for score, row in verify.ABLATED.items():
        for group in ("near", "far"):
            assert abs(ablation["rows"][row][group] - scores[score][group]["auroc"]) <= verify.TOLERANCE, (score, group)


def test_the_subsets_are_of_the_images_that_their_networks_results_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify._verified("subsets")
    assert "the same" in capsys.readouterr().out


@pytest.mark.data
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_weights_at_hand_are_those_of_the_results(name: str) -> None:
    results = [subjects_of(path) for path in verify.RESULTS.glob("*.json")]
    digests = {weights[name]["sha256"] for weights in results if name in weights}
    assert digests == {subjects.weights(name)["sha256"]}


def test_a_result_of_other_weights_is_found_and_gets_no_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify, "RESULTS", tmp_path)
    monkeypatch.setattr(verify, "_measured", lambda *_: {"accuracy": 0.9, "svhn-test": 0.93})
    monkeypatch.setattr(subjects, "weights", lambda name: {"file": f"{name}.th", "sha256": "0" * 64})
    path = tmp_path / "resnet20.json"
    stored = {"network": "resnet20", "torch": "2.0", "accuracy": 0.9, "images": {"train": 5, "tune": 5, "test": 5}}
    for auc, same in ((0.91, False), (0.93001, True)):
        scores = {"msp": {"ood": {"svhn-test": {"auroc": auc}}}}
        path.write_text(json.dumps(stored | {"ood_images": {"svhn-test": 5}, "scores": scores}))
        assert verify._verified("resnet20") is same
        assert ("weights" in json.loads(path.read_text())) is same
    named = json.loads(path.read_text())
    assert named["weights"] == {"file": "resnet20.th", "sha256": "0" * 64, "known_by": "accuracy and msp"}
    assert named["versions"] == {"torch": "2.0"}


@pytest.mark.data
def test_ours_and_theirs_rank_real_features_alike() -> None:
    pytest.importorskip("pytorch_ood")
    pytest.importorskip("sklearn")
    backbone = networks.load("resnet20")
    train, test = (known_images("cifar10", backbone.preprocessing, *part) for part in ((400, 0), (200, 400)))
    near = known_images("cifar100", backbone.preprocessing, 200)
    found = sets.Sets(train, test, test, test, near={"cifar100": near}, far={})
    result = compare.compare(backbone, found, compare.OURS, ("ash",))
    gaps = {name: result["scores"][name]["near"]["ours_minus_aligned"] for name in compare.OURS}
    assert max(map(abs, gaps.values())) < 0.01, gaps
    for name in ("gen", "mds"):
        row = result["scores"][name]["near"]
        assert abs(row["ours_their_way"] - row["aligned"]) < 2e-4, (name, row)
    assert "ours" not in result["scores"]["ash"]["near"]
    assert "ash" in compare.table(result)


def test_the_later_freezes_are_fitted_beside_the_first() -> None:
    network = toy_network()
    backbone = Backbone(network.module, network.preprocessing)
    train, tune, test = (toy_dataset(count, seed) for count, seed in ((200, 1), (150, 2), (150, 3)))
    known = sets.Sets(train, tune, tune, test, near={}, far={})
    found = second.fitted(backbone, known, FitOptions(num_classes=backbone.num_classes, bank_size=100))
    assert set(second.OURS) | {"fusion"} <= set(found)
    outputs = collect(backbone, known.test).outputs
    for name in second.UNREGISTERED:
        members = score_all(found, frozen()["second"][name], outputs)
        fused = found[name]
        assert isinstance(fused, Fusion)
        assert set(fused.maps) == set(members)
        assert torch.equal(fused.combine(members), fused.score(outputs))


def test_the_best_subset_is_the_one_that_tells_the_images_apart() -> None:
    generator = np.random.default_rng(0)
    inside, outside = (generator.normal(size=(len(subsets.CANDIDATES), 200)) for _ in range(2))
    good = ["nci", "rg", "grood_noise"]
    rows = [subsets.CANDIDATES.index(name) for name in good]
    outside[rows] += 1
    known = subsets.Known({"test": inside, "a": outside, "b": outside}, {"a": "near", "b": "far"})
    expected = auroc(inside[rows].mean(axis=0), outside[rows].mean(axis=0))
    assert known.means(good, "mean") == {"near": expected, "far": expected}
    first = subsets.best({"toy": known})[0]
    assert set(good) <= set(first["members"])


def write_images(images: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{folder.name}_{index:04d}.png")


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    """ImageNet in four colours, two OOD sets, and a random network whose last layer holds the class means."""
    for part, count, seed in (("train", 160, 1), ("val", 180, 2)):
        images, labels = toy_images(count, seed)
        for label, name in enumerate(TOY_CLASSES):
            write_images(images[labels == label], tmp_path / "imagenet" / part / name)
    write_images(np.stack([photo(40, 36, seed) for seed in range(20)]), tmp_path / "ninco" / "some_class")
    write_images(np.stack([photo(48, 40, seed) for seed in range(50, 80)]), tmp_path / "openimage_o")
    module = resnet18(num_classes=len(TOY_CLASSES))
    preprocessing = protocol._sized(IMAGENET_PREPROCESSING, 32)
    train = open_dataset(tmp_path / "imagenet" / "train", preprocessing)
    seen = collect(Backbone(module, preprocessing), train)
    rows = [torch.from_numpy(train.labels == label) for label in range(len(TOY_CLASSES))]
    means = torch.stack([seen.outputs.penultimate[part].mean(0) for part in rows])
    with torch.no_grad():
        module.fc.weight.copy_(2 * means)
        module.fc.bias.copy_(-means.square().sum(1))
    save_file(
        {name: value.contiguous() for name, value in module.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    return tmp_path


def test_the_imagenet_protocol_runs_from_folders_to_results(
    miniature: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = sorted((miniature / "imagenet" / "val").rglob("*.png"))[:120]
    (miniature / "val.txt").write_text("".join(f"imagenet_1k/val/{path.name} 0\n" for path in held_out))
    (miniature / "ninco.txt").write_text(
        "".join(f"ninco/some_class/some_class_{index:04d}.png -1\n" for index in range(15))
    )
    out = miniature / "models" / "miniature" / "1"
    out.parent.mkdir(parents=True)
    options = {
        "--imagenet": "imagenet", "--near": "ninco=ninco", "--far": "openimage_o=openimage_o",
        "--weights": "weights.safetensors", "--out": "models/miniature/1",
    }  # fmt: skip
    located = [
        part
        for option, value in options.items()
        for part in (option, value.replace("=", f"={miniature}/") if "=" in value else str(miniature / value))
    ]
    lists = ["--list", f"val={miniature}/val.txt", "--list", f"ninco={miniature}/ninco.txt"]
    sizes = ["--backbone", "torchvision:resnet18", "--size", "32", "--train-images", "120", "--bank-size", "80"]
    imagenet.main([*located, *lists, *sizes, "--device", "cpu"])
    result = json.loads((out.parent / "1-results.json").read_text())
    assert set(result["scores"]) >= set(protocol.SCORES)
    assert result["decisions"]["ninco"] == result["decisions"]["ninco"] | {"n": 15, "group": "near"}
    assert result["decisions"]["openimage_o"]["n"] == 30
    assert result["id"]["n"] == 60
    assert result["id"]["accuracy"] > 0.5
    assert json.loads((out / "report.json").read_text())["id"] == result["id"]
    assert "## fusion" in capsys.readouterr().out


def test_a_list_must_name_images_that_are_there_once(tmp_path: Path) -> None:
    write_images(np.stack([photo(40, 36)] * 3), tmp_path / "ninco" / "bird")
    dataset = open_dataset(tmp_path / "ninco", IMAGENET_PREPROCESSING)
    names = tmp_path / "list.txt"
    names.write_text("ninco/bird/bird_0001.png -1\nninco/bird/bird_9999.png -1\n")
    with pytest.raises(DataError, match=r"1 images that its set lacks, the first of them bird_9999\.png"):
        protocol.listed(dataset, names)
    names.write_text("ninco/bird/bird_0001.png\n")
    assert len(protocol.listed(dataset, names)) == 1
    write_images(np.stack([photo(40, 36)] * 3), tmp_path / "ninco" / "more" / "bird")
    with pytest.raises(DataError, match="several images of one name"):
        protocol.listed(open_dataset(tmp_path / "ninco", IMAGENET_PREPROCESSING), names)


def test_a_missing_folder_is_named_before_weights_are_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = Mock(side_effect=URLError("no network"))
    monkeypatch.setattr("torchvision.models.get_model", fetched)
    command = ["--imagenet", str(tmp_path / "nope"), "--out", str(tmp_path / "out" / "1")]
    with pytest.raises(SystemExit):
        imagenet.main(command)
    assert f"there is no {tmp_path / 'nope' / 'train'}" in capsys.readouterr().err
    fetched.assert_not_called()
    for part in ("train", "val"):
        (tmp_path / "nope" / part).mkdir(parents=True)
    with pytest.raises(SystemExit):
        imagenet.main(command)
    assert "could not be fetched from https://" in capsys.readouterr().err


def test_a_missing_folder_is_named_before_the_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        imagenet.main(["--imagenet", str(tmp_path), "--near", "ninco=nowhere", "--out", str(tmp_path / "out" / "1")])
    assert "'ninco=nowhere' must be NAME=PATH" in capsys.readouterr().err
