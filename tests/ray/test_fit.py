# SPDX-License-Identifier: Apache-2.0
"""A fit on a real Ray: the same scores as here, each image once, whatever dies. `make test-ray` runs it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pyarrow.fs import FileSystem, LocalFileSystem, copy_files
from safetensors.torch import save_file

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed; `make test-ray` brings it")

from benchmarks.scaling.cluster import machine, workers  # noqa: E402
from detector import Detector, features, fit, fit_ray  # noqa: E402
from detector.backbone import Backbone  # noqa: E402
from detector.cli import main  # noqa: E402
from detector.data import Dataset, open_dataset  # noqa: E402
from detector.errors import DataError  # noqa: E402
from detector.features import SHARD, Gather, fit_scores  # noqa: E402
from detector.networks import CIFAR_PREPROCESSING  # noqa: E402
from detector.scores import FitOptions, Score  # noqa: E402
from tests.archives import write_parquet, write_tars  # noqa: E402
from tests.helpers import TOY_CLASSES, toy_dataset, toy_images, toy_network  # noqa: E402

SHARDS = 4
IMAGES = SHARDS * SHARD - 37  # the last shard is short, and its last batch too
NAMES = ("grood", "grood_w", "mds", "vim", "knn", "nci")
OPTIONS = FitOptions(num_classes=len(TOY_CLASSES), bank_size=200, mixup_images=40)


def write_folders(root: Path, images: int, seed: int) -> None:
    """Toy images in class folders."""
    for index, (image, label) in enumerate(zip(*toy_images(images, seed), strict=True)):
        (root / TOY_CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / TOY_CLASSES[label] / f"{index:05}.png")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of a bucket of a server that speaks S3; its address and keys are in the environment."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed; `make test-ray` brings it")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system, _ = FileSystem.from_uri("s3://images?allow_bucket_creation=true")
        system.create_dir("images")
        yield "s3://images"
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def cluster(bucket: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has: another number of threads adds in another order
    with machine(OODGATE_COMPILE="off", **{name: os.environ[name] for name in os.environ if name.startswith("AWS_")}):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_folders(root, IMAGES, seed=1)
    return root


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder, CIFAR_PREPROCESSING, classes=TOY_CLASSES)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(toy_network().module, CIFAR_PREPROCESSING)


@pytest.fixture(scope="module")
def local(backbone: Backbone, dataset: Dataset) -> tuple[dict[str, Score], torch.Tensor]:
    return fit_scores(NAMES, backbone, dataset, OPTIONS)


def gathered(scores: dict[str, Score]) -> dict[str, torch.Tensor]:
    kinds = {kind.__name__: own for score in scores.values() for kind, own in score.gathered.items()}
    return {f"{name}.{key}": value for name, own in kinds.items() for key, value in own.progress().items()}


def assert_same(
    fitted: tuple[dict[str, Score], torch.Tensor],
    local: tuple[dict[str, Score], torch.Tensor],
) -> None:
    """Each image once and in order, every row that was kept and every sum to the bit."""
    assert torch.equal(fitted[1], local[1])
    here, there = gathered(local[0]), gathered(fitted[0])
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(there[name], value), name


def test_the_result_is_that_of_a_local_fit(
    backbone: Backbone, dataset: Dataset, local: tuple[dict[str, Score], torch.Tensor]
) -> None:
    told: list[int] = []
    fitted = fit_scores(NAMES, backbone, dataset, OPTIONS, engine=fit_ray.gather, report=told.append)
    assert sum(told) == len(dataset) == IMAGES
    assert_same(fitted, local)


@pytest.mark.parametrize("engine", [fit_ray.gather, features.gather], ids=["ray", "local"])
@pytest.mark.parametrize("form", ["parquet", "tars"])
@pytest.mark.parametrize("place", ["here", "s3"])
def test_archives_here_and_on_s3_give_the_result_of_the_folder(
    place: str,
    form: str,
    engine: Gather,
    folder: Path,
    bucket: str,
    backbone: Backbone,
    local: tuple[dict[str, Score], torch.Tensor],
    tmp_path: Path,
) -> None:
    write: Callable[[Path, Path], None] = {"parquet": write_parquet, "tars": write_tars}[form]
    write(folder, tmp_path)
    where = str(tmp_path)
    if place == "s3":
        where = f"{bucket}/{form}"
        system, path = FileSystem.from_uri(where)
        copy_files(str(tmp_path), path, source_filesystem=LocalFileSystem(), destination_filesystem=system)
    archive = open_dataset(where, CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    assert_same(fit_scores(NAMES, backbone, archive, OPTIONS, engine=engine), local)


@pytest.fixture(scope="module")
def few(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the images, in class folders of their own."""
    root = tmp_path_factory.mktemp("few")
    for path in sorted(folder.rglob("*.png"))[::40]:
        (root / path.parent.name).mkdir(exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def few_on_s3(few: Path, bucket: str) -> str:
    """The same folders on S3."""
    system, path_there = FileSystem.from_uri(f"{bucket}/folders")
    copy_files(str(few), path_there, source_filesystem=LocalFileSystem(), destination_filesystem=system)
    return f"{bucket}/folders"


@pytest.mark.parametrize("engine", [partial(fit_ray.gather, shard=64), features.gather], ids=["ray", "local"])
def test_class_folders_on_s3_give_the_result_of_those_here(
    engine: Gather, few: Path, few_on_s3: str, backbone: Backbone
) -> None:
    here, there = (open_dataset(where, CIFAR_PREPROCESSING, classes=TOY_CLASSES) for where in (few, few_on_s3))
    expected = fit_scores(NAMES, backbone, here, OPTIONS)
    assert_same(fit_scores(NAMES, backbone, there, OPTIONS, engine=engine), expected)


@pytest.mark.parametrize("engine", ["ray", "local"])
def test_the_command_fits_from_s3_what_it_fits_from_folders_here(
    engine: str, few: Path, few_on_s3: str, bucket: str, tmp_path: Path
) -> None:
    """`oodgate fit`, from the URI to the thresholds; it joins the Ray that runs."""
    write_folders(tmp_path / "calibration", 200, seed=2)
    system, path_there = FileSystem.from_uri(f"{bucket}/calibration-{engine}")
    copy_files(
        str(tmp_path / "calibration"), path_there, source_filesystem=LocalFileSystem(), destination_filesystem=system
    )
    weights = {name: value.contiguous() for name, value in toy_network().module.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "classes").write_text("\n".join(TOY_CLASSES))

    def fitted(train: str, calibration: str, out: Path, *more: str) -> Detector:
        network = ["--backbone", "cifar_resnet18", "--weights", str(tmp_path / "weights.safetensors")]
        data = [train, "--calibration", calibration, "--classes", str(tmp_path / "classes"), "--bank-size", "100"]
        run = CliRunner().invoke(main, ["fit", *data, *network, "--device", "cpu", "--out", str(out), *more])
        assert run.exit_code == 0, run.output
        return Detector.load(out, device="cpu", precision="fp32")

    here = fitted(str(few), str(tmp_path / "calibration"), tmp_path / "here" / "1")
    there = fitted(few_on_s3, f"{bucket}/calibration-{engine}", tmp_path / "there" / "1", "--engine", engine)
    assert [cut.value for cut in there.decider.thresholds] == [cut.value for cut in here.decider.thresholds]
    states = [detector.fitted["grood"].state() for detector in (here, there)]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-10, atol=1e-10)


