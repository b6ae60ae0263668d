# SPDX-License-Identifier: Apache-2.0
"""Every command of the README, run as it stands there, in its order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from detector.backbone import Backbone
from detector.data import ArrayDataset
from detector.features import collect
from detector.images import Pixels
from detector.networks import NetworkSpec, build, default_preprocessing
from tests.e2e.server import free_port
from tests.helpers import ROOT, TOY_CLASSES, encoded, toy_images

README = (ROOT / "README.md").read_text()
SETS = (("train", 40, 1), ("held-out", 60, 2), ("test", 20, 3), ("tune", 20, 6))
SPEC = NetworkSpec(kind="torchvision", name="resnet18", num_classes=len(TOY_CLASSES))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block(language: str, containing: str) -> str:
    return next(text for text in blocks(language) if containing in text)


class Workplace:
    """A folder to write in that looks like the clone, with a user's files in `mine`, and a port for the server."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        (root / "examples").symlink_to(ROOT / "examples")
        (root / "models").mkdir()
        (root / "models" / "cifar10").symlink_to(ROOT / "models" / "cifar10")
        self.environment = os.environ | {
            "OODGATE_PORT": str(self.port),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def run(self, script: str) -> str:
        command = ["bash", "-euc", script.replace("localhost:8000", f"localhost:{self.port}")]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def write_images(folder: Path, images: Pixels, names: list[str] | None = None) -> None:
    for index, image in enumerate(images):
        place = folder / names[index] if names else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:04}.png").write_bytes(encoded(image))


def write_user_files(mine: Path) -> None:
    torch.manual_seed(0)
    network, preprocessing = build(SPEC), default_preprocessing(SPEC)
    sets = {name: toy_images(n, seed) for name, n, seed in SETS}
    for name, (images, labels) in sets.items():
        write_images(mine / name, images, [TOY_CLASSES[label] for label in labels])
    write_images(mine / "production", toy_images(75, 4)[0])
    write_images(mine / "strange", np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    (mine / "photo.jpg").write_bytes(encoded(toy_images(1, 5)[0][0], "JPEG"))
    (mine / "classes.txt").write_text("\n".join(TOY_CLASSES))
    known = collect(Backbone(network, preprocessing), ArrayDataset(*sets["train"], preprocessing))
    features, answers = known.outputs.penultimate, torch.from_numpy(known.labels)
    means = torch.stack([features[answers == label].mean(0) for label in range(len(TOY_CLASSES))])
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    scale = 20 / means.square().sum(1).mean()
    save_file(
        state | {"fc.weight": scale * means, "fc.bias": -scale / 2 * means.square().sum(1)},
        mine / "weights.safetensors",
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def served(workplace: Workplace) -> Iterator[Workplace]:
    """`make serve`, as the README says, until the tests are done."""
    command = ["bash", "-c", block("sh", "make serve")]
    environment = workplace.environment | {"MAKEFLAGS": f"VENV={Path(sys.executable).parents[1]}"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    pause = threading.Event()
    for _ in range(600):
        try:
            if httpx.get(f"http://localhost:{workplace.port}/v2/health/ready").status_code == 200:
                break
        except httpx.TransportError:
            assert server.poll() is None, "make serve ended"
        pause.wait(0.1)
    yield workplace
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(60)


def test_the_first_curl_gives_the_answer_that_the_readme_shows(served: Workplace) -> None:
    shown, real = json.loads(blocks("json")[0]), json.loads(served.run(block("sh", "--data-binary")))
    assert real["decision"] == "accept"
    for answer in (shown, real):
        del answer["request_id"], answer["timing_ms"]
    # The README shows one precision, and this machine may serve in the other, with its own calibration.
    for number in ("score", "threshold"):
        assert real["ood"].pop(number) == pytest.approx(shown["ood"].pop(number), rel=2e-2)
    assert real["ood"].pop("shadow").keys() == shown["ood"].pop("shadow").keys()
    assert real["prediction"].pop("confidence") == pytest.approx(shown["prediction"].pop("confidence"), rel=1e-2)
    assert real["ood"].pop("p_value") == pytest.approx(shown["ood"].pop("p_value"), abs=2e-2)
    assert real == shown


def test_two_files_get_two_verdicts_one_of_each_kind(served: Workplace) -> None:
    verdicts = json.loads(served.run(block("sh", "-F file=")))["verdicts"]
    assert [verdict["decision"] for verdict in verdicts] == ["accept", "defer"]


@pytest.mark.parametrize("script", blocks("python"), ids=["client", "library"])
def test_the_python_examples_run(served: Workplace, script: str) -> None:
    path = served.root / "example.py"
    path.write_text(script.replace("localhost:8000", f"localhost:{served.port}"))
    assert "cat" in served.run(f"python {path}")


def test_fitting_calibrating_and_evaluating_ones_own_classifier(workplace: Workplace) -> None:
    write_user_files(workplace.root / "mine")
    fitted = workplace.run(block("sh", "oodgate fit"))
    assert "promise" in fitted
    assert "mine/photo.jpg" in fitted
    moved = workplace.run(block("sh", "oodgate calibrate"))
    assert "calibrated   on 60 images of mine/production" in moved
    assert "| noise (other) | 20 |" in moved


def test_every_command_of_the_readme_is_run_here() -> None:
    assert len(blocks("sh")) == 5
    assert len(blocks("python")) == 2
    assert len(blocks("json")) == 1
