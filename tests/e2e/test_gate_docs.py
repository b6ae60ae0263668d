# SPDX-License-Identifier: Apache-2.0
"""Every example of docs/gate.md, run as it stands there; the first one also with the client's wheel alone."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Process, free_port, running
from tests.helpers import EMBEDDED, ROOT, TOY_CLASSES, encoded, toy_images

PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGE = (ROOT / "docs" / "gate.md").read_text()
FIRST, WAYS, PLAIN, APP, FIT, INSIDE = PYTHON.findall(PAGE)
SERVE, CURL = SHELL.findall(PAGE)
NETWORK = "from tests.helpers import toy_network\n\nnetwork = toy_network().module\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with running(EMBEDDED.parents[1]) as process:
        yield process


def run(script: str, where: Path, server: Process | None = None, python: Path | str = sys.executable) -> str:
    """What an example prints, run in a folder that has the repository's examples."""
    if not (where / "examples").exists():
        (where / "examples").symlink_to(ROOT / "examples")
    (where / "example.py").write_text(script.replace("http://localhost:8000", server.url) if server else script)
    sources = f"{ROOT}:{ROOT / 'client'}" if python == sys.executable else ""
    environment = os.environ | {"PYTHONPATH": sources}
    command = [str(python), "example.py"]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_gate_calls_the_model_for_a_cat_and_a_human_for_static(server: Process, tmp_path: Path) -> None:
    assert run(FIRST, tmp_path, server).splitlines() == ["your model", "a human: ood"]


def test_the_other_ways_to_ask_the_gate_do_what_they_say(server: Process, tmp_path: Path) -> None:
    assert re.fullmatch(r"your model, p = 0\.\d\d\na human\nFalse\n", run(WAYS, tmp_path, server))


def test_the_async_client_lists_verdicts_and_errors(server: Process, tmp_path: Path) -> None:
    assert run(PLAIN, tmp_path, server).split() == ["True", "['cifar10']", "accept", "defer", "undecodable_image"]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[str]:
    """The app of the page, on a port of its own: its URL."""
    port = free_port()
    (tmp_path / "app.py").write_text(APP.replace("9000", str(port)))
    process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("localhost", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None
        yield f"http://localhost:{port}"
    finally:
        process.kill()
        process.wait()


def test_the_proxy_lets_the_cat_through_to_the_app_and_answers_for_static(app: str) -> None:
    name, url = re.fullmatch(r"OODGATE_(\w+)=(\S+) oodgate serve\n", SERVE).groups()  # type: ignore[union-attr]
    assert url == "http://localhost:9000"
    with running(EMBEDDED.parents[1], **{name.lower(): app}) as server:
        script = CURL.replace("localhost:8000", server.url)
        done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    size = (ROOT / "examples" / "cat.png").stat().st_size
    assert re.fullmatch(rf"your model, {size} bytes, p = 0\.\d\d", first)
    assert (json.loads(second)["decision"], json.loads(second)["reason"]) == ("defer", "ood")


def test_ones_own_module_is_fitted_and_gated_inside_one_process(tmp_path: Path) -> None:
    for name, n, seed in (("train", 200, 1), ("held-out", 120, 2), ("tune", 100, 3)):
        images, labels = toy_images(n, seed)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / "mine" / name / TOY_CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:04}.png").write_bytes(encoded(image))
    (tmp_path / "mine" / "network.py").write_text(NETWORK)
    (tmp_path / "mine" / "classes.txt").write_text("\n".join(TOY_CLASSES))
    (image,), (label,) = toy_images(1, 50)
    (tmp_path / "mine" / "photo.png").write_bytes(encoded(image))
    run(FIT, tmp_path)
    assert run(INSIDE, tmp_path).split() == ["your", "model", str(label), TOY_CLASSES[label], "none"]


@pytest.mark.network
def test_the_wheel_of_the_client_alone_gates_a_call(server: Process, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT / "client"], check=True)
    (wheel,) = tmp_path.glob("oodgate_client-*.whl")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    subprocess.run([*pip, "--python", python, "install", "-c", ROOT / "constraints.txt", wheel], check=True)
    alone = "import importlib.util as u\nassert not u.find_spec('torch') and not u.find_spec('service')\n"
    assert run(alone + FIRST, tmp_path, server, python).splitlines() == ["your model", "a human: ood"]


def test_the_readme_of_the_client_shows_the_same_example() -> None:
    assert PYTHON.findall((ROOT / "client" / "README.md").read_text()) == [FIRST]