def test_a_whole_fit_decides_by_the_same_thresholds(dataset: Dataset, tmp_path: Path) -> None:
    def fitted(engine: Gather, name: str) -> Detector:
        out = tmp_path / name / "1"
        calibration, tune = toy_dataset(300, seed=2), toy_dataset(200, seed=3)
        fit(toy_network(), dataset, calibration, out, tune=tune, options=OPTIONS, engine=engine)
        return Detector.load(out, device="cpu", precision="fp32")

    here, there = fitted(features.gather, "local"), fitted(fit_ray.gather, "ray")
    assert [cut.value for cut in there.decider.thresholds] == [cut.value for cut in here.decider.thresholds]
    assert here.fitted.keys() == there.fitted.keys() > {"fusion"}
    for name, score in here.fitted.items():
        state = there.fitted[name].state()
        assert all(torch.equal(state[key], value) for key, value in score.state().items()), name


def test_a_worker_that_dies_costs_no_image_and_counts_none_twice(
    backbone: Backbone, dataset: Dataset, local: tuple[dict[str, Score], torch.Tensor]
) -> None:
    killed: list[int] = []

    def kill_the_worker(_: int) -> None:
        if not killed:
            killed.append(workers("MapWorker")[0])
            os.kill(killed[0], signal.SIGKILL)

    fitted = fit_scores(NAMES, backbone, dataset, OPTIONS, engine=fit_ray.gather, report=kill_the_worker)
    assert killed
    assert_same(fitted, local)


@pytest.mark.parametrize("engine", [fit_ray.gather, features.gather], ids=["ray", "local"])
def test_a_fit_that_was_interrupted_goes_on_where_it_stopped(
    engine: Gather,
    backbone: Backbone,
    dataset: Dataset,
    local: tuple[dict[str, Score], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "RECORD", SHARD)

    class Interrupted(Exception): ...

    def interrupt(_: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        fit_scores(NAMES, backbone, dataset, OPTIONS, engine=fit_ray.gather, workdir=tmp_path, report=interrupt)
    resumed: list[int] = []
    fitted = fit_scores(NAMES, backbone, dataset, OPTIONS, engine=engine, workdir=tmp_path, resumed=resumed.append)
    assert resumed == [SHARD]
    assert_same(fitted, local)


def test_a_shard_that_comes_twice_is_refused(
    backbone: Backbone, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = fit_ray._shards

    def twice(*arguments: object, **options: object) -> Iterator[fit_ray.Row]:
        for shard in shards(*arguments, **options):  # type: ignore[arg-type]
            yield shard
            yield shard

    monkeypatch.setattr(fit_ray, "_shards", twice)
    with pytest.raises(DataError, match="were due"):
        fit_scores(["mds"], backbone, dataset, OPTIONS, engine=fit_ray.gather)


def test_an_image_that_cannot_be_read_is_named(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / TOY_CLASSES[0]).mkdir()
    broken = tmp_path / TOY_CLASSES[0] / "broken.png"
    broken.write_bytes(b"junk")
    dataset = open_dataset(tmp_path, CIFAR_PREPROCESSING, classes=TOY_CLASSES)
    with pytest.raises(DataError, match=r"broken\.png.*Remove the image"):
        fit_scores(["mds"], backbone, dataset, OPTIONS, engine=fit_ray.gather)
